"""What does a server take that is asked for more than it has, by clients that do not read, flood it, or die?

The servers are processes, the clients speak ZMTP by hand over tcp and read what they want to. What a server may need is
reckoned from the limits that docs/operations.md names, and is a limit of its process's address space as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from time import monotonic
from typing import Any

import gevent
import pytest
import zmq as plain
import zmtp
from helpers import LONG, running, wait_until

import greensafe as zmq
from greensafe import Client
from greensafe.server.backlog import BACKLOG_BYTES
from greensafe.transport.outbox import OUTBOX, OUTBOXES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Bytes that a server's process has before anybody asks, and that are not for the load.
BASE = 60 * 2**20

#: How much more memory is used than asked for: the allocator's share, and what is on its way from here to there.
SLACK = 1.25

#: Address space that is nobody's memory: the stacks and arenas of threads, mapped libraries.
MAPPED = 2**30

#: "SIZE PAD": a reply of so many bytes. Handlers are few, so that a flood has to wait.
SERVER = """
import json, resource, sys, gevent, greensafe

mark, space = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (space, space))
context = greensafe.Context()
context.setsockopt(greensafe.SNDHWM, mark)
context.setsockopt(greensafe.RCVHWM, mark)
started = 0

def handler(request):
    global started
    if request.body == b"stats":
        stats = server.stats
        return json.dumps({"unsent": stats.unsent, "backlog": stats.backlog, **stats.drops}).encode()
    if request.body == b"started":
        return b"%d" % started
    started += 1
    size = int(request.body.partition(b" ")[0])
    gevent.sleep(0 if size else 0.001)
    return bytes(size)

server = greensafe.Server("tcp://127.0.0.1:0", handler, deadline=None, max_inflight=10, context=context)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
"""


class Served:
    """A server's process with a limit of its memory, and a good client that asks it all the time."""

    def __init__(self, process: Popen[str], endpoint: str, client: Client) -> None:
        self.endpoint = endpoint
        self.client = client
        self.answered = 0
        self.longest = 0.0
        self._process = process

    def stats(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.client.request(b"stats", timeout=LONG))
        return found

    def peak(self) -> int:
        """Bytes that were resident at most."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024

    def ask(self) -> None:
        while True:
            start = monotonic()
            assert self.client.request(b"100 x", timeout=LONG) == bytes(100)
            self.longest = max(self.longest, monotonic() - start)
            self.answered += 1


@contextmanager
def _served(context: zmq.Context, mark: int, limit: int) -> Iterator[Served]:
    command = [sys.executable, "-c", SERVER, str(mark), str(limit + MAPPED)]
    with running(command) as (process, endpoint), Client(endpoint, context=context) as client:
        served = Served(process, endpoint, client)
        asking = gevent.spawn(served.ask)
        try:
            yield served
            assert not asking.ready(), asking.exception
        finally:
            asking.kill()
        print(
            f"\n  {served.peak() / 2**20:.0f} MiB at most, the limit is {limit / 2**20:.0f};"
            f" {served.answered} others answered, {served.longest:.2f} s at most"
        )
        assert served.peak() < limit


def _reckon(peers: int, mark: int, size: int, outbox: int) -> int:
    """Bytes that answers for peers that do not read may take: libzmq's mark of messages for each, and the outboxes.

    libzmq opens a pipe again at half its mark, and has some messages in its hands: twice the mark is more than it ever holds.
    """
    return int((peers * 2 * mark * size + min(peers * outbox, OUTBOXES)) * SLACK) + BASE


@pytest.mark.parametrize(
    ("peers", "mark", "size", "count"),
    [
        pytest.param(40, 1000, 4_000, 8_000, id="libzmq's default mark, answers of 4 kB"),
        pytest.param(40, 5, 1_000_000, 100, id="a mark of 5, answers of 1 MB"),
    ],
)
def test_clients_that_never_read(context: zmq.Context, peers: int, mark: int, size: int, count: int) -> None:
    """What is kept for them ends at the limits, the rest is dropped and counted, and others are served all the time."""
    limit = _reckon(peers, mark, size, OUTBOX)
    assert peers * count * size > 1.5 * limit  # or nothing would be shown
    with _served(context, mark, limit) as served:
        silent = [zmtp.connect(served.endpoint, buffer=4096) for _ in range(peers)]
        try:
            asking = [gevent.spawn(_flood, each, [b"", b"%d" % size], count) for each in silent]
            wait_until(lambda: served.stats()["full_outbox"] > 0, 4 * LONG)
            before = served.answered
            wait_until(lambda: served.answered > before + 200)
            gevent.killall(asking)
        finally:
            for each in silent:
                each.close(is_reset=True)
        # What was for those that are gone is dropped.
        wait_until(lambda: served.stats()["unsent"] == 0)
        assert served.stats()["unreachable"] > 0


def test_slow_readers(context: zmq.Context) -> None:
    """Who reads slowly gets all that was kept for him, in order, while others never read."""
    size, count, readers, others = 1_000_000, 15, 5, 10
    # Nothing is to be dropped: neither one's answers nor those of all are more than is kept.
    assert count * size < OUTBOX and (readers + others) * count * size < OUTBOXES
    with _served(context, 5, _reckon(readers + others, 5, size, OUTBOX)) as served:
        silent = [zmtp.connect(served.endpoint, buffer=4096) for _ in range(others)]
        slow = [zmtp.connect(served.endpoint, buffer=4096) for _ in range(readers)]
        for each in [*slow, *silent]:
            _flood(each, [b"", b"%d" % size], count)

        def read(connection: zmtp.Connection) -> None:
            for _ in range(count):
                gevent.sleep(0.1)
                assert connection.receive() == [b"", bytes(size)]

        reading = [gevent.spawn(read, each) for each in slow]
        try:
            gevent.joinall(reading, raise_error=True, timeout=4 * LONG)
            assert all(each.ready() for each in reading)
            assert served.stats()["full_outbox"] == 0
        finally:
            gevent.killall(reading)
            for each in [*slow, *silent]:
                each.close(is_reset=True)


def test_a_flood_of_large_requests(context: zmq.Context) -> None:
    """What is read ends at the backlog's limit; the rest waits at its senders, and others are served in turn."""
    peers, mark, size, count = 30, 5, 1_000_000, 60
    limit = int((peers * 2 * mark * size + BACKLOG_BYTES + 20 * size) * SLACK) + BASE
    assert peers * count * size > 1.5 * limit
    with _served(context, mark, limit) as served:
        flooding = [zmtp.connect(served.endpoint) for _ in range(peers)]
        try:
            asking = [gevent.spawn(_flood, each, [b"", b"0 " + bytes(size)], count) for each in flooding]
            reading = [gevent.spawn(_read, each, count) for each in flooding]
            wait_until(lambda: served.stats()["backlog"] > 50)
            gevent.joinall([*asking, *reading], raise_error=True, timeout=4 * LONG)
            assert all(each.value == count for each in reading)
        finally:
            gevent.killall([*asking, *reading])
            for each in flooding:
                each.close(is_reset=True)


def test_a_client_with_a_hundred_thousand_requests(context: zmq.Context) -> None:
    """It fills the backlog and what lies before it, with an id of its own before each; another one is served in its turn."""
    count = 100_000
    with _served(context, 1000, 4 * BASE) as served:
        greedy: Any = plain.Context.shadow(context).socket(plain.DEALER)
        greedy.set_hwm(0)
        greedy.connect(served.endpoint)
        try:
            for number in range(count):
                greedy.send_multipart([b"%d" % number, b"", b"0"])
            wait_until(lambda: served.stats()["backlog"] > 9_900)
            before = int(served.client.request(b"started"))
            asked = 0
            while asked < 200:
                now = int(served.client.request(b"started"))
                # Turns, not time: in the order of arrival ten thousand would be before it.
                assert now - before < 5_000
                before = now
                asked += 1
            assert before < count - 10_000
            got: set[bytes] = set()

            def take() -> bool:
                while greedy.poll(0):
                    number, _, _ = greedy.recv_multipart()
                    assert number not in got
                    got.add(number)
                return len(got) == count

            wait_until(take, 8 * LONG)
        finally:
            greedy.close(0)


def _flood(connection: zmtp.Connection, request: list[bytes], count: int) -> None:
    data = zmtp.message(request)
    each = max(1, 100_000 // len(data))
    for start in range(0, count, each):
        connection.sock.sendall(data * min(each, count - start))


def _read(connection: zmtp.Connection, count: int) -> int:
    answers: list[list[bytes]] = [connection.receive() for _ in range(count)]
    return len(answers)
