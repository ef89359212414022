"""docs/testing.md: what it shows is run, and what it names is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from helpers import HANG, ROOT, run_python

from greensafe import testing

TEXT = (ROOT / "docs/testing.md").read_text()


def test_its_python_is_a_test_file_that_passes(tmp_path: Path) -> None:
    """All blocks together are run by pytest, warnings as errors: 6 tests pass."""
    file = tmp_path / "test_weather.py"
    file.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)))
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = run_python(
        command,
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "--rootdir",
        str(tmp_path),
        str(file),
        limit=6 * HANG,
    )
    assert result.code == 0, result.out + result.err
    assert "6 passed" in result.out


def test_its_table_is_whole() -> None:
    """Every public method and property of the link stands in it; the module's head has the same commands."""
    public = {name for name, _ in inspect.getmembers(testing.FaultyLink) if not name.startswith("_")}
    commands = set(re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE))
    assert public - commands - {"close", "closed", "heal"} == set(re.findall(r"link\.(\w+)`", TEXT)) - {"accepted", "endpoint"}
    head = inspect.getdoc(inspect.getmodule(testing.FaultyLink)) or ""
    assert commands == set(re.findall(r"^ {4}(\w+)  ", head, re.MULTILINE)) - {"command"}


def test_public_names() -> None:
    """What the package offers is what it says."""
    assert testing.__all__ == ["Direction", "FaultyLink", "JournalConformance", "ManualClock"]
    assert all(hasattr(testing, name) for name in testing.__all__)
