"""What may handlers do to the server that runs them?

A request's body is "NAME MODE"; a mode is a way to answer, or not to. `EXPECTED` says for each what its client is to get.
`python misbehaving.py ENDPOINT OVERLOAD JOURNAL` serves them until SIGTERM, notes in JOURNAL each that was run, and prints
how it ended.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent

from greensafe import LATER, LocalProtocolError, Request, Server

__all__ = ["DEADLINE", "EXPECTED", "WEIGHED", "answer_to", "counts", "misbehaving_server", "stats_of"]

#: Of the handlers, in seconds, and the grace between its signal and the kill.
DEADLINE = 0.5
GRACE = 0.1

#: Handlers at a time: few, so that most requests have to wait.
MAX_INFLIGHT = 25

BIG = 200_000

#: Requests that were promised an answer which does not come.
_kept: list[Request] = []


def answer_to(body: bytes) -> bytes:
    """The one right answer, where there is one."""
    return b"answer to " + body + (bytes(BIG) if body.endswith(b" big") else b"")


def _raise(error: BaseException) -> None:
    raise error


def _hang(request: Request) -> None:
    gevent.sleep(3600)


def _survive(request: Request) -> None:
    """Become a zombie, for a while."""
    end = time.monotonic() + 3 * DEADLINE
    while time.monotonic() < end:
        with suppress(BaseException):
            gevent.sleep(max(0.001, end - time.monotonic()))


def _wait(request: Request) -> bytes:
    gevent.sleep(random.uniform(0, 0.05))
    return answer_to(request.body)


def _spin(request: Request) -> bytes:
    end = time.monotonic() + 0.02
    while time.monotonic() < end:
        pass
    return answer_to(request.body)


def _twice(request: Request) -> bytes:
    request.reply(answer_to(request.body))
    return b"second"


def _later(request: Request) -> Any:
    gevent.spawn_later(0.02, _try_to_reply, request)
    return LATER


def _too_late(request: Request) -> Any:
    gevent.spawn(_reply_when_answered, request)
    return LATER


def _reply_when_answered(request: Request) -> None:
    # Not by the clock: when the hub was held up past a deadline, a reply that is ready by then wins over it.
    while not request.replied:
        gevent.sleep(0.01)
    _try_to_reply(request)


def _try_to_reply(request: Request) -> None:
    with suppress(LocalProtocolError):  # the watchdog was faster
        request.reply(answer_to(request.body))


def _keep(request: Request) -> Any:
    _kept.append(request)
    gevent.spawn_later(2 * DEADLINE, _kept.remove, request)
    return LATER


def _kill_itself(request: Request) -> None:
    gevent.getcurrent().kill()


ANSWER, OVERDUE = "", "DEADLINE_EXCEEDED"

#: mode -> (handler, the code of the error that its client gets, `ANSWER` for none, how often it is asked for)
_MODES: dict[str, tuple[Callable[[Request], Any], str, int]] = {
    "ok": (lambda request: answer_to(request.body), ANSWER, 20),
    "big": (lambda request: answer_to(request.body), ANSWER, 3),
    "waits": (_wait, ANSWER, 10),
    "spins": (_spin, ANSWER, 1),
    "twice": (_twice, ANSWER, 3),
    "later": (_later, ANSWER, 5),
    "too-late": (_too_late, OVERDUE, 1),
    "never": (_keep, OVERDUE, 1),
    "forgotten": (lambda request: LATER, "INTERNAL", 2),
    "hangs": (_hang, OVERDUE, 1),
    "survives": (_survive, OVERDUE, 1),
    "raises": (lambda request: _raise(ValueError("no")), "INTERNAL", 3),
    "not-json": (lambda request: request.json(), "INVALID_ARGUMENT", 2),
    "none": (lambda request: None, "INTERNAL", 2),
    "nonsense": (lambda request: {"not": "bytes"}, "INTERNAL", 2),
    "exits": (lambda request: sys.exit(3), "INTERNAL", 2),
    "interrupts": (lambda request: _raise(KeyboardInterrupt()), "INTERNAL", 2),
    "kills-itself": (_kill_itself, "ABORTED", 2),
    "no-memory": (lambda request: _raise(MemoryError()), "RESOURCE_EXHAUSTED", 1),
}

#: What a mode's client gets: the code of an error, or "" for `answer_to`.
EXPECTED = {mode: code for mode, (_, code, _) in _MODES.items()}

#: The modes, each as often as it is to be asked for.
WEIGHED = [mode for mode, (_, _, weight) in _MODES.items() for _ in range(weight)]


def counts() -> dict[str, float]:
    """What this process holds: descriptors, greenlets that have not ended, threads, MiB that are resident."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "greenlets": sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects()),
        "threads": int(status["Threads"]),
        "MiB": int(status["VmRSS"].split()[0]) / 1024,
    }


def misbehaving_server(endpoint: str, journal: Path | str, **options: Any) -> Server:
    """A server of all modes; "stats" and "counts" are answered with JSON."""

    def handle(request: Request) -> Any:
        if request.body == b"stats":
            return stats_of(server).encode()
        if request.body == b"counts":
            return json.dumps(counts()).encode()
        mode = request.body.decode().split(" ")[1]
        with open(journal, "ab", buffering=0) as ran:
            ran.write(request.body + b"\n")
        return _MODES[mode][0](request)

    server = Server(endpoint, handle, deadline=DEADLINE, grace=GRACE, max_inflight=MAX_INFLIGHT, **options)
    return server


def stats_of(server: Server) -> str:
    """Its stats as JSON, without its zombies' names."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(server.stats, zombies=())))


if __name__ == "__main__":
    logging.disable()  # every second request fails
    serving = misbehaving_server(sys.argv[1], sys.argv[3], overload=sys.argv[2])
    serving.start()
    print(serving.endpoint, flush=True)
    serving.serve_forever()
    print(stats_of(serving), flush=True)
