"""What is made beside a journal, and what stands there already."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from greensafe import JournalError
from greensafe.journal import Begin, SqliteJournal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no journals in files")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def use(path: Path) -> dict[str, int]:
    """Open it, store something, and close it; returns the modes that the files had meanwhile."""
    with closing(SqliteJournal(path)) as journal:
        journal.open()
        journal.commit([Begin(bytes(16), [b"body"], since=1.0)])
        return {file.name: stat.S_IMODE(file.lstat().st_mode) for file in path.parent.iterdir()}


def test_modes(path: Path, umask: None) -> None:
    """Whatever the umask, what is made is its owner's alone."""
    names = ["requests.db", "requests.db-shm", "requests.db-wal", "requests.db.lock"]
    for _ in range(2):
        assert dict(sorted(use(path).items())) == dict.fromkeys(names, 0o600)


def test_what_is_wider_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once each time it is opened, with the names; it is left as it is. The lock file of a version before is made narrower."""
    use(path)
    assert not caplog.records
    path.chmod(0o640)
    path.with_name("requests.db.lock").touch(0o644)
    assert use(path)["requests.db.lock"] == 0o600
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for expected in (f"{path} (0640)", f"{path}-wal (0640)", f"{path}-shm (0640)", "chmod 600"):
        assert expected in record.message
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_for_everybody_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who may write there can put files of theirs in the place of a journal's."""
    path.parent.chmod(0o777)
    use(path)
    assert "every user of this machine may write to its folder (0777)" in caplog.text


def linked(path: Path) -> None:
    path.with_name("precious").write_bytes(b"precious")
    path.with_name("requests.db.lock").symlink_to(path.with_name("precious"))


def linked_to_nothing(path: Path) -> None:
    path.with_name("requests.db.lock").symlink_to(path.with_name("nothing"))


def linked_hard(path: Path) -> None:
    path.with_name("precious").write_bytes(b"123\n")
    path.with_name("requests.db.lock").hardlink_to(path.with_name("precious"))


def somebodys(path: Path) -> None:
    path.with_name("requests.db.lock").write_bytes(b"precious")


def long(path: Path) -> None:
    path.with_name("requests.db.lock").write_bytes(b"1" * 1_000)


def pipe(path: Path) -> None:
    os.mkfifo(path.with_name("requests.db.lock"))


def folder(path: Path) -> None:
    path.with_name("requests.db.lock").mkdir()


@pytest.mark.parametrize("make", [linked, linked_to_nothing, linked_hard, somebodys, long, pipe, folder])
def test_what_stands_in_the_lock_files_place(path: Path, make: Callable[[Path], None]) -> None:
    """If it is no lock file it is neither followed, truncated, waited for nor removed: the journal is not opened."""
    make(path)
    before = contents(path)
    with pytest.raises(JournalError, match=r"cannot be locked: .*requests\.db\.lock"):
        SqliteJournal(path).open()
    assert contents(path) == before


def contents(path: Path) -> dict[str, bytes | None]:
    return {file.name: file.read_bytes() if file.is_file() else None for file in path.parent.iterdir()}


def test_a_lock_file_that_was_left(path: Path) -> None:
    """By a kill, or by a disk that was full, is taken over."""
    for content in (b"", b"123", b"123\n"):
        path.with_name("requests.db.lock").write_bytes(content)
        use(path)
        assert sorted(contents(path)) == ["requests.db"]


def with_log(path: Path) -> None:
    path.with_name("precious").write_bytes(b"")
    path.with_name("requests.db-wal").symlink_to(path.with_name("precious"))


def test_a_log_that_is_a_link(path: Path) -> None:
    """Is not followed: whoever may put one there would have all requests written to a file of theirs."""
    use(path)
    with_log(path)
    with pytest.raises(JournalError):
        use(path)
    assert path.with_name("precious").read_bytes() == b""


# The draft of a new one.


def database(name: Path) -> None:
    with closing(sqlite3.connect(name)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def copy_of_a_journal(name: Path) -> None:
    with closing(SqliteJournal(name)) as journal:
        journal.open()
        journal.commit([Begin(bytes(16), [b"body"], since=1.0)])


@pytest.mark.parametrize(
    "make",
    [
        lambda name: name.write_bytes(b"precious"),
        database,
        copy_of_a_journal,
        Path.mkdir,
        lambda name: os.mkfifo(name),
        lambda name: name.symlink_to("nothing"),
        lambda name: name.with_name(name.name + "-journal").write_bytes(b"precious"),
    ],
    ids=["text", "database", "copy", "folder", "pipe", "link", "sqlite's"],
)
def test_what_stands_in_the_drafts_place(path: Path, make: Callable[[Path], None]) -> None:
    """Stays as it is, be it a copy that is about to be put in the journal's place; that of a version before was called .new."""
    make(path.with_name("requests.db.new"))
    before = contents(path)
    use(path)
    after = contents(path)
    assert after.pop("requests.db")
    assert after == before


def test_a_file_that_is_put_there_while_a_journal_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not written over, and nothing is left of the draft."""

    def put(draft: str, connection: sqlite3.Connection) -> None:
        path.write_bytes(b"precious")

    monkeypatch.setattr("greensafe.journal._schema.set_wal", put)
    with pytest.raises(JournalError, match="somebody has just put a file there"):
        use(path)
    assert contents(path) == {"requests.db": b"precious"}


def test_a_draft_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves nothing, also where nothing can be removed any more."""
    monkeypatch.setattr("greensafe.journal._schema.migrate", fail)
    with pytest.raises(JournalError, match="no table today"):
        use(path)
    assert contents(path) == {}
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(JournalError, match="no table today"):
        use(path)


def fail(connection: sqlite3.Connection) -> None:
    raise sqlite3.OperationalError("no table today")


def refuse(name: str) -> None:
    raise PermissionError(13, "Permission denied", name)
