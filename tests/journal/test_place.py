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
from greensafe.journal._schema import APPLICATION

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


def draft_of_a_journal(name: Path) -> None:
    with closing(sqlite3.connect(name)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION}")


@pytest.mark.parametrize(
    "make", [Path.touch, lambda name: name.write_bytes(bytes(8_192)), draft_of_a_journal], ids=["empty", "zeros", "begun"]
)
def test_what_a_crash_has_left(path: Path, make: Callable[[Path], None]) -> None:
    """Of a file that was being made is made anew, and what sqlite had beside it goes too."""
    make(path.with_name("requests.db.new"))
    path.with_name("requests.db.new-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(100))
    path.with_name("requests.db.new-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(100))
    path.with_name("requests.db.new-shm").write_bytes(bytes(32_768))
    use(path)
    assert sorted(contents(path)) == ["requests.db"]


def database(name: Path) -> None:
    with closing(sqlite3.connect(name)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def draft_by_another_name(name: Path) -> None:
    draft_of_a_journal(name)
    name.with_name("precious").hardlink_to(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: name.write_bytes(b"precious"),
        database,
        draft_by_another_name,
        Path.mkdir,
        lambda name: os.mkfifo(name),
        lambda name: name.symlink_to("nothing"),
        lambda name: name.write_bytes(bytes(2**20 + 1)),
        lambda name: name.with_name(name.name + "-journal").write_bytes(b"precious"),
    ],
    ids=["text", "database", "hard link", "folder", "pipe", "link", "large", "sqlite's"],
)
def test_what_no_crash_has_left(path: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    """Stays as it is, and is logged; the journal is made by another name."""
    make(path.with_name("requests.db.new"))
    before = contents(path)
    use(path)
    after = contents(path)
    assert after.pop("requests.db")
    assert after == before
    assert "was not left by one; it stays" in caplog.text
