"""What is left of a journal when the power fails at any moment?

A process uses a journal with a library loaded that writes down each change that it makes to the files: writes, truncations,
syncs, renames and removals, with the moments at which a commit had returned. From that states are made in which the disk
could be at a moment:

* What was synced is there. What was not may be there or not, write by write and 512-byte sector by sector, in any combination;
  instead of a sector there may be zeros or noise. A file may have grown without its contents.
* Renames, removals and new names are there in their order, as many as it happens to be, and all of them when their folder was
  synced: not before, though file systems do more.

In each of these the journal is opened, and looked at. Not covered: a disk that says it has synced what it has not, and one that
damages what was synced.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers import LONG, ROOT

from greensafe.journal import Begin, Finish, Known, SqliteJournal, State

pytestmark = [pytest.mark.check, pytest.mark.timeout(600)]

SOURCE = Path(__file__).parent / "powerloss" / "recorder.c"

SECTOR = 512

#: Requests of one batch, and batches.
WIDTH = 4
BATCHES = 40

PROGRAM = """
import os, sys
from greensafe.journal import sqlite
sys.path.insert(0, sys.argv[4])
from test_power_loss import batch
sqlite._CHECKPOINT = 16  # so that the log is moved to the file, and begun again, many times
path, synchronous, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
says = os.open(os.path.join(os.path.dirname(path), "returned"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
journal = sqlite.SqliteJournal(path, synchronous=synchronous)
journal.open()
for number in range(batches):
    if number == batches // 2:
        journal.close()
        journal.open()
    journal.commit(batch(number))
    os.write(says, b"%4d\\n" % number)
journal.close()
"""


def batch(number: int) -> list[Begin | Finish]:
    """What the process commits: some requests begin, those of the batch before are answered."""
    begun: list[Begin | Finish] = [Begin(id, [id * 40], since=1.0) for id in ids(number)]
    return [*begun, *(Finish(id, 0x81, [id * 30]) for id in ids(number - 1))]


def ids(number: int) -> list[bytes]:
    return [bytes([number + 1, at]) * 8 for at in range(WIDTH)] if number >= 0 else []


# What was recorded.


@dataclass(frozen=True)
class Change:
    """One of a process's changes: w(rite), t(runcate), s(ync), r(ename), u(nlink)."""

    kind: str
    name: str
    second: str = ""
    offset: int = 0
    data: bytes = b""


def read(log: bytes, folder: Path) -> Iterator[Change]:
    head = struct.Struct("=cIIQQ")
    at = 0
    while at < len(log):
        kind, first, second, offset, length = head.unpack_from(log, at)
        at += head.size
        names = log[at : at + first].decode(), log[at + first : at + first + second].decode()
        at += first + second
        yield Change(
            kind.decode(), *(os.path.relpath(name, folder) if name else "" for name in names), offset, log[at : at + length]
        )
        at += length


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a place: thousands of states are made, and each is synced by who opens it."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as name:
        yield Path(os.path.realpath(name))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built here."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("recorder") / "recorder.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SOURCE, "-ldl"], check=True, timeout=LONG)
    return library


def record(recorder: Path, folder: Path, synchronous: str) -> list[Change]:
    """Run the process; returns what it has done to the files. What was not recorded would show in the files that are left."""
    watched = folder / "watched"
    watched.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "LD_PRELOAD": str(recorder),
        "RECORD_FOLDER": str(watched),
        "RECORD_LOG": str(folder / "log"),
    }
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(watched / "requests.db"),
        synchronous,
        str(BATCHES),
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    changes = [change for change in read((folder / "log").read_bytes(), watched) if not change.name.endswith((".lock", "-shm"))]
    disk = Disk()
    for change in changes:
        disk.apply(change)
    left = {name: bytes(file.now) for name, file in disk.names_now().items()}
    assert left == {file.name: file.read_bytes() for file in watched.iterdir()}
    return changes


# What a disk may have of it.


@dataclass
class File:
    """What is durable, what a process sees, and the writes and truncations between the two."""

    durable: bytearray = field(default_factory=bytearray)
    now: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.pending.append(change)
        _do(self.now, change)

    def sync(self) -> None:
        self.durable, self.pending = bytearray(self.now), []

    def lost(self, source: random.Random, keep: float, noise: float) -> bytes:
        """What may be left: `keep` and `noise` are how likely a sector is there, and something else in its place."""
        left = bytearray(self.durable)
        for change in self.pending:
            if change.kind == "t":
                if source.random() < keep:
                    _do(left, change)
                continue
            for at in range(0, len(change.data), SECTOR):
                sector = change.data[at : at + SECTOR]
                if source.random() < noise:
                    sector = source.choice([bytes(len(sector)), source.randbytes(len(sector))])
                elif source.random() >= keep:
                    continue
                _do(left, Change("w", "", "", change.offset + at, sector))
        return bytes(left)


def _do(content: bytearray, change: Change) -> None:
    end = change.offset + len(change.data)
    if change.kind == "t":
        del content[change.offset :]
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    content[change.offset : end] = change.data


class Disk:
    """A folder; its names are durable when it was synced."""

    def __init__(self) -> None:
        self.files: list[File] = []
        self.names: dict[str, File] = {}
        self.pending: list[tuple[str, str, File | None]] = []
        self.returned = -1

    def apply(self, change: Change) -> None:
        now = self.names_now()
        if change.kind == "r":
            self.pending.append((change.name, change.second, now[change.name]))
        elif change.kind == "u":
            self.pending.append((change.name, "", None))
        elif change.kind == "s" and change.name == ".":
            self.names, self.pending = now, []
        elif change.kind == "s":
            now[change.name].sync()
        else:
            if change.name not in now:
                self.pending.append(("", change.name, File()))
            self.names_now()[change.name].change(change)
            if change.name == "returned":
                self.returned = int(change.data)

    def names_now(self, count: int | None = None) -> dict[str, File]:
        """The names with so many of the changes that are not durable; by default all."""
        names = dict(self.names)
        for old, new, file in self.pending[:count]:
            names.pop(old, None)
            if file is not None:
                names[new] = file
        return names

    def write(self, folder: Path, source: random.Random, keep: float, noise: float) -> None:
        """Make the folder as it may be after a loss of power."""
        count = len(self.pending) if keep == 1.0 else 0 if keep == 0.0 else source.randint(0, len(self.pending))
        for name, file in self.names_now(count).items():
            if name != "returned":
                (folder / name).write_bytes(file.lost(source, keep, noise))


#: How likely a sector that was not synced is there, and noise.
FATES = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.9, 0.1), (0.3, 0.3)]


def states(changes: list[Change], folder: Path, seed: int) -> Iterator[tuple[str, Path, int]]:
    """Moments around each sync, rename, removal and return, and some others, with each fate; and what had returned then."""
    source = random.Random(seed)
    disk = Disk()
    made = 0
    for number, change in enumerate(changes):
        following = changes[number + 1].kind if number + 1 < len(changes) else "s"
        disk.apply(change)
        if change.kind == following == "w" and change.name != "returned" and source.random() > 0.05:
            continue
        for keep, noise in FATES:
            made += 1
            at = folder / str(made)
            at.mkdir()
            disk.write(at, source, keep, noise)
            yield f"seed {seed}: after change {number} ({change.kind} {change.name}), fate {keep}, {noise}", at, disk.returned
            shutil.rmtree(at)


def there(journal: SqliteJournal) -> list[bool]:
    """Which batches are there; each has to be whole, and right."""
    known: list[Known | None] = journal.commit([Begin(id, [id * 40], since=1.0) for at in range(BATCHES) for id in ids(at)])
    groups = [known[at * WIDTH : (at + 1) * WIDTH] for at in range(BATCHES)]
    found = [None not in group for group in groups]
    for number, group in enumerate(groups):
        is_answered = number + 1 < BATCHES and found[number + 1]
        for id, each in zip(ids(number), group):
            expected = (State.DONE, True, [id * 30]) if is_answered else (State.OPEN, True, []) if found[number] else None
            assert (each and (each.state, each.is_same, list(each.reply))) == expected, f"batch {number} is there by halves"
    return found


def examine(folder: Path) -> list[bool]:
    """Open what is left, as a server would."""
    with closing(SqliteJournal(folder / "requests.db", synchronous="NORMAL")) as journal:
        journal.open()
        found = there(journal)
        assert journal._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return found


def test_full_loses_nothing_that_has_returned(recorder: Path, folder: Path) -> None:
    """With synchronous="FULL" every batch whose commit had returned is there, whole, whatever the disk has of the rest."""
    changes = record(recorder, folder, "FULL")
    assert sum(change.kind == "s" and change.name == "requests.db" for change in changes) > 5, "no checkpoints"
    count = 0
    for label, place, returned in states(changes, folder, seed=6):
        found = examine(place)
        assert found[: returned + 1] == [True] * (returned + 1), (label, returned, found)
        assert not any(found[returned + 2 :]), (label, returned, found)
        count += 1
    assert count > 500


def test_normal_loses_the_latest_at_most(recorder: Path, folder: Path) -> None:
    """With synchronous="NORMAL" what is there are the first batches, each whole; the latest may be missing, and are here."""
    changes = record(recorder, folder, "NORMAL")
    losses = []
    for label, place, returned in states(changes, folder, seed=7):
        found = examine(place)
        assert found == sorted(found, reverse=True), (label, found)
        losses.append(returned + 1 - sum(found))
    assert max(losses) > 0


def test_the_simulation_finds_a_missing_sync(recorder: Path, folder: Path) -> None:
    """A process that syncs its log at no commit is found out: the simulation does take away what was not synced."""
    changes = [
        change for change in record(recorder, folder, "FULL") if not (change.kind == "s" and change.name.endswith("-wal"))
    ]
    for _, place, returned in states(changes, folder, seed=8):
        try:
            found = examine(place)
        except Exception:
            return
        if not all(found[: returned + 1]):
            return
    raise AssertionError("nobody noticed")
