"""Damage in a write-ahead log that sqlite takes for its end."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers import run

from greensafe import JournalError
from greensafe.journal import Begin, SqliteJournal, _log
from greensafe.journal._log import log_faults
from greensafe.journal.reading import Reading

PAGE = 4_096
EACH = 24 + PAGE


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "_sleep", lambda seconds: None)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a kill leaves: a file with a log of some commits beside it."""
    source = tmp_path / "source.db"
    with closing(SqliteJournal(source)) as journal:
        journal.open()
        for number in range(10):
            journal.commit([Begin(bytes([number]) * 16, [bytes(100)], since=1.0)])
        for suffix in ("", "-wal"):
            shutil.copy(f"{source}{suffix}", tmp_path / f"requests.db{suffix}")
    return tmp_path / "requests.db"


def wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def flip(path: Path, at: int) -> None:
    """Damage one byte of the log."""
    with wal(path).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def pages(path: Path) -> int:
    return (wal(path).stat().st_size - 32) // EACH


def test_whole(left: Path) -> None:
    """A log that sqlite reads to its end is whole; so is one that is empty, or none."""
    assert list(log_faults(str(left))) == []
    os.truncate(wal(left), 0)
    assert list(log_faults(str(left))) == []
    wal(left).unlink()
    assert list(log_faults(str(left))) == []


@pytest.mark.parametrize("where", ["number", "salt", "sum", "first byte", "last byte"])
def test_a_page_is_damaged(left: Path, where: str) -> None:
    """What is behind it is lost for sqlite, which says nothing; it is counted here."""
    at = 32 + (pages(left) - 5) * EACH
    flip(left, at + {"number": 3, "salt": 8, "sum": 16, "first byte": 24, "last byte": EACH - 1}[where])
    (fault,) = log_faults(str(left))
    assert f"{wal(left)}: sqlite reads nothing from byte {at} on" in fault
    assert "but 5 pages of the same log are there" in fault
    with Reading(str(left)) as reading:
        assert next(iter(reading.faults())) == fault
        assert reading.summary().counts["open"] < 10


def test_the_last_page_is_damaged(left: Path) -> None:
    """It ends a commit, which was lost."""
    flip(left, 32 + (pages(left) - 1) * EACH + 100)
    (fault,) = log_faults(str(left))
    assert "but 1 pages of the same log are there, with the ends of 1 commits" in fault


@pytest.mark.parametrize("at", [0, 8, 16, 24])
def test_the_header_is_damaged(left: Path, at: int) -> None:
    """Then sqlite reads nothing of it at all."""
    flip(left, at)
    (fault,) = log_faults(str(left))
    assert "its header does not check out, and sqlite reads nothing of it" in fault


def test_the_header_is_zeros(left: Path) -> None:
    """As after a `> FILE-wal` under a server, which goes on behind the hole."""
    content = wal(left).read_bytes()
    for hole in (32, 32 + EACH):
        wal(left).write_bytes(bytes(hole) + content[hole:])
        (fault,) = log_faults(str(left))
        assert "its header does not check out" in fault
    wal(left).write_bytes(bytes(32))
    assert list(log_faults(str(left))) == []


def test_the_salts_of_the_last_page_are_damaged(left: Path) -> None:
    """They are not those of an older log: the page's checksum goes on where the one before it ends."""
    flip(left, 32 + (pages(left) - 1) * EACH + 8)
    (fault,) = log_faults(str(left))
    assert "but 1 pages of the same log are there, with the ends of 1 commits" in fault


def test_what_an_older_log_has_left(left: Path) -> None:
    """Pages with other salts are none of this one, however many there are."""
    flipped = bytearray(wal(left).read_bytes())
    for page in range(pages(left) - 5, pages(left)):
        flipped[32 + page * EACH + 8] ^= 1
        flipped[32 + page * EACH + 16] ^= 1
    wal(left).write_bytes(flipped)
    assert list(log_faults(str(left))) == []


def test_what_was_never_committed(left: Path) -> None:
    """The pages of a transaction that a kill has ended, behind those that were written over, are no damage."""
    content = wal(left).read_bytes()
    page = struct.pack(">II8sII", 7, 0, content[16:24], 1, 2) + bytes(PAGE)
    wal(left).write_bytes(content + 3 * page)
    assert list(log_faults(str(left))) == []


def test_a_page_that_is_being_written(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole when it is read again was only being written."""
    at = 32 + (pages(left) - 2) * EACH + 30
    flip(left, at)
    monkeypatch.setattr(_log, "_sleep", lambda seconds: flip(left, at))
    assert list(log_faults(str(left))) == []


def test_a_log_that_always_looks_different_is_being_written(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage stays where it is; it is not asked for ever."""
    places = iter(range(100))
    monkeypatch.setattr(_log, "_read", lambda file, size: _log._Found(next(places), 1, 1, b""))
    assert list(log_faults(str(left))) == []


def test_other_byte_order(left: Path) -> None:
    """A log of a machine that counts the other way is read as well."""
    with wal(left).open("rb") as file:
        little = file.read(4) == b"\x37\x7f\x06\x82"
    assert little == (sys.byteorder == "little")
    content = bytearray(wal(left).read_bytes())
    content[3] ^= 1
    order = ">" if little else "<"
    sums = _log._sum(order, content[:24], (0, 0))
    content[24:32] = struct.pack(">II", *sums)
    for at in range(32, len(content), EACH):
        sums = _log._sum(order, content[at + 24 : at + EACH], _log._sum(order, content[at : at + 8], sums))
        content[at + 16 : at + 24] = struct.pack(">II", *sums)
    wal(left).write_bytes(content)
    assert list(log_faults(str(left))) == []
    with closing(sqlite3.connect(left)) as connection:
        assert connection.execute("SELECT count(*) FROM greensafe_requests").fetchone() == (10,)


def test_of_a_journal_that_is_open_here_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are sqlite's."""
    monkeypatch.setattr(_log, "_look", lambda name: pytest.fail("was read"))
    with closing(SqliteJournal(tmp_path / "requests.db")) as journal:
        journal.open()
        assert list(log_faults(journal.path)) == []


def test_a_log_that_cannot_be_read(left: Path) -> None:
    """Is said."""
    wal(left).unlink()
    wal(left).mkdir()
    with pytest.raises(JournalError, match="-wal: Is a directory"):
        list(log_faults(str(left)))


def test_a_log_that_is_no_file(left: Path) -> None:
    """Is not waited for."""
    wal(left).unlink()
    os.mkfifo(wal(left))
    with pytest.raises(JournalError, match="-wal is not a file"):
        list(log_faults(str(left)))
    left.write_bytes(bytes(4_096))
    with pytest.raises(JournalError, match="is not a sqlite file, or its beginning is damaged"):
        Reading(str(left))


@pytest.mark.parametrize("damage", [lambda path: flip(path, 32 + 3 * EACH + 99), lambda path: flip(path, 9)])
def test_verify(left: Path, damage: Callable[[Path], None]) -> None:
    """The command says it, with code 1, and changes nothing."""
    damage(left)
    before = wal(left).read_bytes()
    done = run([sys.executable, "-m", "greensafe", "journal", "verify", left])
    assert (done.code, done.err) == (1, "")
    assert "sqlite reads nothing" in done.out
    assert wal(left).read_bytes() == before
