"""SqliteJournal: the rules of a journal, and what only a file can go through."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from helpers import LONG, ROOT, run_python

from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Ack, Begin, Effect, Failed, Finish, Journal, Known, SqliteJournal, State, Step, _schema, sqlite
from greensafe.journal._clock import Moment
from greensafe.journal._tidying import MOST
from greensafe.journal.reading import Reading
from greensafe.journal.sqlite import MARGIN
from greensafe.testing.conformance.suite import JournalConformance

ID = bytes(range(16))
BODY = [b"body"]


class TestConformance(JournalConformance):
    """It keeps the rules of a journal."""

    def make(self, folder: Path, **limits: Any) -> Journal:
        return SqliteJournal(folder / "requests.db", **limits)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture
def journal(path: Path) -> Iterator[SqliteJournal]:
    made = SqliteJournal(path)
    made.open()
    yield made
    made.close()


def begin(number: int = 0, **more: Any) -> Begin:
    return Begin(number.to_bytes(16, "big"), BODY, **{"since": 1.0, **more})


def store_one(path: Path) -> None:
    made = SqliteJournal(path)
    made.open()
    made.commit([Begin(ID, BODY, since=1.0)])
    made.close()


def look(path: Path) -> Known:
    made = SqliteJournal(path)
    made.open()
    (known,) = made.commit([Begin(ID, BODY, since=1.0)])
    made.close()
    assert isinstance(known, Known)
    return known


def reader(path: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True))


# What stands at its place.


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def foreign_named(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 77")


def foreign_without_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("DROP TABLE theirs")


def newer(path: Path) -> None:
    store_one(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def truncated(path: Path) -> None:
    store_one(path)
    os.truncate(path, path.stat().st_size - 4_096)


def cut_in_its_header(path: Path) -> None:
    store_one(path)
    os.truncate(path, 50)


def overwritten_at_its_beginning(path: Path) -> None:
    store_one(path)
    with path.open("r+b") as file:
        file.write(b"x" * 100)


def with_a_damaged_schema(path: Path) -> None:
    store_one(path)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3_900)


def with_a_table_missing(path: Path) -> None:
    store_one(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE greensafe_steps")


def log_alone(path: Path) -> None:
    path.with_name(path.name + "-wal").write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "is not a file: give the name of one"),
        (Path.touch, "is empty, .* remove it for a new one"),
        (lambda path: path.write_text("not a database, but long enough to be one" * 100), "not a sqlite file.*another name"),
        (foreign, "another program.*another name"),
        (foreign_named, "another program.*another name"),
        (foreign_without_tables, "another program.*another name"),
        (newer, "version 99, this greensafe knows 1 to 1: .*newer"),
        (truncated, "malformed; the file is damaged.*verify"),
        (cut_in_its_header, "not a sqlite file, or its beginning is damaged"),
        (overwritten_at_its_beginning, "not a sqlite file, or its beginning is damaged"),
        (with_a_damaged_schema, "malformed; the file is damaged.*verify"),
        (with_a_table_missing, "greensafe_steps"),
        (log_alone, "-wal is, which holds its latest requests: put the file back"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_as_it_is(path: Path, make: Any, says: str) -> None:
    """Each says what is wrong with the file, and what to try; not a byte of it is changed, and nothing is left beside it."""
    make(path)
    before = contents(path.parent)
    for _ in range(2):
        with pytest.raises(JournalError, match=says) as raised:
            SqliteJournal(path).open()
        assert str(path) in str(raised.value)
        assert contents(path.parent) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    return {file.name: file.read_bytes() if file.is_file() else None for file in folder.iterdir()}


def test_missing_folder(tmp_path: Path) -> None:
    """A folder that is not there is not made."""
    with pytest.raises(JournalError, match=r"cannot be locked: .*No such file or directory; its folder has to be there"):
        SqliteJournal(tmp_path / "missing" / "requests.db").open()
    assert contents(tmp_path) == {}


READ_ONLY = """
import os, sys
from greensafe.journal import SqliteJournal
if os.geteuid() == 0:
    # Whom permissions bind, perhaps those of the library as well: so everything is loaded first.
    first = SqliteJournal(sys.argv[1] + ".first")
    first.open()
    first.close()
    os.setuid(65534)
try:
    SqliteJournal(sys.argv[1]).open()
except Exception as error:
    print(repr(error))
"""


@pytest.mark.parametrize(("what", "says"), [("file", "must be able to write to the file"), ("folder", "cannot be locked")])
def test_read_only(what: str, says: str) -> None:
    """A file, or a folder, in which this user may not write is an error when the journal is opened, not at the first commit."""
    # pytest's own folders are closed to other users.
    folder = Path(os.path.realpath(subprocess.check_output(["mktemp", "-d"], text=True).strip()))
    path = folder / "requests.db"
    try:
        store_one(path)
        before = path.read_bytes()
        path.chmod(0o444)
        folder.chmod(0o777 if what == "file" else 0o555)
        result = run_python(READ_ONLY, str(path))
        assert result.out.startswith("JournalError('") and says in result.out, result
        assert path.read_bytes() == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


LOOK = """
import os, sys
from greensafe.journal._lock import holder
if os.geteuid() == 0:
    os.setuid(65534)
print(holder(sys.argv[1]))
"""


def test_read_only_looks() -> None:
    """Who may only read a journal learns which process has it all the same."""
    folder = Path(os.path.realpath(subprocess.check_output(["mktemp", "-d"], text=True).strip()))
    made = SqliteJournal(folder / "requests.db")
    try:
        made.open()
        folder.chmod(0o555)
        (folder / "requests.db.lock").chmod(0o444)
        assert run_python(LOOK, made.path).out == f"{os.getpid()}\n"
    finally:
        folder.chmod(0o700)
        made.close()
        shutil.rmtree(folder)


def test_many_names(path: Path, tmp_path: Path) -> None:
    """Spaces and signs in a name are part of it; str and Path are the same, and so is a link to it."""
    for name in ("a b", "a?mode=memory", "100%41", "\u00e4#", ":memory:"):
        store_one(tmp_path / name)
        assert look(Path(str(tmp_path / name))).is_same
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    with closing(SqliteJournal(tmp_path / "a b")) as journal:
        journal.open()
        with pytest.raises(JournalError, match="in use by this process"):
            SqliteJournal(str(tmp_path / "link")).open()


def test_arguments(path: Path) -> None:
    """What cannot be is refused when the journal is made, before there is a file."""
    for arguments, error in (
        ({"ttl": 0}, ValueError),
        ({"ttl": float("inf")}, ValueError),
        ({"ttl": float("nan")}, ValueError),
        ({"ttl": 10**400}, ValueError),
        ({"ttl": "1"}, TypeError),
        ({"max_bytes": 1_000}, ValueError),
        ({"max_bytes": True}, TypeError),
        ({"synchronous": "OFF"}, ValueError),
    ):
        with pytest.raises(error):
            SqliteJournal(path, **arguments)
    with pytest.raises(JournalError, match="not open"):
        SqliteJournal(path).now()
    assert not path.exists()


def test_repr(journal: SqliteJournal, path: Path) -> None:
    """It tells the file, whether it is open, and what was dropped."""
    assert repr(journal) == f"<SqliteJournal open {path} expired=0 evicted=0>"
    journal.close()
    assert repr(journal) == f"<SqliteJournal closed {path} expired=0 evicted=0>"


# Who may use it.

HOLD = """
import sys
from greensafe.journal import Begin, SqliteJournal
journal = SqliteJournal(sys.argv[1])
journal.open()
journal.commit([Begin(bytes(range(16)), [b"body"], since=1.0)])
print("ready", flush=True)
sys.stdin.read()
"""


def test_second_process(path: Path) -> None:
    """A second process is told which one has the journal; when that one is killed, the journal is free and whole."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        try:
            assert holder.stdout.readline() == b"ready\n"
            with pytest.raises(JournalError, match=f"{path} is in use by process {holder.pid}: .*stop that one"):
                SqliteJournal(path).open()
        finally:
            holder.kill()
    assert path.with_name("requests.db.lock").exists()
    assert look(path).state is State.OPEN
    assert sorted(contents(path.parent)) == ["requests.db"]


FORK = """
import os, subprocess, sys
from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Begin, SqliteJournal

def begin(number):
    return Begin(bytes([number]) * 16, [b"body"], since=1.0)

journal = SqliteJournal(sys.argv[1])
journal.open()
journal.commit([begin(1)])
hold, release = os.pipe()
child = os.fork()
if child == 0:
    os.close(release)
    try:
        journal.commit([begin(2)])
    except JournalError as error:
        os.write(1, f"child: {error}\\n".encode())  # in one piece: the parent writes there as well
    journal.close()
    os.read(hold, 1)
    sys.exit()  # with all that an interpreter does at its end
other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
journal.commit([begin(3)])
journal.close()
again = SqliteJournal(sys.argv[1])
again.open()
os.write(1, b"reopened\\n")
again.commit([begin(4)])
os.close(release)
print("child ended", os.waitpid(child, 0)[1], flush=True)
other.communicate()
known = again.commit([begin(number) for number in range(1, 5)])
print([each is not None for each in known], again._connection.execute("PRAGMA integrity_check").fetchall())
again.close()
"""


def test_fork(path: Path) -> None:
    """A child can neither use the journal nor keep it from others, whatever it does at its end; the parent's goes on."""
    result = run_python(FORK, str(path))
    first, second, *rest = result.out.splitlines()  # the two processes speak when they come to it
    assert [*sorted([first, second]), *rest] == [
        f"child: the journal {path} is not open",
        "reopened",
        "child ended 0",
        "[True, False, True, True] [('ok',)]",
    ], result.err


def test_readers(journal: SqliteJournal, path: Path) -> None:
    """Anybody may read a journal that is in use; who takes long over it sees one moment, and holds nobody up."""
    journal.commit([begin(0, client=b"c", metadata=b"m")])
    with reader(path) as connection:
        connection.execute("BEGIN")
        count = "SELECT count(*) FROM greensafe_requests"
        assert connection.execute(count).fetchone() == (1,)
        for number in range(1, 100):
            journal.commit([begin(number)])
        assert connection.execute(count).fetchone() == (1,)
        connection.execute("COMMIT")
        assert connection.execute(count).fetchone() == (100,)
        row = connection.execute(
            "SELECT client, metadata, payload FROM greensafe_requests WHERE id = ?", (bytes(16),)
        ).fetchone()
        assert row == (b"c", b"m", b"\0\0\0\4body")


def test_bytes_go_when_they_are_not_needed(journal: SqliteJournal, path: Path) -> None:
    """A body is kept while its request is open, an answer until it has arrived, steps until the answer."""
    body, reply, value = (letter * 100_000 for letter in (b"b", b"r", b"v"))
    what = "SELECT coalesce(length(payload), 0), (SELECT count(*) FROM greensafe_steps) FROM greensafe_requests"
    with reader(path) as connection:
        for writes, expected in (
            ([Begin(ID, [body], since=1.0), Step(ID, "s", 0, value)], (100_004, 1)),
            ([Finish(ID, 0x81, [reply, b""])], (100_008, 0)),
            ([Ack(ID)], (0, 0)),
        ):
            journal.commit(writes)
            assert connection.execute(what).fetchone() == expected


# What goes wrong later.


def test_many_of_which_one_is_known(journal: SqliteJournal) -> None:
    """Those before it, beside it and after it are stored as new ones, however many statements that takes."""
    journal.commit([begin(400)])
    results = journal.commit([begin(number) for number in range(700)])
    assert [number for number, result in enumerate(results) if result is not None] == [400]
    assert results[400].state is State.OPEN
    assert all(result.state is State.OPEN for result in journal.commit([begin(number) for number in range(700)]))


def test_too_large(journal: SqliteJournal) -> None:
    """What sqlite cannot store is a JournalError that says so; then the journal goes on."""
    limit = journal._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    for write in (Begin(ID, [bytes(200_000)], since=1.0), Step(ID, "s", 2**63, b""), Step(ID, "\ud800", 0, b"")):
        with pytest.raises(JournalError, match=r"too (big|large)|surrogates"):
            journal.commit([begin(1), Begin(ID, BODY, since=1.0), write] if isinstance(write, Step) else [begin(1), write])
    assert journal.commit([begin(1), Begin(ID, [bytes(90_000)], since=1.0)]) == [None, None]
    journal._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)


def test_full(journal: SqliteJournal, path: Path) -> None:
    """When there is no more room nothing of the batch is stored; when there is some again, it works again."""
    journal.commit([begin(1)])
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    large = Begin(ID, [bytes(100_000)], since=1.0)
    for _ in range(3):
        with pytest.raises(JournalError, match="full; the disk is full: make room"):
            journal.commit([begin(2), large, begin(3)])
    assert isinstance(journal.commit([begin(1)])[0], Known)
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    assert journal.commit([begin(2), large, begin(3)]) == [None] * 3


LIMIT = """
import resource, sys
from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Begin, SqliteJournal

def begin(number, size=1):
    return Begin(number.to_bytes(16, "big"), [bytes(size)], since=1.0)

journal = SqliteJournal(sys.argv[1])
journal.open()
journal.commit([begin(0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
stored = 0
while True:
    try:
        journal.commit([begin(1 + stored, 100_000)])
    except JournalError as error:
        print(error)
        break
    stored += 1
for _ in range(3):
    try:
        journal.commit([begin(1_000, 1_900_000)])
    except JournalError:
        continue
    print("stored")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
known = journal.commit([begin(1 + number, 100_000) for number in range(stored + 1)])
print(stored > 3, [each is not None for each in known] == [True] * stored + [False])
print(journal.commit([begin(1_000, 1_900_000)]), journal._connection.execute("PRAGMA integrity_check").fetchall())
journal.close()
"""


def test_limit_of_the_process(path: Path) -> None:
    """A write that the system refuses in the middle loses nothing that was committed; afterwards it works again."""
    result = run_python(LIMIT, str(path))
    first, *others = result.out.splitlines()
    assert "disk I/O error; the disk, or a limit of this process for files, is the cause" in first, result
    assert others == ["True True", "[None] [('ok',)]"], result


DISK = """
import os, sys
from greensafe import JournalError, JournalUnavailable
from greensafe.journal import Begin, SqliteJournal

def begin(number, size=1):
    return Begin(number.to_bytes(16, "big"), [bytes(size)], since=1.0)

folder = sys.argv[1]
journal = SqliteJournal(folder + "/requests.db")
journal.open()
with open(folder + "/ballast", "wb") as file:
    file.write(bytes(11_000_000))
stored = 0
for _ in range(2):
    try:
        while True:
            journal.commit([begin(stored, 50_000)])
            stored += 1
    except JournalError as error:
        print(error)
os.unlink(folder + "/ballast")
known = journal.commit([begin(number, 50_000) for number in range(stored + 1)])
print(stored > 3, [each is not None for each in known] == [True] * stored + [False])
journal.close()
try:
    with open(folder + "/ballast", "wb") as file:
        while True:
            file.write(bytes(4_096))
            file.flush()
except OSError:
    pass
try:
    SqliteJournal(folder + "/other.db").open()
except JournalError as error:
    print(error, os.listdir(folder))
os.unlink(folder + "/ballast")
again = SqliteJournal(folder + "/requests.db")
again.open()
print(all(again.commit([begin(number, 50_000) for number in range(stored)])))
again.close()
"""


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*_UNSHARE, "mount -t tmpfs none /mnt"], capture_output=True, timeout=LONG, check=False)
    return done.returncode == 0


_UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]


@pytest.mark.skipif(not _can_mount(), reason="this user may not mount a small disk")
def test_full_disk(tmp_path: Path) -> None:
    """A disk that is really full: clear errors, nothing lost, and it works again when there is room."""
    (tmp_path / "program.py").write_text(DISK)
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=16M none "$1" && exec "$2" "$3" "$1"'
    command = [*_UNSHARE, script, "sh", str(tmp_path / "disk"), sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LONG, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done
    assert all("the disk is full: make room" in line or "disk I/O error" in line for line in lines[:2]), done
    assert lines[2] == "True True"
    assert "No space left" in lines[3] or "the disk is full" in lines[3] or "disk I/O error" in lines[3], done
    assert "other.db'" not in lines[3]
    assert lines[4] == "True"


def test_damage_in_the_middle(path: Path) -> None:
    """Damage that shows only when it is read is a JournalError then, not an answer that is made up."""
    with closing(SqliteJournal(path)) as journal:
        journal.open()
        journal.commit([begin(number) for number in range(2_000)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        for page in range(8, size // 4_096):
            file.seek(page * 4_096)
            file.write(b"\xff" * 64)
    with closing(SqliteJournal(path)) as journal:
        with pytest.raises(JournalError, match="malformed; the file is damaged"):
            journal.open()
            journal.commit([begin(number) for number in range(2_000)])


def test_connection_that_is_gone(journal: SqliteJournal) -> None:
    """A journal whose connection was closed opens another: the batch that noticed is not stored, the next one is."""
    failed = [begin(1), Effect(begin(1).request_id, "e", 0, lambda connection: connection.close() or b"")]
    with pytest.raises(JournalError):
        journal.commit(failed)
    assert journal.commit([begin(1)]) == [None]


def test_other_writer(journal: SqliteJournal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that keeps the file locked is waited for, and then said; nothing is stored."""
    journal._connection.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for act in (lambda: journal.commit([begin(1)]), lambda: journal.commit([])):
            with pytest.raises(JournalUnavailable, match="locked; another program is writing to it"):
                act()
        other.execute("ROLLBACK")
    assert journal.commit([begin(1)]) == [None]


def test_the_file_is_to_blame_or_the_batch(journal: SqliteJournal, path: Path) -> None:
    """Full for one row as well, it is JournalUnavailable; as long as it takes one, the batch was too large."""
    journal.commit([begin(1)])
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    large = [begin(2), Begin(ID, [bytes(100_000)], since=1.0)]
    with pytest.raises(JournalError, match="full") as caught:
        journal.commit(large)
    assert type(caught.value) is JournalError
    assert journal.commit([]) == []
    journal._connection.execute(
        "CREATE TEMP TRIGGER full BEFORE UPDATE ON greensafe_journal BEGIN INSERT INTO greensafe_steps"
        " VALUES (x'00', 'ballast', 0, zeroblob(100000)); END"
    )
    for writes in (large, []):
        with pytest.raises(JournalUnavailable, match="full; the disk is full: make room"):
            journal.commit(writes)
    journal._connection.execute("DROP TRIGGER full")
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    assert journal.commit(large) == [None, None]


def test_a_question_is_a_write(journal: SqliteJournal) -> None:
    """An empty batch changes a row: on a disk that is full a transaction without changes would succeed."""
    before = journal._connection.total_changes
    assert journal.commit([]) == []
    assert journal._connection.total_changes == before + 1


def test_error_that_is_not_the_places(journal: SqliteJournal) -> None:
    """A KeyboardInterrupt in an effect, or a write that is none, leaves nothing of the batch, and comes out as it is."""

    def interrupted(connection: sqlite3.Connection) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.commit([begin(1), Effect(begin(1).request_id, "e", 0, interrupted)])
    with pytest.raises(TypeError):
        journal.commit([begin(1), begin(2, since=1.0)._replace(body=[None])])  # type: ignore[list-item]
    assert journal.commit([begin(1)]) == [None]


# Effects in the same file.


def test_effect_shares_the_transaction(journal: SqliteJournal, path: Path) -> None:
    """What an effect does in the file is there with its step, or neither is."""

    def pay(connection: sqlite3.Connection) -> bytes:
        connection.execute("CREATE TABLE IF NOT EXISTS payments (amount)")
        connection.execute("INSERT INTO payments VALUES (5)")
        return b"paid"

    def fail(connection: sqlite3.Connection) -> bytes:
        pay(connection)
        raise ValueError("after all")

    id = begin(1).request_id
    none, paid, failed, again = journal.commit(
        [begin(1), Effect(id, "pay", 0, pay), Effect(id, "fail", 0, fail), Effect(id, "pay", 0, pay)]
    )
    assert (none, paid, type(failed), again) == (None, b"paid", Failed, b"paid")
    with pytest.raises(JournalError):
        journal.commit([Effect(id, "pay", 1, pay), Step(ID, "unknown", 0, b"")])
    with reader(path) as connection:
        assert connection.execute("SELECT count(*) FROM payments").fetchall() == [(1,)]
        assert connection.execute("SELECT name, value FROM greensafe_steps").fetchall() == [("pay", b"paid")]


@pytest.mark.parametrize(
    "what",
    [
        lambda connection: connection.commit(),
        lambda connection: connection.rollback(),
        lambda connection: connection.execute("COMMIT"),
        lambda connection: connection.execute("END"),
        lambda connection: connection.execute("ROLLBACK"),
        lambda connection: connection.executescript("INSERT INTO mine VALUES (2)"),
        lambda connection: connection.execute("RELEASE greensafe_effect"),
        lambda connection: connection.execute("ROLLBACK TO greensafe_effect"),
        lambda connection: connection.execute("ATTACH ':memory:' AS other"),
        lambda connection: connection.execute("PRAGMA user_version = 7"),
        lambda connection: connection.execute("DELETE FROM greensafe_requests"),
        lambda connection: connection.execute("UPDATE greensafe_journal SET horizon = 0"),
        lambda connection: connection.execute("INSERT INTO greensafe_steps VALUES (x'', 'x', 0, x'')"),
        lambda connection: connection.execute("DROP TABLE greensafe_steps"),
        lambda connection: connection.execute("ALTER TABLE greensafe_steps RENAME TO gone"),
        lambda connection: connection.execute("DROP INDEX greensafe_ages"),
        lambda connection: connection.execute("CREATE TRIGGER t AFTER INSERT ON greensafe_steps BEGIN SELECT 1; END"),
    ],
)
def test_effect_cannot_reach_beyond_itself(journal: SqliteJournal, path: Path, what: Any) -> None:
    """Ending the transaction, the journal's tables and settings: not authorized, and nothing of that effect is left."""

    def act(connection: sqlite3.Connection) -> bytes:
        connection.execute("INSERT INTO mine VALUES (1)")
        what(connection)
        return b""

    id = begin(1).request_id
    make = Effect(id, "make", 0, lambda connection: connection.execute("CREATE TABLE mine (x)") and b"")
    none, made, failed, other = journal.commit([begin(1), make, Effect(id, "act", 0, act), begin(2)])
    assert (none, made, other) == (None, b"", None)
    assert isinstance(failed, Failed)
    assert "not authorized" in str(failed.error) or "prohibited" in str(failed.error), failed
    with reader(path) as connection:
        assert connection.execute("SELECT count(*) FROM mine").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM greensafe_requests").fetchone() == (2,)
        assert connection.execute("SELECT name FROM greensafe_steps").fetchall() == [("make",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(_schema.MIGRATIONS),)


def test_effect_may_nest_and_ask(journal: SqliteJournal) -> None:
    """Savepoints of its own, questions about tables and the journal, and an answer that is not read to its end are fine."""

    def act(connection: sqlite3.Connection) -> bytes:
        connection.execute("CREATE TABLE mine (x)")
        connection.execute("SAVEPOINT inner_one")
        connection.executemany("INSERT INTO mine VALUES (?)", [(number,) for number in range(100)])
        connection.execute("ROLLBACK TO inner_one")
        connection.execute("INSERT INTO mine VALUES (7)")
        connection.execute("RELEASE inner_one")
        assert connection.execute("PRAGMA table_info(mine)").fetchall()
        assert connection.execute("PRAGMA user_version").fetchone()
        connection.execute("SELECT * FROM greensafe_requests").fetchone()
        return b"%d" % connection.execute("SELECT x FROM mine").fetchone()

    assert journal.commit([begin(1), Effect(begin(1).request_id, "e", 0, act)]) == [None, b"7"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("row_factory", lambda cursor, row: {"x": row[0]}), ("row_factory", sqlite3.Row), ("text_factory", bytes)],
)
def test_effect_that_reads_in_its_own_way(journal: SqliteJournal, name: str, value: Any) -> None:
    """How rows and texts are given to one effect is not how the journal, or the next effect, is given them."""

    def act(connection: sqlite3.Connection) -> bytes:
        before.append(getattr(connection, name))
        setattr(connection, name, value)
        if len(before) == 2:
            raise ValueError("after all")
        return b""

    before: list[Any] = []
    id = begin(1).request_id
    journal.commit([begin(1), Effect(id, "e", 0, act), Effect(id, "fails", 0, act), Effect(id, "e", 1, act)])
    assert before[0] == before[1] == before[2]
    (known,) = journal.commit([begin(1)])
    assert known == Known(State.OPEN, True, 1, 0, None, 0, [], {("e", 0): b"", ("e", 1): b""})


def test_effect_that_rolls_everything_back(journal: SqliteJournal) -> None:
    """If sqlite itself has rolled back, the batch has failed; the other writes can be tried again."""

    def act(connection: sqlite3.Connection) -> bytes:
        connection.execute("CREATE TABLE mine (x UNIQUE)")
        connection.execute("INSERT INTO mine VALUES (1)")
        connection.execute("INSERT OR ROLLBACK INTO mine VALUES (1)")
        return b""

    with pytest.raises(JournalError, match=r"rolled back the batch .*UNIQUE constraint failed"):
        journal.commit([begin(1), Effect(begin(1).request_id, "e", 0, act), begin(2)])
    assert journal.commit([begin(1), begin(2)]) == [None, None]


# Time.


def test_wall_clock_does_not_matter_within_a_boot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the time of day is set while the machine runs, the journal's goes on."""
    times = []
    for step in (0.0, 1e6, -1e6):
        here = sqlite.moment()
        with monkeypatch.context() as patch, closing(SqliteJournal(path)) as journal:
            patch.setattr(sqlite, "moment", lambda here=here, step=step: here._replace(wall=here.wall + step))
            began = monotonic()
            journal.open()
            times.append(journal.now() - began)
    assert max(times) - min(times) < LONG


@pytest.mark.parametrize("step", [-1e6, 0.0, 1e6])
def test_reboot(path: Path, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """After a reboot the time is that of the day, but never before anything that is stored; then it goes on from there."""
    with closing(SqliteJournal(path)) as journal:
        journal.open()
        journal.commit([begin(1)])
        last = journal.now()
    here = sqlite.moment()
    monkeypatch.setattr(sqlite, "moment", lambda: Moment("another boot", monotonic(), here.wall + step))
    with closing(SqliteJournal(path)) as journal:
        journal.open()
        first = journal.now()
        with reader(path) as connection:
            (changed,) = connection.execute("SELECT changed FROM greensafe_requests").fetchone()
        assert changed <= first
        assert 0 <= first - max(changed, here.wall + step) < LONG
        assert changed <= last
    here = here._replace(wall=here.wall - 1e9)
    with closing(SqliteJournal(path)) as journal:
        journal.open()
        assert 0 <= journal.now() - first < LONG


# What is dropped.


def test_margin(path: Path) -> None:
    """A little later than the newest that was dropped counts as dropped too; later than that is new."""
    with closing(SqliteJournal(path, ttl=1e-6)) as journal:
        journal.open()
        journal.commit([begin(1, since=1_000.0)])
        assert journal.tidy(()) is False
        assert journal.dropped == {"expired": 1, "evicted": 0}
        assert journal.commit([begin(2, since=1_000.0 + MARGIN * 0.99, is_resent=True)]) == [Known(State.DROPPED)]
        assert journal.commit([begin(2, since=1_000.0 + MARGIN * 1.01, is_resent=True)]) == [None]


def test_tidy_is_bounded(path: Path) -> None:
    """One call drops so many and no more, and says that there is more to do; ages and sizes are told apart."""
    with closing(SqliteJournal(path, ttl=1e-6)) as journal:
        journal.open()
        journal.commit([begin(number) for number in range(2 * MOST + 10)])
        assert [journal.tidy(()) for _ in range(4)] == [True, True, False, False]
        assert journal.dropped == {"expired": 2 * MOST + 10, "evicted": 0}
    with closing(SqliteJournal(path, max_bytes=2**17)) as journal:
        journal.open()
        journal.commit([Begin(begin(number).request_id, [bytes(8_192)], since=1.0) for number in range(64)])
        assert journal.tidy(()) is False
        assert journal.dropped["expired"] == 2 * MOST + 10
        assert 40 < journal.dropped["evicted"] < 64


def test_file_does_not_grow(path: Path) -> None:
    """What is dropped makes room: the file stays near its limit, however much goes through it."""
    limit = 2**18
    with closing(SqliteJournal(path, max_bytes=limit)) as journal:
        journal.open()
        for round in range(40):
            journal.commit([Begin(begin(round * 10 + at).request_id, [bytes(8_192)], since=1.0) for at in range(10)])
            while journal.tidy(()):
                pass
    assert path.stat().st_size < 2 * limit


# Versions.


def test_migration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of an older version is brought to the newest with all that is in it; the older program then refuses it."""
    store_one(path)
    steps = ["ALTER TABLE greensafe_requests ADD COLUMN note TEXT", "UPDATE greensafe_requests SET note = hex(id)"]
    with monkeypatch.context() as patch:
        patch.setattr(_schema, "MIGRATIONS", [*_schema.MIGRATIONS, steps])
        assert look(path).state is State.OPEN
        with reader(path) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (2,)
            assert connection.execute("SELECT note FROM greensafe_requests").fetchone() == (ID.hex().upper(),)
        store_one(path.with_name("new.db"))
        assert look(path.with_name("new.db")).state is State.OPEN
    with pytest.raises(JournalError, match="version 2, this greensafe knows 1 to 1"):
        SqliteJournal(path).open()


def test_migration_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration is done as a whole or not at all."""
    store_one(path)
    steps = ["ALTER TABLE greensafe_requests ADD COLUMN note TEXT", "SELECT * FROM nowhere"]
    with monkeypatch.context() as patch:
        patch.setattr(_schema, "MIGRATIONS", [*_schema.MIGRATIONS, steps])
        with pytest.raises(JournalError, match="nowhere"):
            SqliteJournal(path).open()
    assert look(path).state is State.OPEN
    with reader(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert "note" not in [row[1] for row in connection.execute("PRAGMA table_info(greensafe_requests)")]


# The document.


def test_the_document_has_the_format(path: Path) -> None:
    """docs/journal.md names each column of each table, the number that makes a file a journal, and the versions."""
    text = (ROOT / "docs/journal.md").read_text()
    store_one(path)
    with reader(path) as connection:
        for table in sorted(_schema.TABLES):
            section = text.split(f"\n`{table}` ")[1].split("\n`greensafe_")[0]
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})"):
                assert re.search(rf"\b{column}\b", section), f"{table}.{column}"
    assert f"`{_schema.APPLICATION.to_bytes(4, 'big').hex(' ').upper()}`" in text
    assert f"{len(_schema.MIGRATIONS)} so far" in text
    assert f"not later than {MARGIN:.0f} s" in text


@pytest.mark.parametrize(
    "change",
    [
        "greensafe_requests SET state = 9",
        "greensafe_requests SET fruitless = 'many'",
        "greensafe_requests SET until = 'soon'",
        "greensafe_requests SET state = 1, kind = 129, payload = x'ffffffff00'",
        "greensafe_steps SET value = 5",
    ],
)
def test_a_damaged_row_fails_alone(path: Path, change: str) -> None:
    """What is damaged is never used: it is a JournalError of that request, and the others of the batch can be stored."""
    made = SqliteJournal(path)
    made.open()
    id = begin(1).request_id
    made.commit([begin(1), begin(2), Step(id, "s", 1, b"")])
    made.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE {change}")
        connection.commit()
    made.open()
    try:
        with pytest.raises(JournalError, match="damaged"):
            made.commit([begin(3), begin(1)])
        assert made.commit([begin(3)]) == [None]
    finally:
        made.close()


def damage(path: Path, change: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(change)
        connection.commit()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE greensafe_journal SET id = 5", "impossible id 5"),
        ("UPDATE greensafe_journal SET offset = 'later'", "impossible offset 'later'"),
        ("UPDATE greensafe_journal SET last = x'00'", "impossible last"),
        ("UPDATE greensafe_journal SET horizon = 'far'", "impossible horizon"),
        ("DELETE FROM greensafe_journal", "no row of its own"),
    ],
)
def test_a_journals_own_row_is_damaged(path: Path, change: str, says: str) -> None:
    """A clear error for a server and for who looks."""
    store_one(path)
    damage(path, change)
    for use in (SqliteJournal(path).open, lambda: Reading(str(path))):
        with pytest.raises(JournalError, match=f"{says}.*damaged; put a copy back"):
            use()


def test_damaged_times_keep_nothing_from_going(path: Path) -> None:
    """A request whose times are no numbers any more neither keeps the journal from being opened nor others from ageing."""
    made = SqliteJournal(path, ttl=0.01)
    made.open()
    made.commit([begin(number, since=made.now()) for number in range(3)])
    made.close()
    damage(path, f"UPDATE greensafe_requests SET since = 'then', changed = 'now' WHERE id = x'{begin(0).request_id.hex()}'")
    damage(path, f"UPDATE greensafe_requests SET since = x'00' WHERE id = x'{begin(1).request_id.hex()}'")
    made.open()
    try:
        end = monotonic() + LONG
        while made.dropped["expired"] < 2 and monotonic() < end:
            made.tidy(())
        assert made.dropped["expired"] == 2
    finally:
        made.close()
