"""What do thousands of clients, and thousands of requests at a time, cost one server?

The server is a process of its own (`python -m benchmarks.crowd ENDPOINT`) whose handlers wait: each until as many have come
after it as are to be in flight. The clients are raw connections of this process, which have shaken hands as REQ sockets do.
However many requests are in flight, the same number of them is on its way, so only what waits is compared.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zmq

from .servers import BODY

#: Requests on their way to the server or back, whatever waits there.
MOVING = 50

#: Descriptors that are not for clients.
SPARE = 500

#: Seconds after which something is wrong.
LIMIT = 60.0

#: ZMTP 3.0 with the NULL mechanism: the greeting, and the command that ends the handshake of a REQ.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REQ"

#: What goes over the wire for one request, and comes back for it: an empty frame and the body.
MESSAGE = struct.pack("!BBBB", 1, 0, 0, len(BODY)) + BODY


def serve(endpoint: str) -> None:
    """Handlers wait. What is no `BODY` is a number: so many are to be in flight from now on; the answer is the CPU so far."""
    from gevent.event import Event

    import greensafe

    keep = 0
    waiting: deque[Event] = deque()

    def handle(request: greensafe.Request) -> bytes:
        nonlocal keep
        if request.body != BODY:
            keep = int(request.body)
            while len(waiting) > keep:
                waiting.popleft().set()
            return b"%r" % time.process_time()
        turn = Event()
        waiting.append(turn)
        if len(waiting) > keep:
            waiting.popleft().set()
        turn.wait()
        return request.body

    server = greensafe.Server(endpoint, handle, deadline=600, max_inflight=20_000)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()


class Crowd:
    """A server, and raw clients of it."""

    def __init__(self, transport: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        endpoint = f"ipc://{self._folder.name}/s" if transport == "ipc" else "tcp://127.0.0.1:0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.crowd", endpoint], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._endpoint = self._process.stdout.readline().strip()
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.REQ)
        self._control.setsockopt(zmq.RCVTIMEO, int(LIMIT * 1000))
        self._control.connect(self._endpoint)
        self._poll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self.keep(0)

    def close(self) -> None:
        self.leave()
        self._poll.close()
        self._control.close(0)
        self._context.term()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()

    def keep(self, inflight: int) -> float:
        """Have the server keep so many in flight; returns its CPU so far, in seconds."""
        self._control.send(b"%d" % inflight)
        return float(self._control.recv())

    def memory(self) -> float:
        """KiB of the server's process that are resident."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1024

    def come(self, count: int) -> None:
        """So many more clients."""
        for _ in range(count):
            made = _connect(self._endpoint)
            self._clients[made.fileno()] = made
            self._poll.register(made, select.EPOLLIN)

    def leave(self) -> None:
        """All clients go."""
        for client in self._clients.values():
            if client.family == socket.AF_INET:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # or its port waits a minute
            client.close()
        self._clients.clear()

    def ask(self, count: int) -> None:
        """So many requests, as evenly as can be."""
        clients = list(self._clients.values())
        for number in range(count):
            clients[number % len(clients)].sendall(MESSAGE)

    def take(self, count: int, is_asking: bool) -> None:
        """So many answers; whoever gets one asks again, if `is_asking`."""
        got = 0
        end = time.monotonic() + LIMIT
        while got < count:
            assert time.monotonic() < end, f"{got} of {count} answers"
            for fd, _ in self._poll.poll(1):
                client = self._clients[fd]
                # What is read ends with an answer: 68 bytes are not torn, with so few on their way.
                answers, rest = divmod(len(client.recv(len(MESSAGE) * 64)), len(MESSAGE))
                assert answers and not rest
                got += answers
                if is_asking:
                    client.sendall(MESSAGE * answers)

    def cost(self, inflight: int, count: int) -> float:
        """Microseconds of CPU of the server's process for each of about `count` requests while `inflight` others wait."""
        self.keep(inflight)
        self.ask(inflight + MOVING)
        self.take(MOVING, True)
        start = self.keep(inflight)
        self.take(count, True)
        cost = (self.keep(inflight) - start) / count * 1e6
        self.keep(0)
        self.take(inflight + MOVING, False)
        return cost

    def weigh(self, inflight: int) -> float:
        """KiB for each request in flight."""
        self.keep(inflight)
        before = self.memory()
        self.ask(inflight)
        self.keep(inflight)  # answered when those before it have been read
        weight = (self.memory() - before) / inflight
        self.keep(0)
        self.take(inflight, False)
        return weight


def _connect(endpoint: str) -> socket.socket:
    transport, _, address = endpoint.partition("://")
    if transport == "ipc":
        made = socket.socket(socket.AF_UNIX)
        made.connect(address)
    else:
        host, port = address.split(":")
        made = socket.create_connection((host, int(port)))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.sendall(GREETING)
    _read(made, len(GREETING))
    made.sendall(READY)
    _, size = _read(made, 2)
    _read(made, size)
    return made


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError("the server is gone")
        data += more
    return data


@contextmanager
def _crowd(transport: str) -> Iterator[Crowd]:
    crowd = Crowd(transport)
    try:
        yield crowd
    finally:
        crowd.close()


def weights(most: int) -> dict[str, dict[str, float]]:
    """{what: {transport: KiB}}."""
    most = _at_most(most)
    found: dict[str, dict[str, float]] = {f"of {most} idle clients": {}, f"of {most} requests in flight": {}}
    for transport in ("tcp", "ipc"):
        with _crowd(transport) as crowd:
            before = crowd.memory()
            crowd.come(most)
            crowd.ask(most)  # each is known to the server
            crowd.take(most, False)
            crowd.keep(0)
            found[f"of {most} idle clients"][transport] = (crowd.memory() - before) / most
            found[f"of {most} requests in flight"][transport] = crowd.weigh(most)
    return found


def costs(crowds: Sequence[tuple[int, int, Crowd]], count: int) -> dict[str, dict[str, float]]:
    """One round: {what: {in flight, and of how many clients: microseconds of CPU}}."""
    return {
        "a handler that waits": {f"{inflight} of {clients}": crowd.cost(inflight, count) for inflight, clients, crowd in crowds}
    }


@contextmanager
def crowds(most: int) -> Iterator[list[tuple[int, int, Crowd]]]:
    """Servers with few clients and with many, for `costs`."""
    most = _at_most(most)
    few = min(100, most)
    with _crowd("tcp") as small, _crowd("tcp") as large:
        small.come(few)
        large.come(most)
        yield [(few, few, small), (few, most, large), (most, few, small), (most, most, large)]


def _at_most(most: int) -> int:
    """As many clients as files may be open; both sides need one for each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(most, hard - SPARE)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serve(sys.argv[1])
