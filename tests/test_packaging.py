"""The distribution: what is in the wheel, and that it works where nothing else is."""

from __future__ import annotations

import configparser
import re
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import HANG, ROOT, run

import greensafe

pytestmark = pytest.mark.timeout(400)


def _run(*command: str | Path, cwd: Path) -> str:
    # Without the folder of this tree on the path: what is installed is to be found.
    done = run(command, cwd=cwd, limit=5 * HANG, env={"PYTHONPATH": ""})
    assert done.code == 0, done.out + done.err
    return done.out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what is checked in, or would be."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    return next(folder.glob("greensafe-*.whl"))


@pytest.mark.check
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """py.typed and the licence are in; tests, examples and benchmarks are not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(name for name in names if name.endswith("METADATA"))).decode())
    assert "greensafe/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"greensafe", f"greensafe-{greensafe.__version__}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "greensafe").rglob("*.py")}
    assert sources <= set(names)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    needed = {re.split(r"[^a-z]", name)[0] for name in metadata.get_all("Requires-Dist", []) if "extra" not in name}
    assert needed == {"pyzmq", "gevent"}


@pytest.mark.check
def test_wheel_works_in_a_clean_venv(wheel: Path, tmp_path: Path) -> None:
    """Installed into a venv that has nothing else, it is imported, and a request is answered."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    program = """
import greensafe, greensafe.green
with greensafe.Server("inproc://s", lambda request: request.body, deadline=5), greensafe.Client("inproc://s") as client:
    print(client.request(b"it works").decode(), greensafe.__version__, greensafe.__file__)
"""
    out = _run(python, "-c", program, cwd=tmp_path)
    assert out.startswith(f"it works {greensafe.__version__} {tmp_path}")


def test_version() -> None:
    """The version stands in setup.cfg and in the package, and is the same."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == greensafe.__version__
    assert greensafe.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_tree_speaks_of_the_project_alone() -> None:
    """No path of a machine and no registry's host is in what is checked in."""
    names = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "setup.cfg", ".ci/run"} <= set(names)
    # Put together here, so that this file does not hold what it looks for.
    forbidden = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]", r"pypi\.o" + "rg", r"npmjs\.o" + "rg")))
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        found = forbidden.search((ROOT / name).read_text(errors="replace"))
        assert not found, f"{name}: {found}"


def test_public_names() -> None:
    """Every name of zmq, and every public name of the design, is there; `green` is the drop-in."""
    import zmq

    for name in zmq.__all__:
        assert hasattr(greensafe, name), name
        assert name in greensafe.__all__
        if name != "__version__":
            assert getattr(greensafe.green, name) is getattr(greensafe, name)
    for name in (
        "Server",
        "Client",
        "serve",
        "supervise",
        "supervised",
        "stats_of",
        "deadline",
        "move_on",
        "shield",
        "LATER",
        "RemoteError",
    ):
        assert name in greensafe.__all__
    assert greensafe.Socket is greensafe.green.Socket
    assert greensafe.device is greensafe.green.device
