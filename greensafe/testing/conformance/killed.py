"""A process that commits until it is killed, and the check of what it has stored.

The process makes its journal as the tests do, with the class that it finds by its name in their file. It commits one batch
after the other, each of which answers the requests of the one before and begins as many, and writes the number of each whose
commit has returned.

It does not know which batches have to be there: `has_batch` says of one whether it is, and fails if it is there by halves.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ...journal.base import Journal
from ...sansio.records import State
from .asking import ask, begin, finish

__all__ = ["has_batch", "kill_while_it_commits"]

_PROGRAM = f"import sys; from {__name__} import _commit_until_killed as run; run(*sys.argv[1:])"

#: Requests that one commit of the process that is killed begins, and the next one answers.
_WIDTH = 20


def kill_while_it_commits(suite: type[Any], folder: Path, lines: int, pause: float) -> int:
    """Have a process commit, and kill it when so many commits have returned; return the number of the last that had."""
    command = [sys.executable, "-c", _PROGRAM, inspect.getfile(suite), suite.__qualname__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            seen = [child.stdout.readline() for _ in range(lines)]
            time.sleep(pause)
        finally:
            child.kill()
        seen += child.stdout.readlines()
        assert seen[0], child.stderr.read().decode()
    return max(int(line) for line in seen if line.endswith(b"\n"))


def _commit_until_killed(file: str, name: str, folder: str) -> None:
    """Commit one batch after the other, and say so each time; not for ever, in case nobody kills."""
    spec = importlib.util.spec_from_file_location("_conformance_of", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    journal: Journal = getattr(module, name)().make(Path(folder))
    journal.open()
    for number in range(20_000):
        journal.commit([*(finish(each, b"%d" % each) for each in _of(number - 1)), *(begin(each) for each in _of(number))])
        os.write(1, b"%d\n" % number)


def _of(number: int) -> range:
    return range(max(number, 0) * _WIDTH, (number + 1) * _WIDTH)


def has_batch(journal: Journal, number: int) -> bool:
    """Return whether that process's batch is there: its requests begun, those of the one before answered."""
    writes = [begin(each) for each in (*_of(number - 1), *_of(number))]
    known = ask(journal, writes)
    begun = [each is not None for each in known[-_WIDTH:]]
    answered = [each is not None and each.state is State.DONE for each in known[:-_WIDTH]]
    assert len({*begun, *answered}) == 1, f"batch {number} is there by halves: {begun} {answered}"
    return begun[0]
