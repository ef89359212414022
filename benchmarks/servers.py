"""What does one echoed request cost the server's process, in CPU?

Each server is a process of its own; a second one keeps N requests in flight over ipc with a plain DEALER. `python -m
benchmarks.servers KIND ENDPOINT` is a server: on each line on its standard input it prints its CPU time so far,
after its endpoint.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import zmq

KINDS = ["bare ROUTER loop", "zmq.green + spawn + Timeout", "greensafe.Server"]

#: What clients ask.
REP = "bare REP loop"

BODY = b"x" * 64


def tell() -> None:
    """Answer the lines on standard input."""
    for _ in sys.stdin:
        print(time.process_time(), flush=True)


def bare(endpoint: str) -> None:
    """A ROUTER loop without any safety."""
    threading.Thread(target=tell, daemon=True).start()
    sock = zmq.Context().socket(zmq.ROUTER)
    sock.set_hwm(0)  # at the default of 1000 a plain ROUTER drops answers without a word when its client is that far behind
    sock.bind(endpoint)
    print(sock.last_endpoint.decode(), flush=True)
    while True:
        sock.send_multipart(sock.recv_multipart())


def rep(endpoint: str) -> None:
    """The REP loop of the ZeroMQ guide, which leaves the envelope to libzmq."""
    threading.Thread(target=tell, daemon=True).start()
    sock = zmq.Context().socket(zmq.REP)
    sock.set_hwm(0)
    sock.bind(endpoint)
    print(sock.last_endpoint.decode(), flush=True)
    while True:
        sock.send(sock.recv())


def green(endpoint: str) -> None:
    """The usual way: a greenlet and a Timeout for each request."""
    import gevent
    import zmq.green

    threading.Thread(target=tell, daemon=True).start()
    sock: Any = zmq.green.Context().socket(zmq.ROUTER)
    sock.set_hwm(0)
    sock.bind(endpoint)
    print(sock.last_endpoint.decode(), flush=True)

    def handle(frames: list[bytes]) -> None:
        with gevent.Timeout(30):
            sock.send_multipart(frames)

    while True:
        gevent.spawn(handle, sock.recv_multipart())


def greensafe_server(endpoint: str) -> None:
    """The default Server, with a deadline."""
    import greensafe

    threading.Thread(target=tell, daemon=True).start()
    server = greensafe.Server(endpoint, lambda request: request.body, deadline=30)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()


class Process:
    """A server in a process of its own, which prints its endpoint first."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = self._line().strip()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def cpu(self) -> float:
        """Its CPU time so far, in seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


class Bench:
    """A server process and the load on it."""

    def __init__(self, kind: str, transport: str = "ipc") -> None:
        self._folder = tempfile.TemporaryDirectory()
        endpoint = f"ipc://{self._folder.name}/s" if transport == "ipc" else "tcp://127.0.0.1:*"
        self._process = Process("benchmarks.servers", kind, endpoint)
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.DEALER)
        self._sock.setsockopt(zmq.RCVTIMEO, 20_000)
        self._sock.set_hwm(0)
        self.endpoint = self._process.endpoint
        self._sock.connect(self.endpoint)

    def run(self, inflight: int, count: int) -> float:
        """Microseconds of CPU of the server's process for each of `count` requests."""
        start = self._process.cpu()
        for _ in range(inflight):
            self._sock.send_multipart([b"", BODY])
        for _ in range(count - inflight):
            self._sock.recv_multipart()
            self._sock.send_multipart([b"", BODY])
        for _ in range(inflight):
            self._sock.recv_multipart()
        return (self._process.cpu() - start) / count * 1e6

    def close(self) -> None:
        self._process.close()
        self._sock.close(0)
        self._context.term()
        self._folder.cleanup()


def rows(benches: dict[str, Bench], count: int) -> dict[str, dict[str, float]]:
    """One round: {in flight: {who: microseconds of CPU}}."""
    return {
        f"{inflight} in flight": {kind: bench.run(inflight, count) for kind, bench in benches.items()}
        for inflight in (1, 100, 1000)
    }


if __name__ == "__main__":
    dict(zip((*KINDS, REP), (bare, green, greensafe_server, rep), strict=True))[sys.argv[1]](sys.argv[2])
