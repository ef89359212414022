"""A journal's files while it is open: nobody takes them away, or it is known before anything is said to be stored."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent.monkey
import pytest
from helpers import LONG, MS, ROOT, run, run_python, wait_until

import greensafe
from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Begin, Finish, Known, SqliteJournal, State, _descriptors, _files, commits
from greensafe.journal._lock import holder
from greensafe.journal.reading import Reading, forget, vacuum
from greensafe.sansio.envelope import Kind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no journals in files")

needs_locks = pytest.mark.skipif(not _files._HAS_LOCKS, reason="this system has no locks of open files")

#: Another program that opens the database, reads, and closes it.
OTHER = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT * FROM greensafe_requests'); db.close()"

LIST = """
import json, sqlite3, sys
print(json.dumps([id[-1] for (id,) in sqlite3.connect(sys.argv[1]).execute("SELECT id FROM greensafe_requests")]))
"""

#: One that kills itself with a journal open, and something in it.
KILLED = """
import os, sys
from greensafe.journal import Begin, SqliteJournal
journal = SqliteJournal(sys.argv[1])
journal.open()
journal.commit([Begin(bytes(15) + b"k", [b"body"], since=1.0)])
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture
def journal(path: Path) -> Iterator[SqliteJournal]:
    made = SqliteJournal(path)
    made.open()
    made.commit([begin(0)])
    yield made
    made.close()


@pytest.fixture(params=["guarded", "not guarded"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system has locks of open files, and names of descriptors; asked for before `journal`."""
    if request.param == "not guarded":
        without_guards(monkeypatch)
    return _files._HAS_LOCKS


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    without_guards(monkeypatch)


def without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on any Unix that is not Linux."""
    monkeypatch.setattr(_files, "_HAS_LOCKS", False)
    monkeypatch.setattr(_files, "_NAMES", "/nowhere")


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def begin(number: int) -> Begin:
    return Begin(id_of(number), [b"body"], since=1.0)


def wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def open_and_close(path: Path) -> None:
    run_python(OTHER, str(path))


def stored(path: Path) -> set[int]:
    """The requests that another program finds, which is all that a restarted server would."""
    return set(json.loads(run_python(LIST, str(path)).out))


# What programs do.


@needs_locks
@pytest.mark.parametrize("suffixes", [[""], ["", "-wal", "-shm"]])
def test_a_file_that_is_copied_in_the_servers_process_keeps_its_log(
    journal: SqliteJournal, path: Path, suffixes: list[str]
) -> None:
    """Its close() ends sqlite's lock, and the next program to close the database would delete the log; it does not."""
    for suffix in suffixes:
        path.with_name(path.name + suffix).read_bytes()
    before = wal(path).stat().st_ino
    open_and_close(path)
    assert wal(path).stat().st_ino == before
    journal.commit([begin(1)])
    assert stored(path) == {0, 1}


def test_looking_from_the_servers_process_ends_no_lock(unguarded: None, journal: SqliteJournal, path: Path) -> None:
    """Whatever of the package opens the file there: the log stays, although nothing but sqlite's own lock protects it."""
    journal.commit([begin(1), Finish(id_of(1), Kind.REPLY, [b"answer"])])
    with Reading(str(path)) as reading:
        assert list(reading.faults()) == []
        assert reading.summary().process == os.getpid()
    forget(str(path), id_of(1).hex())
    for act in (vacuum, lambda name: SqliteJournal(name).open()):
        with pytest.raises(JournalError, match="in use by this process"):
            act(str(path))
    open_and_close(path)
    assert wal(path).exists()


def test_looking_often_keeps_no_descriptors(journal: SqliteJournal, path: Path) -> None:
    """What cannot be closed while the server has the file is not opened, however often somebody looks."""
    counts = []
    for _ in range(3):
        with Reading(str(path)) as reading:
            reading.summary()
        counts.append(len(os.listdir("/dev/fd")))
    assert len(set(counts)) == 1  # sqlite keeps one, and uses it again


def test_threads(journal: SqliteJournal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """May look at a file all at the same time: nobody closes what is another's, however they are interrupted."""
    journal.close()
    thread, sleep = gevent.monkey.get_original("threading", "Thread"), gevent.monkey.get_original("time", "sleep")
    failures: list[BaseException] = []

    class Slow:
        def __contains__(self, key: object) -> bool:
            sleep(0.1 * MS)
            return False

    def look() -> None:
        try:
            for _ in range(10):
                _descriptors.let_go(_descriptors.get(str(path), os.O_RDONLY))
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(_descriptors, "_open_files", Slow)
    threads = [thread(target=look) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert not _descriptors._kept


@needs_locks
def test_a_child_that_outlives_its_server(path: Path) -> None:
    """Keeps the journal from nobody."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.wait() == -9
        with closing(SqliteJournal(path)) as made:
            made.open()
            made.commit([begin(1)])
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        process.stdin.close()


ORPHAN = """
import os, sys
from greensafe.journal import SqliteJournal
journal = SqliteJournal(sys.argv[1])
journal.open()
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""


@needs_locks
def test_a_child_that_ends_takes_no_lock_along(path: Path) -> None:
    """A forked child closes what it has inherited; the parent's log stays, also if the child has read the file."""
    result = run_python(FORK, str(path), OTHER)
    assert result.out == "True\n", result.err


FORK = """
import os, subprocess, sys
from greensafe.journal import SqliteJournal
path = sys.argv[1]
journal = SqliteJournal(path)
journal.open()
open(path, "rb").close()
if (child := os.fork()) == 0:
    open(path, "rb").close()
    sys.exit()
os.waitpid(child, 0)
subprocess.run([sys.executable, "-c", sys.argv[2], path], check=True)
print(os.path.exists(path + "-wal"))
journal.close()
"""


def test_a_connection_of_the_programs_own_keeps_its_lock(path: Path) -> None:
    """A journal that is opened and closed beside it in the same process does not end it; its descriptors go later."""
    made = SqliteJournal(path)
    made.open()
    made.close()
    with closing(sqlite3.connect(path)) as own:
        own.execute("SELECT * FROM greensafe_requests").fetchall()
        made.open()
        made.close()
        open_and_close(path)
        assert wal(path).exists()
    made.open()
    made.close()
    assert not _descriptors._kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_log_that_was_deleted_is_noticed_before_anything_is_said_to_be_stored(
    unguarded: None, journal: SqliteJournal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing protects it: what was committed meanwhile is moved to the file, and the journal goes on."""
    path.read_bytes()
    open_and_close(path)
    assert not wal(path).exists()
    assert journal.commit([begin(1)]) == [None]
    assert stored(path) == {0, 1}
    assert journal.commit([begin(2)]) == [None]
    assert stored(path) == {0, 1, 2}
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert f"{wal(path)} was removed or renamed" in record.message


# What people do.


@pytest.mark.parametrize("gone", [["-wal"], ["-shm"], ["-wal", "-shm"]])
@pytest.mark.parametrize("is_idle", [False, True])
def test_files_that_are_removed_by_hand(
    guards: bool, journal: SqliteJournal, path: Path, gone: list[str], is_idle: bool
) -> None:
    """Everything that was ever stored is still there, and others find it; also when nothing is to be stored."""
    for number in range(1, 4):
        journal.commit([begin(number)])
    for suffix in gone:
        path.with_name(path.name + suffix).unlink()
    if is_idle:
        journal.tidy(())
    else:
        journal.commit([begin(4)])
        journal.tidy(())
    assert stored(path) == {0, 1, 2, 3, *([] if is_idle else [4])}
    journal.commit([begin(5)])
    assert 5 in stored(path)
    assert all(path.with_name(path.name + suffix).exists() for suffix in ("-wal", "-shm"))


def test_somebody_has_looked_since_the_log_was_removed(journal: SqliteJournal, path: Path) -> None:
    """Which makes another log, an empty one: it is in nobody's way."""
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    open_and_close(path)
    assert journal.commit([begin(1)]) == [None]
    assert journal.commit([begin(2)]) == [None]
    assert stored(path) == {0, 1, 2}


def test_somebody_has_the_file_open_when_the_log_is_removed(journal: SqliteJournal, path: Path) -> None:
    """Then sqlite does not move it to the file at the end of our connection: that is done before."""
    with subprocess.Popen([sys.executable, "-c", STAYS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wal(path).unlink()
        assert journal.commit([begin(1)]) == [None]
        process.kill()
    assert stored(path) == {0, 1}
    assert journal.commit([begin(2)]) == [None]
    assert stored(path) == {0, 1, 2}


STAYS = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("SELECT * FROM greensafe_requests").fetchall()
print("ready", flush=True)
input()
"""


def test_a_log_that_was_replaced_is_left_alone(journal: SqliteJournal, path: Path) -> None:
    """Nothing is said to be stored, and what another program has written is not overwritten, at the end neither."""
    own = path.with_name("own")
    wal(path).rename(own)
    wal(path).write_bytes(b"somebody's")
    for _ in range(2):
        with pytest.raises(JournalUnavailable, match=r"-wal was replaced by another file .*put back"):
            journal.commit([begin(1)])
    journal.close()
    assert wal(path).read_bytes() == b"somebody's"


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_moved_away_and_put_back(guards: bool, journal: SqliteJournal, path: Path, is_replaced: bool) -> None:
    """Nothing is stored meanwhile; the batch that found out is not done twice when it comes again afterwards."""
    aside = path.with_name("aside")
    path.rename(aside)
    if is_replaced:
        path.write_bytes(b"another")
    batch = [Finish(id_of(0), Kind.REPLY, [b"answer"]), begin(1)]
    for writes in (batch, [], batch):
        with pytest.raises(JournalUnavailable, match=f"{path} was (removed or renamed|replaced)"):
            journal.commit(writes)
    assert not is_replaced or path.read_bytes() == b"another"
    aside.rename(path)
    assert journal.commit(batch) == [None, None]
    assert journal.commit([begin(2)]) == [None]
    assert stored(path) == {0, 1, 2}
    (known,) = journal.commit([begin(0)])
    assert isinstance(known, Known) and known.state is State.DONE


def test_a_file_that_was_replaced_is_left_alone(journal: SqliteJournal, path: Path) -> None:
    """A copy that was put in the place of an open file is not written to; a server that starts then has what it has."""
    other = path.with_name("other.db")
    with closing(SqliteJournal(other)) as made:
        made.open()
        made.commit([begin(7)])
    content = other.read_bytes()
    other.rename(path)
    with pytest.raises(JournalUnavailable, match="was replaced by another file"):
        journal.commit([begin(1)])
    journal.close()
    assert path.read_bytes() == content
    assert wal(path).read_bytes() == b""  # or it would be read into the copy
    journal.open()
    assert [known is not None for known in journal.commit([begin(1), begin(7)])] == [False, True]


def test_a_file_that_is_moved_and_closed(journal: SqliteJournal, path: Path) -> None:
    """Takes along all that was stored: nothing is left in a log, to be read into another file of that name."""
    moved = path.with_name("moved.db")
    path.rename(moved)
    journal.close()
    assert wal(path).read_bytes() == b""
    assert stored(moved) == {0}


def test_another_batch_than_the_doubtful_one(journal: SqliteJournal, path: Path) -> None:
    """Is done as any: only the very same writes count as the same."""
    aside = path.with_name("aside")
    path.rename(aside)
    with pytest.raises(JournalUnavailable):
        journal.commit([begin(1)])
    aside.rename(path)
    assert journal.commit([]) == []
    (known,) = journal.commit([begin(1)])
    assert isinstance(known, Known)


def test_a_server_says_so(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a request it is unhealthy and has logged it once; when the file is back it goes on by itself."""
    monkeypatch.setattr(commits, "TIDY", 0.01)
    monkeypatch.setattr(commits, "ASK", 0.01)
    with greensafe.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=LONG, journal=path) as server:
        aside = path.with_name("aside")
        path.rename(aside)
        wait_until(lambda: not server.healthy)
        assert server.stats.journal is not None and "was removed or renamed" in server.stats.journal.error
        aside.rename(path)
        wait_until(lambda: server.healthy)
    said = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1 and "the journal cannot be written" in said[0], said


# The lock file.


@needs_locks
def test_a_lock_file_that_was_removed_lets_nobody_in(
    journal: SqliteJournal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a server nor who would change the file; it is made again, which is logged."""
    lock = path.with_name("requests.db.lock")
    lock.unlink()
    shown = run([sys.executable, "-m", "greensafe", "journal", "ls", path])
    assert "process unknown" in shown.out
    refused = run_python(
        "import sys; from greensafe.journal import SqliteJournal; SqliteJournal(sys.argv[1]).open()", str(path)
    )
    assert "JournalError" in refused.err and "is in use by another server, whose lock file was removed" in refused.err
    for arguments in (["forget", id_of(0).hex()], ["vacuum"]):
        command = [sys.executable, "-m", "greensafe", "journal", *arguments, path]
        assert run(command).code == 1
    assert holder(str(path)) == 0
    journal.tidy(())
    assert lock.read_text() == f"{os.getpid()}\n"
    assert holder(str(path)) == os.getpid()
    assert "its lock file was removed or replaced" in caplog.text


def test_a_lock_that_somebody_else_has_taken(unguarded: None, journal: SqliteJournal, path: Path) -> None:
    """Where only the lock file protects it: nothing is stored as long as another server has it, then all goes on."""
    lock = path.with_name("requests.db.lock")
    lock.unlink()
    program = "import sys; from greensafe.journal._lock import Lock; Lock(sys.argv[1]); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            for act in (lambda: journal.commit([begin(1)]), lambda: journal.tidy(())):
                with pytest.raises(JournalUnavailable, match=f"in use by process {process.pid}: .*lock file was removed"):
                    act()
        finally:
            process.kill()
    assert journal.commit([begin(1)]) == [None]
    assert stored(path) == {0, 1}


def test_anothers_lock_file_is_not_removed(unguarded: None, journal: SqliteJournal, path: Path) -> None:
    """By a server that ends, and whose own was replaced."""
    lock = path.with_name("requests.db.lock")
    lock.unlink()
    lock.write_bytes(b"1\n")
    journal.close()
    assert lock.read_bytes() == b"1\n"


def test_a_lock_file_that_was_put_back(unguarded: None, journal: SqliteJournal, path: Path) -> None:
    """Is the one that is locked: all goes on as before, and the connection is not replaced again and again."""
    lock, aside = path.with_name("requests.db.lock"), path.with_name("aside")
    lock.rename(aside)
    lock.mkdir()
    with pytest.raises(JournalUnavailable):
        journal.commit([begin(1)])
    lock.rmdir()
    aside.rename(lock)
    assert journal.commit([begin(1)]) == [None]
    before = journal._connection
    journal.tidy(())
    assert journal._connection is before


def test_a_lock_file_that_cannot_be_looked_at(journal: SqliteJournal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system says is a JournalError, and leaves nothing open."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refuse)
        with pytest.raises(JournalUnavailable, match=r"cannot be locked: .*\.lock: Input/output error"):
            journal.tidy(())
    journal.tidy(())
    journal.close()
    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        with pytest.raises(JournalError, match=r"cannot be locked: .*\.lock: Input/output error"):
            journal.open()
    assert len(os.listdir("/dev/fd")) == before
    journal.open()


@needs_locks
def test_another_name_of_the_file(journal: SqliteJournal, path: Path) -> None:
    """A hard link has a lock file of its own, and is refused all the same."""
    other = path.with_name("other.db")
    other.hardlink_to(path)
    with pytest.raises(JournalError, match="in use by this process"):
        SqliteJournal(other).open()
    refused = run_python(
        "import sys; from greensafe.journal import SqliteJournal; SqliteJournal(sys.argv[1]).open()", str(other)
    )
    assert "which has the file by another name" in refused.err


@needs_locks
def test_a_program_that_has_the_file_for_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is waited for, and said if that takes long."""
    with closing(SqliteJournal(path)) as made:
        made.open()
    fd = _descriptors.get(str(path), os.O_RDWR)
    assert _files._lock(fd, "write", _files._SHARED_FIRST, _files._SHARED_SIZE)
    monkeypatch.setattr("greensafe.journal.sqlite.BUSY", 10 * MS)
    with pytest.raises(JournalError, match="another program is writing to it, and did not end in time"):
        made.open()
    _files._release(fd)
    made.open()
    made.close()


@pytest.mark.parametrize("how", ["VACUUM INTO 'copy.db'", "PRAGMA journal_mode = DELETE"])
def test_a_file_without_a_log(path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """As sqlite makes copies, or a person has left it, gets one when it is opened."""
    monkeypatch.chdir(path.parent)
    with closing(SqliteJournal(path)) as made:
        made.open()
        made.commit([begin(1)])
    with closing(sqlite3.connect(path)) as own:
        own.execute(how)
    if (copy := path.with_name("copy.db")).exists():
        copy.rename(path)
    with closing(SqliteJournal(path)) as made:
        made.open()
        assert [known is not None for known in made.commit([begin(1), begin(2)])] == [True, False]
        assert wal(path).exists()


@needs_locks
def test_memory_that_is_not_what_stands_there(path: Path) -> None:
    """A connection of the program's own has kept the one that was removed, another program has made another: nothing is stored.

    Both would write to the log, and neither know of what the other writes.
    """
    with closing(SqliteJournal(path)) as made:
        made.open()
    with closing(sqlite3.connect(path)) as own:
        own.execute("SELECT * FROM greensafe_requests").fetchall()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        with subprocess.Popen([sys.executable, "-c", STAYS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            with pytest.raises(JournalUnavailable, match="-shm is not what was just opened"):
                made.open()
            process.kill()
    made.open()
    made.close()


def test_no_descriptor_is_left_to_see_which_are_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what is kept stays open: to close it might end the lock of a connection of the program's own."""
    with closing(SqliteJournal(path)) as made:
        made.open()
    with closing(sqlite3.connect(path)) as own:
        own.execute("SELECT * FROM greensafe_requests").fetchall()
        made.open()
        made.close()
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", raise_too_many)
            assert _descriptors.open_files() is None
            _descriptors.sweep()
        open_and_close(path)
        assert wal(path).exists()
    _descriptors.sweep()
    assert not _descriptors._kept


def raise_too_many(name: str) -> list[str]:
    raise OSError(24, "Too many open files", name)


def test_a_list_of_the_standard_descriptors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells nothing."""
    monkeypatch.setattr(os, "listdir", lambda name: ["0", "1", "2"])
    assert _descriptors.open_files() is None


@needs_locks
def test_locks_that_fail(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no descriptor behind; what cannot be let go ends with its descriptor."""
    with closing(SqliteJournal(path)) as made:
        made.open()
    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_set", refuse)
        with pytest.raises(JournalError, match="a lock cannot be had"):
            made.open()
    assert len(os.listdir("/dev/fd")) == before
    made.open()
    with monkeypatch.context() as patch:
        patch.setattr(_files, "_set", refuse)
        made.close()
    assert len(os.listdir("/dev/fd")) == before


def refuse(*args: object) -> None:
    raise OSError(5, "Input/output error")


def test_a_killed_server_is_in_nobodys_way(path: Path) -> None:
    """What it had locked is free; what it has left is taken over."""
    assert run_python(KILLED, str(path)).code == -9
    with closing(SqliteJournal(path)) as made:
        made.open()
        (known,) = made.commit([Begin(bytes(15) + b"k", [b"body"], since=1.0)])
        assert known.state is State.OPEN


def test_no_descriptor_stays(path: Path) -> None:
    """However often it is opened and closed, and another connection was there."""
    made: Any = SqliteJournal(path)
    made.open()
    made.close()
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        made.open()
        with closing(sqlite3.connect(path)) as own:
            own.execute("SELECT * FROM greensafe_requests").fetchall()
        made.close()
    assert len(os.listdir("/dev/fd")) == before
