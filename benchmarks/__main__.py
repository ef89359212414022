"""Run all benchmarks: `make bench`, or `make bench BENCH_ARGS=--quick`."""

from __future__ import annotations

import platform
import sys
from statistics import median

import gevent
import zmq

from . import clients, crowd, idle, journals, losses, servers, sockets, waits

Round = dict[str, dict[str, float]]


def show(title: str, rounds: list[Round]) -> None:
    """The medians of the rounds, and how many times the others the last one is (the median of the rounds' ratios)."""
    print(f"\n{title}")
    for what in rounds[0]:
        *others, last = rounds[0][what]
        figures = [f"{who} {median(one[what][who] for one in rounds):7.2f}" for who in (*others, last)]
        ratios = [f"{median(one[what][last] / one[what][who] for one in rounds):.2f} of {who}" for who in others]
        print(f"  {what:<22} {'   '.join(figures)}   = {', '.join(ratios)}", flush=True)


def show_waits(rounds: int, count: int) -> None:
    echo = waits.Echo()
    try:
        show("a wait for a message: µs", [waits.rows(echo, count) for _ in range(rounds)])
    finally:
        echo.close()


def show_clients(rounds: int, count: int) -> None:
    asking = clients.Asking()
    try:
        results = [asking.rows(count) for _ in range(rounds)]
    finally:
        asking.close()
    show("a request, 64 bytes: µs that its caller waits; of many, µs for each", results)


def show_servers(rounds: int, count: int) -> None:
    benches: dict[str, servers.Bench] = {}
    try:
        for kind in servers.KINDS:
            benches[kind] = servers.Bench(kind)
        results = [servers.rows(benches, count) for _ in range(rounds)]
    finally:
        for bench in benches.values():
            bench.close()
    show("a server's request, 64 bytes, ipc: µs of its process's CPU", results)


def show_crowds(rounds: int, most: int, count: int) -> None:
    show("many at a time: KiB of the server's process for each", [crowd.weights(most)])
    with crowd.crowds(most) as all_of_them:
        results = [crowd.costs(all_of_them, count) for _ in range(rounds)]
    show("many at a time, tcp: µs of the server's CPU for a request, while so many of so many clients are in flight", results)


def show_journals(rounds: int, seconds: float) -> None:
    bench = journals.Bench()
    try:
        place = bench.place()
        rates, costs = zip(*[bench.rows(seconds) for _ in range(rounds)], strict=True)
    finally:
        bench.close()
    print(f"\njournals on {place}")
    show("durable requests, 64 bytes, ipc: how many per second", list(rates))
    show("the same: µs of the server's CPU for each", list(costs))


def main() -> None:
    journals.check()
    quick = "--quick" in sys.argv
    rounds = 3 if quick else 21
    versions = f"pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}, gevent {gevent.__version__}"
    print(f"Python {platform.python_version()}, {versions}")
    print("medians of several rounds, in turn; at the end how many times the others the last one is")
    show("a call with nothing to wait for: µs", [sockets.rows(1_000 if quick else 5_000) for _ in range(rounds)])
    show_waits(rounds, 200 if quick else 1_000)
    show("sockets on which nothing happens: ms of CPU per second", [idle.rows(200, 0.2) if quick else idle.rows(10_000, 5)])
    show(
        "until all who wait are told that the server was killed: ms",
        [losses.rows(100 if quick else 1_000) for _ in range(3 if quick else 11)],
    )
    show_clients(3 if quick else 21, 1_000 if quick else 5_000)
    show_servers(3 if quick else 7, 2_000 if quick else 10_000)
    show_journals(1 if quick else 7, 0.1 if quick else 1.5)
    show_crowds(3 if quick else 7, 200 if quick else 10_000, 1_000 if quick else 10_000)


if __name__ == "__main__":
    main()
