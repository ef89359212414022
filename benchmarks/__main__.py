"""Run all benchmarks: `make bench`, or `make bench BENCH_ARGS=--quick`."""

from __future__ import annotations

import platform
import sys
from statistics import median

import gevent
import zmq

from . import servers, sockets


def show(title: str, rounds: list[dict[str, dict[str, float]]], base: str) -> None:
    """The median of the rounds for each row, and how many times `base` that is."""
    print(f"\n{title}")
    for what in rounds[0]:
        took = {who: median(one[what][who] for one in rounds) for who in rounds[0][what]}
        reference = took.get(base) or next(iter(took.values()))
        cells = [f"{who} {microseconds:7.2f} ({microseconds / reference:4.2f})" for who, microseconds in took.items()]
        print(f"  {what:<22} " + "   ".join(cells))


def main() -> None:
    quick = "--quick" in sys.argv
    rounds, count, requests = (3, 5_000, 3_000) if quick else (7, 20_000, 10_000)
    versions = f"pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}, gevent {gevent.__version__}"
    print(f"Python {platform.python_version()}, {versions}")
    print(f"medians of {rounds} rounds, in turn; in brackets the ratio to the row's base")
    show("a socket's call: µs (base: zmq.green)", [sockets.rows(count) for _ in range(rounds)], "zmq.green")
    benches: dict[str, servers.Bench] = {}
    try:
        for kind in servers.KINDS:
            benches[kind] = servers.Bench(kind)
        results = [servers.rows(benches, requests) for _ in range(rounds)]
    finally:
        for bench in benches.values():
            bench.close()
    show("a server's request, 64 bytes, ipc: µs of its process's CPU (base: bare loop)", results, servers.KINDS[0])


if __name__ == "__main__":
    main()
