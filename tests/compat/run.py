"""Do pyzmq's own tests of zmq.green pass with greensafe in its place?

    python tests/compat/run.py [MODE ...] [--module MODULE]

The tests come from the source distribution of the pyzmq that is installed, which pip fetches once into `.compat/`; they are
pyzmq's and no part of this project. `substitute.py` puts greensafe (or zmq.green itself, to compare) in its place. Modes:

    green   the tests that pyzmq runs on zmq.green (default)
    monkey  the same after gevent.monkey.patch_all()
    libuv   the same on gevent's other loop
    all     every test; those that are not green stay on plain zmq
    forced  every test, and those that are not green are given the module's Context, which pyzmq never does

Needs the extra `compat`. Exits with 1 if a mode had a failure beyond `substitute.DEVIATIONS`; `substitute.UNFIT` is not run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import zmq

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: What each mode adds to the environment; `substitute.py` reads the names that begin with COMPAT.
MODES = {
    "green": {},
    "monkey": {"COMPAT_MONKEY": "1"},
    "libuv": {"GEVENT_LOOP": "libuv"},
    "all": {"COMPAT_SCOPE": "all"},
    "forced": {"COMPAT_SCOPE": "forced"},
}

#: Seconds that one test may take: the one that sends 2 GiB takes ten.
TEST_TIMEOUT = 60

#: Tests of how pyzmq was built, or of Windows, are not about its sockets.
CHOSEN = "not wheel and not new_console"


def suite() -> Path:
    """The folder with pyzmq's tests, fetched if it is not there yet."""
    version = zmq.pyzmq_version()
    folder = ROOT / ".compat" / f"pyzmq-{version}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        print(f"fetching the source distribution of pyzmq {version}", flush=True)
        with TemporaryDirectory(dir=folder.parent) as name:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--no-binary", "pyzmq", "--dest", name, f"pyzmq=={version}"], check=True)
            subprocess.run(["tar", "-xzf", next(Path(name).glob("pyzmq-*.tar.gz")), "-C", name], check=True)
            # Not the package: it would be imported instead of the installed one.
            made, source = Path(name, "suite"), Path(name, f"pyzmq-{version}")
            made.mkdir()
            for part in ("tests", "pytest.ini"):
                (source / part).rename(made / part)
            made.rename(folder)
    return folder


def run(mode: str, module: str) -> int:
    """Run the tests in one mode; pytest's exit status."""
    added = {"COMPAT_MODULE": module, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-rx", "-p", "substitute", "-p", "no:cacheprovider", "-m", CHOSEN, "--disable-warnings"]
    # Not by signal: the tests use SIGALRM themselves. So one that hangs ends the run, and its stack is shown.
    options += ["--timeout", str(TEST_TIMEOUT), "--timeout-method", "thread"]
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=suite(), env={**os.environ, **added, **MODES[mode]}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modes", nargs="*", default=["green"], metavar="MODE", help=" ".join(MODES))
    parser.add_argument("--module", default="greensafe", help="what stands in for zmq.green (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"no such mode: {' '.join(unknown)}")
    statuses = {}
    for mode in options.modes:
        print(f"== {options.module}: {mode}", flush=True)
        statuses[mode] = run(mode, options.module)
    failed = [mode for mode, status in statuses.items() if status]
    print(f"== {options.module}: {'failed in ' + ' '.join(failed) if failed else 'passed in ' + ' '.join(statuses)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
