"""The command `greensafe journal`, run as a person at night would, next to a live server and after a dead one."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG, ROOT, Result

import greensafe
from greensafe.journal import Ack, Begin, Finish, SqliteJournal, Step, _lock
from greensafe.journal.reading import Reading
from greensafe.sansio.envelope import Kind

pytestmark = pytest.mark.usefixtures("limit")

OPEN, DONE, ACKED = (bytes(15) + bytes([number]) for number in (0xA1, 0xB2, 0xC3))


#: Has imported everything, and forks for each command: a process of its own for each, without the half second of a start.
FORGE = """
import json, os, sys
from greensafe.__main__ import main
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if not child:
        sys.argv = ["greensafe", *arguments]
        for descriptor, name in (0, os.devnull), (1, out), (2, err):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
sys.exit(main())
"""

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def forge() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FORGE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.fixture
def command(forge: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`greensafe journal ...`, waited for in a thread, so that a server in this process goes on."""
    out, err = (tmp_path_factory.mktemp("said") / name for name in ("out", "err"))

    def run(*args: str | Path) -> Result:
        start = monotonic()
        assert forge.stdin is not None and forge.stdout is not None
        print(json.dumps([["journal", *map(str, args)], str(out), str(err)]), file=forge.stdin, flush=True)
        code = int(gevent.get_hub().threadpool.apply(forge.stdout.readline))
        return Result(code, out.read_text(), err.read_text(), monotonic() - start)

    return run


def fill(path: Path) -> SqliteJournal:
    """A journal with a request in each state; it is left open."""
    made = SqliteJournal(path)
    made.open()
    now = made.now()
    made.commit(
        [
            Begin(OPEN, [b"hello \xff\n", b"second"], since=now - 7200, until=now + 3600, client=b"\0abcd", metadata=b"trace"),
            Step(OPEN, "key exchange", 1, b'j{"key":5}'),
            Step(OPEN, "raw", 2, b"\x80other codec"),
            Begin(DONE, [b"x"], since=now),
            Finish(DONE, Kind.ERROR, [b"answer"]),
            Begin(ACKED, [b"y"], since=now),
            Finish(ACKED, Kind.REPLY, [b"z"]),
        ]
    )
    made.commit([Ack(ACKED)])
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.db"


@pytest.fixture(params=["live", "dead"])
def journal(path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A filled one, which a server holds or does not."""
    made = fill(path)
    if request.param == "dead":
        made.close()
    yield request.param
    made.close()


def test_ls(command: Command, path: Path, journal: str) -> None:
    """What is unfinished, the rest in numbers, and who holds the file."""
    result = command("ls", path)
    assert (result.code, result.err) == (0, "")
    first, *rest = result.out.splitlines()
    assert first.split()[:2] == [OPEN.hex(), "open"]
    assert "run 1 2 steps" in first
    assert r"hello \xff\n" in first
    assert rest[0].startswith("1 open, 1 done, 1 acked; dropped: 0 expired, 0 evicted")
    assert ("no server" in rest[1]) == (journal == "dead")
    assert (f"process {os.getpid()}" in rest[1]) == (journal == "live")


def test_ls_of_all(command: Command, path: Path, journal: str) -> None:
    """In each state as many as are asked for."""
    states = [line.split()[1] for line in command("ls", "--state", "all", path).out.splitlines()[:3]]
    assert states == ["open", "done", "acked"]
    assert command("ls", "--state", "done", "--most", "0", path).out.startswith("1 open, 1 done")


def test_json(command: Command, path: Path, journal: str) -> None:
    """A line for each request, and one for the whole; bytes as latin-1."""
    *entries, summary = map(json.loads, command("ls", "--json", "--state", "all", path).out.splitlines())
    assert [entry["state"] for entry in entries] == ["open", "done", "acked"]
    assert entries[0]["frames"] == ["hello \xff\n", "second"]
    assert entries[0]["steps"][0] == ["key exchange", 1, 'j{"key":5}']
    assert summary["counts"] == {"open": 1, "done": 1, "acked": 1}
    assert json.loads(command("show", "--json", "b2", path).out)["frames"] == ["answer"]


def test_show(command: Command, path: Path, journal: str) -> None:
    """One request, by the beginning or the end of its id: when it came, how often it ran, its steps, its body or answer."""
    result = command("show", "00A1", path)
    assert (result.code, result.err) == (0, "")
    for expected in (
        f"request   {OPEN.hex()}",
        "state     open",
        "(2.0 h ago)",
        "caller    gives up",
        "metadata  trace",
        "step      key exchange (1): {'key': 5}",
        r"step      raw (2): \x80other codec",
        r"body      hello \xff\n",
        "body      second",
    ):
        assert expected in result.out
    assert "error     answer" in command("show", "b2", path).out


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("00", "more than one request"),
        ("ff", "no request"),
        ("xyz", "hexadecimal"),
        ("1" * 33, "hexadecimal"),
        ("%", "hexadecimal"),
    ],
)
def test_an_id_that_is_none(command: Command, path: Path, journal: str, part: str, text: str) -> None:
    """Is told, with code 1."""
    result = command("show", part, path)
    assert (result.code, result.out) == (1, "")
    assert text in result.err


def test_forget(command: Command, path: Path, journal: str) -> None:
    """What is answered goes at once; what is open only if no server holds the file."""
    result = command("forget", "b2", path)
    assert result.code == 0
    assert DONE.hex() in result.out
    result = command("forget", "a1", path)
    if journal == "live":
        assert result.code == 1
        assert f"process {os.getpid()} may be running it" in result.err
    else:
        assert result.code == 0
    made = SqliteJournal(path)
    if journal == "dead":
        made.open()
        assert made.commit([Begin(DONE, [b"new"], since=1.0), Begin(OPEN, [b"new"], since=1.0)]) == [None, None]
        made.close()
    with Reading(str(path)) as reading:
        assert list(reading.faults()) == []


def test_verify(command: Command, path: Path, journal: str) -> None:
    """A file that is whole is said to be."""
    result = command("verify", path)
    assert (result.code, result.out) == (0, "whole: 3 requests\n")


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("UPDATE greensafe_requests SET payload = x'0000000141' WHERE state = 0", "not the one it came with"),
        ("UPDATE greensafe_requests SET payload = 'text' WHERE state = 0", "impossible payload 'text'"),
        ("UPDATE greensafe_requests SET payload = NULL WHERE state = 1", "is done and has no bytes"),
        ("UPDATE greensafe_requests SET payload = x'00' WHERE state = 2", "is acked and has still its bytes"),
        ("UPDATE greensafe_requests SET state = 9 WHERE state = 2", "impossible state 9"),
        ("UPDATE greensafe_requests SET kind = 0 WHERE state = 1", "answer is of kind 0"),
        ("UPDATE greensafe_requests SET attempts = 0 WHERE state = 0", "0 attempts"),
        ("UPDATE greensafe_requests SET id = x'00' WHERE state = 0", "id of 1 bytes"),
        ("UPDATE greensafe_requests SET state = 1, kind = 129 WHERE state = 0", "has steps and is not open"),
    ],
)
def test_verify_finds_what_is_wrong(command: Command, path: Path, sql: str, text: str) -> None:
    """Each rule of a row, and what sqlite itself sees."""
    fill(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(sql)
        connection.commit()
    result = command("verify", path)
    assert result.code == 1
    assert text in result.out


ODD = [
    ("greensafe_requests SET id = 'text' WHERE state = 0", "impossible id 'text'"),
    ("greensafe_requests SET id = 5 WHERE state = 0", "impossible id 5"),
    ("greensafe_requests SET state = 'x' WHERE state = 0", "impossible state 'x'"),
    ("greensafe_requests SET changed = 'x' WHERE state = 0", "impossible changed 'x'"),
    ("greensafe_requests SET until = 'soon' WHERE state = 0", "impossible until 'soon'"),
    ("greensafe_requests SET attempts = 'many' WHERE state = 0", "impossible attempts 'many'"),
    ("greensafe_requests SET client = 7 WHERE state = 0", "impossible client 7"),
    ("greensafe_requests SET payload = x'ffffffff00' WHERE state = 1", "do not have the lengths"),
    ("greensafe_steps SET value = 5 WHERE name = (SELECT min(name) FROM greensafe_steps)", "impossible value 5"),
]


@pytest.mark.parametrize(("change", "text"), ODD)
def test_what_a_flipped_bit_leaves(command: Command, path: Path, change: str, text: str) -> None:
    """sqlite does not see that a column is of another type. `verify` names it, and nothing else fails with a traceback."""
    fill(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE {change}")
        connection.commit()
    result = command("verify", path)
    assert (result.code, text in result.out, result.err) == (1, True, "")
    for arguments in (["ls", "--state", "all"], ["ls", "--state", "all", "--json"], ["show", OPEN.hex()]):
        assert "Traceback" not in command(*arguments, path).err


def test_damage_in_the_text_of_an_error(command: Command, path: Path) -> None:
    """Of a schema that is damaged sqlite says where, in bytes that are no text any more."""
    fill(path).close()
    path.write_bytes(path.read_bytes().replace(b"ON greensafe_requests", b"ON greensafe\xa0requests"))
    for arguments in (["ls"], ["verify"], ["show", OPEN.hex()], ["forget", DONE.hex()]):
        result = command(*arguments, path)
        assert (result.code, "is damaged" in result.err, "Traceback" in result.err) == (1, True, False)


def test_verify_finds_damage(command: Command, path: Path) -> None:
    """A page that was overwritten."""
    fill(path).close()
    data = bytearray(path.read_bytes())
    data[3 * 4096 + 100 : 5 * 4096] = os.urandom(2 * 4096 - 100)
    path.write_bytes(data)
    result = command("verify", path)
    assert result.code == 1
    assert result.out or result.err


def test_vacuum(command: Command, path: Path, journal: str) -> None:
    """Not under a server; otherwise the free pages go back to the disk, and what is in it stays."""
    if journal == "dead":
        made = SqliteJournal(path)
        made.open()
        made.commit([Begin(bytes([1]) * 16, [bytes(10**6)], since=1.0)])
        made.commit([Finish(bytes([1]) * 16, Kind.REPLY, [b""])])
        made.close()
    result = command("vacuum", path)
    if journal == "live":
        assert result.code == 1
        assert "in use" in result.err
    else:
        before, after = (int(word) for word in result.out.split() if word.isdigit())
        assert after < before / 5
        assert command("verify", path).out == "whole: 4 requests\n"
    assert not Path(f"{path}.lock").exists() or journal == "live"


@pytest.mark.parametrize("what", ["missing", "folder", "text", "foreign", "newer"])
@pytest.mark.parametrize("name", ["ls", "show", "forget", "verify", "vacuum"])
def test_what_is_no_journal(command: Command, tmp_path: Path, path: Path, what: str, name: str) -> None:
    """Is told in one line, with code 1, and is not touched."""
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("to whom it may concern\n" * 100)
    elif what == "foreign":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE accounts (name TEXT)")
    elif what == "newer":
        fill(path).close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes() if path.is_file() else None
    result = command(name, *(["a1"] if name in ("show", "forget") else []), path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("greensafe: ")
    assert result.err.count("\n") == 1
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("args", [(), ("ls",), ("show", "x"), ("burn", "x"), ("ls", "--state", "half", "x")])
def test_wrong_arguments(command: Command, args: Sequence[str]) -> None:
    """Are answered with how it is used, and code 2."""
    result = command(*args)
    assert result.code == 2
    assert "usage: greensafe journal" in result.err


def test_next_to_a_server_that_works(command: Command, path: Path) -> None:
    """Looking holds up nobody, and sees what is there at that moment."""
    served: list[Any] = []
    with (
        greensafe.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=LONG, journal=path) as server,
        greensafe.Client(server.endpoint) as client,
    ):
        stop = gevent.event.Event()

        def ask() -> None:
            while not stop.is_set():
                served.append(client.request(b"x"))

        asking = gevent.spawn(ask)
        for args in (("ls", "--state", "all"), ("verify",), ("ls", "--json")):
            assert command(*args, path).code == 0
        stop.set()
        asking.get()
    assert len(served) > 3


def test_a_server_starts_while_somebody_looks(path: Path) -> None:
    """Who asks whether a server holds the file does not keep one from it."""
    fill(path).close()
    looking = Native(target=_look, args=(path,))
    looking.start()
    try:
        for _ in range(200):
            made = SqliteJournal(path)
            made.open()
            made.close()
    finally:
        STOP.append(True)
        looking.join()
        STOP.clear()


def test_a_server_waits_for_those_who_look(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine keeps one in the middle of its look."""
    fill(path).close()
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 100:
                fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(_lock, "_sleep", pause)
        made = SqliteJournal(path)
        made.open()
        made.close()
    assert len(pauses) == 100


Native = gevent.monkey.get_original("threading", "Thread")
STOP: list[bool] = []


def _look(path: Path) -> None:
    from greensafe.journal._lock import holder

    while not STOP:
        holder(str(path))


def test_installed_and_as_a_module() -> None:
    """`greensafe` and `python -m greensafe` are the same."""
    installed = Path(sys.executable).with_name("greensafe")
    for start in ([str(installed)], [sys.executable, "-m", "greensafe"]):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True, cwd=ROOT, timeout=LONG)
        assert done.stdout == f"greensafe {greensafe.__version__}\n"


def test_what_others_have_chosen_is_escaped(command: Command, path: Path) -> None:
    """A step's name, a body, a client's id and metadata stay in their lines, and no terminal obeys them."""
    evil = "x\x1b[2J\rrequest   forged\nstate     done\u2028\x9b"
    made = SqliteJournal(path)
    made.open()
    fields = {"since": made.now(), "client": evil.encode(), "metadata": evil.encode()}
    made.commit([Begin(OPEN, [evil.encode()], **fields), Step(OPEN, evil, 1, json.dumps(evil).encode().join([b"j", b""]))])
    made.close()
    for arguments in (("show", "a1"), ("ls",), ("forget", "a1")):
        result = command(*arguments, path)
        assert result.code == 0
        assert all(line.isprintable() for line in result.out.split("\n"))
        assert len([line for line in result.out.splitlines() if line.startswith(("request", "state"))]) <= 2
        if arguments[0] == "show":
            assert r"step      x\x1b[2J\rrequest   forged\nstate     done\u2028\x9b (1): '" in result.out


def test_what_stands_in_a_damaged_file_is_escaped(command: Command, path: Path) -> None:
    """Also where it is named in an error, or by `verify`."""
    fill(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE greensafe_requests SET client = ? WHERE id = ?", ("\x1b[2J\nforged", OPEN))
    for arguments in (("show", "a1"), ("verify",)):
        result = command(*arguments, path)
        assert result.code == 1
        said = result.out + result.err
        assert "impossible client" in said
        assert all(line.isprintable() for line in said.split("\n"))
        assert not [line for line in said.splitlines() if line.startswith("forged")]
    missing = command("ls", path.parent / "no\nfile\x1b[2J")
    assert missing.code == 1
    assert missing.err.count("\n") == 1
    assert "\x1b" not in missing.err
