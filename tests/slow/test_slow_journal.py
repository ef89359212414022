"""A server with a journal, killed at 200 random moments under load: is each request answered exactly once, and right?

GREENSAFE_JOURNAL_SEED and GREENSAFE_JOURNAL_KILLS choose another run. A seed repeats when the kills come; what requests they
meet is up to the machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
import zmq.green
from helpers import LONG, MS, ROOT, wait_until

import greensafe as zmq_safe
from greensafe import Client
from greensafe.errors import Disconnected, PeerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = int(os.environ.get("GREENSAFE_JOURNAL_SEED", "6"))
KILLS = int(os.environ.get("GREENSAFE_JOURNAL_KILLS", "200"))

#: Callers that may wait as long as they like, and the clients that they share.
CALLERS = 20
CLIENTS = 4

#: A plain REQ that nobody tells of the death gives up after so many seconds, and asks something else.
PATIENCE = 1.0

# Each step says in `log` that it runs, and the handler that it is done, when `step` has returned.
SERVER = """
import os, signal, sys, zlib, gevent, greensafe
from greensafe.journal import in_transaction
endpoint, journal, log = sys.argv[1:]
log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, step, name):
    os.write(log, b"%s %s %s\\n" % (what, step, name))

def handle(request):
    name = request.body
    nap = zlib.crc32(name) % 20 / 1000
    def effect(step):
        note(b"run", step, name)
        gevent.sleep(nap / 4)
        return step + b" of " + name
    def insert(connection):
        connection.execute("CREATE TABLE IF NOT EXISTS effects (name BLOB)")
        connection.execute("INSERT INTO effects VALUES (?)", (name,))
        return b"row of " + name
    def step(step, fn, *args):
        result = request.step(step.decode(), fn, *args)
        note(b"done", step, name)
        return result
    first = step(b"first", effect, b"first")
    gevent.sleep(nap)
    row = b"" if name.startswith(b"req") else step(b"row", in_transaction(insert))
    gevent.sleep(nap)
    return first + b", " + row + b", " + step(b"last", effect, b"last")

greensafe.serve(endpoint, handle, deadline=30, journal=journal, max_attempts=1_000_000)
"""


class Site:
    """The server's process, again and again."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.endpoint = endpoint
        self.journal = folder / "requests.db"
        self.log = folder / "log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SERVER, self.endpoint, str(self.journal), str(self.log)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def kill(self) -> None:
        """SIGKILL, and the next one."""
        assert self.process.poll() is None, "the server has ended by itself"
        self.process.kill()
        wait_until(lambda: self.process.poll() is not None)
        self.process = self._start()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _expected(name: bytes) -> bytes:
    row = b"" if name.startswith(b"req") else b"row of " + name
    return b"first of " + name + b", " + row + b", last of " + name


class Caller:
    """Asks one thing after another, and counts how each ended."""

    def __init__(self, name: str, ask: Callable[[bytes], bytes]) -> None:
        self.name = name
        self.asked = 0
        self.seen: Counter[str] = Counter()
        self._ask = ask

    def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.asked += 1
            name = f"{self.name}.{self.asked}".encode()
            try:
                answer = self._ask(name)
            except (PeerError, gevent.Timeout) as error:
                self.seen[type(error).__name__] += 1
            else:
                self.seen["answers" if answer == _expected(name) else f"WRONG {answer!r} for {name!r}"] += 1


def _told(context: zmq_safe.Context, endpoint: str) -> Callable[[bytes], bytes]:
    """A REQ of greensafe's, which is told of a death."""
    sock = context.socket(zmq_safe.REQ)
    sock.connect(endpoint)

    def ask(name: bytes) -> bytes:
        sock.send(name)
        answer: bytes = sock.recv()
        return answer

    return ask


def _left(context: zmq.green.Context, endpoint: str) -> Callable[[bytes], bytes]:
    """Any other REQ, which is left waiting, and gives up."""

    def ask(name: bytes) -> bytes:
        with context.socket(zmq.green.REQ) as sock:
            sock.linger = 0
            sock.connect(endpoint)
            with gevent.Timeout(PATIENCE):
                sock.send(name)
                answer: bytes = sock.recv()
                return answer

    return ask


def _again(log: Path) -> list[str]:
    """The finished steps that were run once more. One process at a time writes to the log, so its order is the real one."""
    done, again = set(), []
    for line in log.read_bytes().splitlines():
        what, _, step = line.partition(b" ")
        if what == b"done":
            done.add(step)
        elif step in done and not step.endswith(b"hello"):
            again.append(step.decode())
    return again


@contextlib.contextmanager
def _foreign() -> Iterator[zmq.green.Context]:
    made = zmq.green.Context()
    yield made
    made.destroy(linger=0)


def _endpoint(transport: str, folder: Path) -> str:
    if transport == "ipc":
        return f"ipc://{folder}/server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_random_kills(context: zmq_safe.Context, tmp_path: Path, transport: str) -> None:
    """Who retries gets each answer, once and right, and no finished step runs again; the others are told, or left, as ever."""
    chance = random.Random(f"{SEED} {transport}")
    site = Site(_endpoint(transport, tmp_path), tmp_path)
    clients = [Client(site.endpoint, context=context, retries=1_000_000) for _ in range(CLIENTS)]
    once = Client(site.endpoint, context=context)
    over = False
    try:
        with _foreign() as foreign:
            for number, client in enumerate([*clients, once]):
                # Until a client has heard of a server it cannot know that it may send again.
                hello = b"%d.hello" % number
                assert client.request(hello, idempotent=True, timeout=LONG) == _expected(hello)
            retrying = [Caller(f"retries-{n}", clients[n % CLIENTS].request) for n in range(CALLERS)]
            raising = [Caller(f"once-{n}", once.request) for n in range(4)]
            plain = [Caller("req-told", _told(context, site.endpoint)), Caller("req-left", _left(foreign, site.endpoint))]
            callers = [*retrying, *raising, *plain]
            running = [gevent.spawn(caller.run, lambda: over) for caller in callers]
            for _ in range(KILLS):
                # Most kills come while it serves, some while it starts.
                if chance.random() < 0.9:
                    wait_until(lambda: once._channels[0].is_up)
                gevent.sleep(chance.uniform(0, 300 * MS))
                site.kill()
            wait_until(lambda: once._channels[0].is_up)
            over = True
            gevent.joinall(running, timeout=2 * LONG, raise_error=True)
            assert all(greenlet.ready() for greenlet in running), [repr(client) for client in clients]
        assert site.stop() == 0
    finally:
        over = True
        resent = sum(client.stats.retries for client in clients)
        for client in [*clients, once]:
            client.close()
        site.close()

    print(f"\nseed {SEED}, {transport}, {KILLS} kills: {resent} sent again")
    for group in (retrying, raising, plain[:1], plain[1:]):
        print(f"  {group[0].name:12} {dict(sum((caller.seen for caller in group), Counter[str]()))}")
    seen = sum((caller.seen for caller in callers), Counter[str]())
    assert not [what for what in seen if what.startswith("WRONG")]
    for caller in retrying:
        assert caller.seen == {"answers": caller.asked}
    for caller in [*raising, plain[0]]:
        assert set(caller.seen) <= {"answers", Disconnected.__name__}
    assert resent > KILLS  # the kills did meet requests
    assert not _again(site.log)
    _check_journal(site.journal, retrying)
    _check_once(site.log, [*raising, *plain])


def test_two_servers(context: zmq_safe.Context, tmp_path: Path) -> None:
    """Each with a journal of its own: what one has lost waits for it and for no other, which answers the rest meanwhile."""
    chance = random.Random(f"{SEED} two")
    sites = [Site(f"ipc://{tmp_path}/{number}/server", tmp_path / str(number)) for number in range(2)]
    client = Client(*(site.endpoint for site in sites), context=context, retries=1_000_000)
    callers = [Caller(f"retries-{n}", client.request) for n in range(CALLERS)]
    over = False
    try:
        hellos = 0
        while not all(endpoint.is_greensafe for endpoint in client.stats.endpoints):
            hellos += 1
            gevent.joinall(
                [gevent.spawn(client.request, b"%d.hello" % hellos, idempotent=True) for _ in sites], raise_error=True
            )
        running = [gevent.spawn(caller.run, lambda: over) for caller in callers]
        for _ in range(KILLS // 4):
            number = chance.randrange(2)
            wait_until(lambda number=number: client._channels[number].is_up)
            gevent.sleep(chance.uniform(0, 300 * MS))
            sites[number].kill()
        over = True
        gevent.joinall(running, timeout=2 * LONG, raise_error=True)
        assert all(greenlet.ready() for greenlet in running), repr(client)
        assert [site.stop() for site in sites] == [0, 0]
    finally:
        over = True
        resent, refused = client.stats.retries, client.stats.rejections
        client.close()
        for site in sites:
            site.close()
    print(f"\nseed {SEED}, two servers, {KILLS // 4} kills: {resent} sent again, {refused} refused")
    print(f"  {dict(sum((caller.seen for caller in callers), Counter[str]()))}")
    for caller in callers:
        assert caller.seen == {"answers": caller.asked}
    merged = tmp_path / "log"
    merged.write_bytes(b"".join(site.log.read_bytes() for site in sites))
    assert not _again(merged)


def _check_journal(path: Path, callers: list[Caller]) -> None:
    """It is whole, and what shares a transaction with its record has happened exactly once."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = Counter(name for (name,) in connection.execute("SELECT name FROM effects"))
    names = {f"{caller.name}.{number + 1}".encode() for caller in callers for number in range(caller.asked)}
    assert {name: rows[name] for name in names if rows[name] != 1} == {}
    assert {name: count for name, count in rows.items() if count > 1} == {}


def _check_once(log: Path, callers: list[Caller]) -> None:
    """What nobody sends again runs at most once."""
    runs = Counter(line.split(b" ", 2)[2] for line in log.read_bytes().splitlines() if line.startswith(b"run first "))
    mine = tuple(caller.name.encode() for caller in callers)
    assert {name: count for name, count in runs.items() if count > 1 and name.startswith(mine)} == {}
