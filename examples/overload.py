"""A server that runs four requests at a time, a greedy client that asks a thousand at once, and what others get meanwhile.

overload.py wait      the default: requests wait for their turn, and clients take turns
overload.py reject    overload="reject": what there is no place for is answered RESOURCE_EXHAUSTED at once, and not run
"""

import sys
import time

import gevent
from gevent.event import Event

from greensafe import Client, RemoteError, Server

ENDPOINT = "tcp://127.0.0.1:0"
OPTIONS = {"deadline": 60, "max_inflight": 4}

over = Event()


def handler(request):
    if request.body == b"long":
        over.wait()
    else:
        gevent.sleep(0.01)
    return request.body


def ask(client, body):
    """What comes of a request, and after how many seconds."""
    start = time.monotonic()
    try:
        client.request(body)
        outcome = "answered"
    except RemoteError as error:
        outcome = error.code
    return outcome, time.monotonic() - start


def tell(who, results):
    for outcome in sorted({outcome for outcome, _ in results}):
        seconds = [seconds for each, seconds in results if each == outcome]
        print(f"{who}: {len(seconds)} {outcome}, after {min(seconds):.3f} to {max(seconds):.3f} s", flush=True)


def tell_of(server):
    stats = server.stats
    counts = f"received={stats.received} answered={stats.answered} running={stats.running} backlog={stats.backlog}"
    print(f"    the server: {counts} failures={stats.failures}", flush=True)


def wait():
    with Server(ENDPOINT, handler, **OPTIONS) as server, Client(server.endpoint) as greedy, Client(server.endpoint) as polite:
        asking = [gevent.spawn(ask, greedy, b"short") for _ in range(1000)]
        while server.stats.received < 1000:
            gevent.sleep(0.001)
        tell_of(server)
        tell("polite, one after the other", [ask(polite, b"short") for _ in range(10)])
        tell_of(server)
        tell("greedy", [each.get() for each in asking])
        tell_of(server)


def reject():
    with (
        Server(ENDPOINT, handler, overload="reject", **OPTIONS) as server,
        Server(ENDPOINT, handler, **OPTIONS) as second,
        Client(server.endpoint) as greedy,
        Client(server.endpoint) as polite,
        Client(server.endpoint, second.endpoint) as flexible,
        Client(server.endpoint, retries=10) as patient,
    ):
        asking = [gevent.spawn(ask, greedy, b"long") for _ in range(1000)]
        while greedy.stats.rejections < 996:
            gevent.sleep(0.001)
        tell_of(server)
        tell("polite", [ask(polite, b"short")])
        tell("with a second endpoint", [ask(flexible, b"short") for _ in range(10)])
        print(f"    its client: rejections={flexible.stats.rejections} retries={flexible.stats.retries}")
        retrying = gevent.spawn(ask, patient, b"short")
        while patient.stats.rejections < 3:
            gevent.sleep(0.001)
        over.set()  # the long ones have an end
        tell("with retries", [retrying.get()])
        print(f"    its client: rejections={patient.stats.rejections} retries={patient.stats.retries}")
        tell("greedy", [each.get() for each in asking])
        tell_of(server)


if __name__ == "__main__":
    {"wait": wait, "reject": reject}[sys.argv[1] if len(sys.argv) > 1 else "wait"]()
