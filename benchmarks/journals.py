"""What does it cost that a request outlives its server?

Requests per second, and the CPU of the server's process for each, with so many in flight. All of them echo 64 bytes, and are
processes of their own; the journals are files in the current folder, made durable by fsync:

    no journal  a Server
    one by one  with a journal that makes a transaction for each write, so three for a request: what group commit saves
    huey        a task queue in a sqlite file, with one worker: what the package registry has for the same job without a broker
                besides it. A task and its result are durable, and the result is asked for by id; it commits four times for each
    journal     a Server with a journal, as it is

The load on a Server is a plain DEALER that sends what a Client does, with an ACK for each answer to a server with a journal.

`python -m benchmarks.journals KIND ENDPOINT FILE` is a server, which tells its CPU time as those of `servers` do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any, Protocol

import zmq

import greensafe
from greensafe.journal import Journal, SqliteJournal
from greensafe.sansio.envelope import NO_JOURNAL, Kind, ServerHeader, decode, pack
from greensafe.sansio.records import Write

from .servers import BODY, Process, tell

KINDS = ["no journal", "one by one", "huey", "journal"]

INFLIGHT = (1, 100, 1000)

#: Seconds for which a huey worker, or who waits for its result, looks away when there is nothing: its own 0.1 would be all
#: that is measured with one in flight.
_LOOK = 0.001

#: Times that fsync is measured.
_SYNCS = 100

Figures = dict[str, dict[str, float]]


class OneByOne(Journal):
    """A journal that makes a transaction for each write."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def open(self) -> None:
        self._journal.open()
        self.id = self._journal.id

    def close(self) -> None:
        self._journal.close()

    def now(self) -> float:
        return self._journal.now()

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        return [self._journal.commit([write])[0] for write in writes]

    def tidy(self, running: Collection[bytes]) -> bool:
        return self._journal.tidy(running)

    @property
    def dropped(self) -> Mapping[str, int]:
        return self._journal.dropped


def check() -> None:
    """Exit with advice if what is compared with is not there."""
    if importlib.util.find_spec("huey") is None:
        sys.exit("the benchmarks compare with huey: pip install 'greensafe[bench]', or pip install huey")


def _serve(kind: str, endpoint: str, file: str) -> None:
    journal: Journal | None = None
    if kind != "no journal":
        journal = SqliteJournal(file)
        if kind == "one by one":
            journal = OneByOne(journal)
    threading.Thread(target=tell, daemon=True).start()
    server = greensafe.Server(endpoint, lambda request: request.body, deadline=30, journal=journal)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()


def _huey(file: str) -> tuple[Any, Any]:
    """A huey and its task."""
    from huey import SqliteHuey

    huey = SqliteHuey(filename=file, fsync=True, timeout=60)

    def echo(body: bytes) -> bytes:
        return body

    echo.__module__ = "benchmarks.journals"  # which is called __main__ in the worker, and that is part of a task's name
    return huey, huey.task()(echo)


def _work(kind: str, endpoint: str, file: str) -> None:
    huey, _ = _huey(file)
    threading.Thread(target=tell, daemon=True).start()
    huey.create_consumer(workers=1, periodic=False, initial_delay=_LOOK, max_delay=_LOOK).start()
    print(endpoint, flush=True)
    threading.Event().wait()


class _Load(Protocol):
    """Who asks one server."""

    def ask(self) -> None:
        """Send a request."""

    def hear(self) -> None:
        """Wait for an answer."""

    def close(self) -> None:
        """Give up what it holds."""


class _Dealer:
    """The load on a Server."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.DEALER)
        self._sock.setsockopt(zmq.RCVTIMEO, 60_000)
        self._sock.set_hwm(0)
        self._sock.connect(endpoint)
        self._prefix = os.urandom(8)
        self._count = 0

    def ask(self) -> None:
        self._count += 1
        request_id = self._prefix + self._count.to_bytes(8, "big")
        self._sock.send_multipart([pack(Kind.REQUEST, request_id, None, 0, 0, b""), b"", BODY])

    def hear(self) -> None:
        frame, _, body = self._sock.recv_multipart()
        header = decode(frame)
        assert isinstance(header, ServerHeader) and header.kind == Kind.REPLY and body == BODY, body
        if header.journal != NO_JOURNAL:
            self._sock.send_multipart([pack(Kind.ACK, header.request_id, None, 0, 0, b""), b"", b""])

    def close(self) -> None:
        self._sock.close(0)
        self._context.term()


class _Tasks:
    """The load on a huey worker."""

    def __init__(self, file: str) -> None:
        self._huey, self._echo = _huey(file)
        self._results: deque[Any] = deque()

    def ask(self) -> None:
        self._results.append(self._echo(BODY))

    def hear(self) -> None:
        assert self._results.popleft()(blocking=True, timeout=60, max_delay=_LOOK) == BODY

    def close(self) -> None:
        self._huey.storage.close()


class Bench:
    """All servers, the load on them, and the folder where their files are."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = tempfile.TemporaryDirectory(dir=".", prefix=".bench-")
        self._processes: dict[str, Process] = {}
        self._loads: dict[str, _Load] = {}
        try:
            for kind in KINDS:
                name = kind.replace(" ", "-")
                file = os.path.join(self._files.name, name)
                endpoint = f"ipc://{self._folder.name}/{name}"
                self._processes[kind] = process = Process("benchmarks.journals", kind, endpoint, file)
                self._loads[kind] = _Tasks(file) if kind == "huey" else _Dealer(process.endpoint)
        except BaseException:
            self.close()
            raise

    def place(self) -> str:
        """Where the files are, and what one fsync costs there."""
        return f"{_file_system(self._files.name)}, a write and fsync of 4 KiB there {_fsync(self._files.name):.0f} µs"

    def rows(self, seconds: float) -> tuple[Figures, Figures]:
        """One round: {in flight: {who: requests per second}}, and {in flight: {who: microseconds of CPU}}."""
        rates: Figures = {}
        costs: Figures = {}
        for inflight in INFLIGHT:
            what = f"{inflight} in flight"
            for kind in KINDS:
                rate, cost = self._run(kind, inflight, seconds)
                rates.setdefault(what, {})[kind] = rate
                costs.setdefault(what, {})[kind] = cost
        return rates, costs

    def _run(self, kind: str, inflight: int, seconds: float) -> tuple[float, float]:
        """Keep so many in flight for so long, and wait for them all."""
        process, load = self._processes[kind], self._loads[kind]
        cpu, start = process.cpu(), time.perf_counter()
        for _ in range(inflight):
            load.ask()
        count = inflight
        while time.perf_counter() - start < seconds:
            load.hear()
            load.ask()
            count += 1
        for _ in range(inflight):
            load.hear()
        return count / (time.perf_counter() - start), (process.cpu() - cpu) / count * 1e6

    def close(self) -> None:
        for load in self._loads.values():
            load.close()
        for process in self._processes.values():
            process.close()
        self._folder.cleanup()
        self._files.cleanup()


def _fsync(folder: str) -> float:
    """The median, in microseconds."""
    times = []
    with open(os.path.join(folder, "fsync"), "wb", buffering=0) as file:
        for _ in range(_SYNCS):
            start = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return median(times) * 1e6


def _file_system(folder: str) -> str:
    """Its type; Linux only."""
    device = os.stat(folder).st_dev
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
            lines = [line.split() for line in mounts]
    except OSError:
        lines = []
    name = f"{os.major(device)}:{os.minor(device)}"
    return next((line[line.index("-") + 1] for line in lines if line[2] == name), "a file system of unknown type")


if __name__ == "__main__":
    (_work if sys.argv[1] == "huey" else _serve)(*sys.argv[1:])
