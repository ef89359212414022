"""Two minutes of random faults: does every request end, with its own answer or an error, and does nothing grow?

Servers (greensafe's and a plain REP) are processes that are killed, stopped and restarted; links to them fail in every way.
GREENSAFE_FAULT_SEED and GREENSAFE_FAULT_SECONDS choose another run. A seed repeats which faults there are, and when; what
requests they meet is up to the machine.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG, ROOT, wait_until

import greensafe as zmq
from greensafe import Client
from greensafe.errors import OperationTimeout, PeerError, RemoteError
from greensafe.testing import FaultyLink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEED = int(os.environ.get("GREENSAFE_FAULT_SEED", "20"))
SECONDS = float(os.environ.get("GREENSAFE_FAULT_SECONDS", "120"))

#: Of the clients, and of the servers' handlers, in seconds.
HEARTBEAT = 1.0
DEADLINE = 3.0

#: Seconds beyond which no request may last, whatever happens: faults last up to 3, and a retried request meets several.
LONGEST = 60.0

SERVER = """
import os, random, sys, time, zlib
kind, endpoint, journal, deadline = sys.argv[1:]
ran = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def answer(body, sleep):
    check, _, rest = body.partition(b" ")
    if b"%d" % zlib.crc32(rest) != check:
        return b"0 damaged"
    name, naps, size = rest.split(b" ")[:3]
    os.write(ran, name + b"\\n")
    sleep(float(naps))
    reply = b"answer to " + name + b" " + bytes(int(size))
    return b"%d " % zlib.crc32(reply) + reply

if kind == "plain":
    import zmq
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(endpoint)
    print("ready", flush=True)
    while True:
        socket.send(answer(socket.recv(), time.sleep))
else:
    import gevent, greensafe
    def handle(request):
        return answer(request.body, gevent.sleep)
    server = greensafe.Server(endpoint, handle, deadline=float(deadline), max_inflight=20)
    server.start()
    print("ready", flush=True)
    server.serve_forever()
"""


class Site:
    """A server's process, the link to it, and what can happen to them."""

    def __init__(self, kind: str, endpoint: str, listen: str, journal: Path) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.journal = journal
        self.process = self._start()
        self.link = FaultyLink(endpoint, listen)

    def _start(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SERVER, self.kind, self.endpoint, str(self.journal), str(DEADLINE)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=env)

    def kill(self, pause: float) -> None:
        """SIGKILL, and a new process after a pause."""
        self.process.kill()
        self._wait()
        gevent.sleep(pause)
        self.process = self._start()

    def term(self, pause: float) -> None:
        """SIGTERM: it stops in an orderly way, if it is greensafe's."""
        self.process.terminate()
        wait_until(lambda: self.process.poll() is not None)
        self.kill(pause)

    def stop(self, pause: float) -> None:
        """SIGSTOP, and SIGCONT after a pause."""
        self.process.send_signal(signal.SIGSTOP)
        gevent.sleep(pause)
        self.process.send_signal(signal.SIGCONT)

    def _wait(self) -> None:
        wait_until(lambda: self.process.poll() is not None)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        self.process.kill()
        self._wait()
        self.link.close()


def _lasting(name: str, *args: Any) -> Callable[[Site, float], None]:
    def act(site: Site, pause: float) -> None:
        getattr(site.link, name)(*args)
        gevent.sleep(pause)
        site.link.heal()

    act.__name__ = name
    return act


def _passing(name: str, *args: Any) -> Callable[[Site, float], None]:
    def act(site: Site, pause: float) -> None:
        getattr(site.link, name)(*args)

    act.__name__ = name
    return act


FAULTS: list[Callable[[Site, float], None]] = [
    Site.kill,
    Site.kill,
    Site.term,
    Site.stop,
    Site.stop,
    _lasting("cut"),
    _lasting("cut", "to_client"),
    _lasting("stall"),
    _lasting("stall", "to_server"),
    _lasting("delay", 0.2),
    _lasting("throttle", 50_000),
    _lasting("refuse"),
    _passing("reset"),
    _passing("hang_up"),
    _passing("half_close", "to_server"),
    _passing("half_close", "to_client"),
]

#: Of a byte that is changed neither side may hear; so only where callers have limits.
CORRUPT = _passing("corrupt")


def _break(site: Site, chance: random.Random, until: float, seen: Counter[str]) -> None:
    """One fault after the other at one site."""
    faults = [*FAULTS, CORRUPT, CORRUPT] if site.kind == "plain" else FAULTS
    while monotonic() < until:
        gevent.sleep(chance.uniform(0.1, 1.5))
        fault = chance.choice(faults)
        seen[fault.__name__] += 1
        fault(site, chance.choice([0.05, 0.3, 1.0, 3.0]))


class Asker:
    """One caller: asks, checks what comes, counts."""

    def __init__(self, name: str, ask: Callable[[bytes, bool], bytes], chance: random.Random, may_repeat: bool) -> None:
        self.name = name
        self.seen: Counter[str] = Counter()
        self.longest = 0.0
        self._ask = ask
        self._chance = chance
        self._may_repeat = may_repeat

    def run(self, until: float) -> None:
        number = 0
        while monotonic() < until:
            number += 1
            self._one(number)
            gevent.sleep(self._chance.choice([0, 0, 0.01, 0.05]))

    def _one(self, number: int) -> None:
        idempotent = self._may_repeat and self._chance.random() < 0.5
        name = f"{self.name}.{number}.{'twice' if idempotent else 'once'}".encode()
        naps = self._chance.choice([b"0", b"0", b"0.01", b"0.1", b"0.5" if "plain" in self.name else b"2.5"])
        size = self._chance.choice([b"0", b"0", b"1000", b"100000"])
        rest = b"%s %s %s " % (name, naps, size) + bytes(self._chance.choice([0, 0, 2000, 100_000]))
        start = monotonic()
        try:
            reply = self._ask(b"%d " % zlib.crc32(rest) + rest, idempotent)
        except (PeerError, RemoteError, OperationTimeout, zmq.ProtocolError) as error:
            code = f" {error.code}" if isinstance(error, RemoteError) else ""
            self.seen[type(error).__name__ + code] += 1
        else:
            self.seen[self._judge(reply, name, int(size))] += 1
        self.longest = max(self.longest, monotonic() - start)

    def _judge(self, reply: bytes, name: bytes, size: int) -> str:
        check, _, text = reply.partition(b" ")
        if reply == b"0 damaged" or check != b"%d" % zlib.crc32(text):
            return "damaged"
        return "answers" if text == b"answer to " + name + b" " + bytes(size) else f"WRONG {text[:60]!r} for {name!r}"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory() -> float:
    """MiB of this process that are resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Growth:
    """What this process holds, from time to time; links and callers come and go all the time, the trend counts."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, int, float]] = []

    def run(self) -> None:
        start = monotonic()
        while True:
            gevent.sleep(SECONDS / 24)
            gc.collect()
            greenlets = sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects())
            self.samples.append((monotonic() - start, _descriptors(), greenlets, _memory()))

    def halves(self, index: int) -> tuple[float, float]:
        """The means of the second and the last quarter."""
        values = [sample[index] for sample in self.samples]
        quarter = len(values) // 4
        return sum(values[quarter : 2 * quarter]) / quarter, sum(values[-quarter:]) / quarter


def _req(context: zmq.Context, endpoint: str) -> Callable[[bytes, bool], bytes]:
    """A plain REQ, as a program that was moved from zmq.green has it."""
    sock = context.socket(zmq.REQ)
    sock.connect(endpoint)

    def ask(body: bytes, idempotent: bool) -> bytes:
        sock.send(body, timeout=5)
        reply: bytes = sock.recv(timeout=5)
        return reply

    return ask


def test_random_faults(context: zmq.Context, tmp_path: Path) -> None:
    """Every request ends, with its own answer or an error; what may run once only does; nothing grows."""
    journal = tmp_path / "ran"
    chance = random.Random(SEED)
    ports = [zmq.Context.instance().socket(zmq.REP) for _ in range(2)]
    free = [f"tcp://127.0.0.1:{port.bind_to_random_port('tcp://127.0.0.1')}" for port in ports]
    for port in ports:
        port.close(0)
    zmq.Context.instance().term()
    sites = [
        Site("greensafe", free[0], "tcp://127.0.0.1:0", journal),
        Site("greensafe", f"ipc://{tmp_path}/one", f"ipc://{tmp_path}/link", journal),
        Site("plain", free[1], "tcp://127.0.0.1:0", journal),
    ]
    tcp, ipc, rep = (site.link.endpoint for site in sites)
    clients = {
        "raises": Client(tcp, ipc, context=context, heartbeat=HEARTBEAT),
        "retries": Client(tcp, ipc, context=context, heartbeat=HEARTBEAT, retries=10),
        "hasty": Client(tcp, ipc, context=context, heartbeat=HEARTBEAT, wait=False, retries=1),
        "one": Client(tcp, context=context, heartbeat=HEARTBEAT),
        "local": Client(ipc, context=context, heartbeat=HEARTBEAT, timeout=20),
        "plain-server": Client(rep, context=context, heartbeat=HEARTBEAT, timeout=5, retries=2),
    }
    asks: dict[str, Callable[[bytes, bool], bytes]] = {
        name: lambda body, idempotent, client=client: client.request(body, idempotent=idempotent)  # type: ignore[misc]
        for name, client in clients.items()
    }
    asks |= {f"req-{where}": _req(context, endpoint) for where, endpoint in (("tcp", tcp), ("ipc", ipc), ("plain", rep))}
    askers = [
        Asker(f"{name}-{number}", ask, random.Random(f"{SEED} {name} {number}"), not name.startswith("req"))
        for name, ask in asks.items()
        for number in range(1 if name.startswith("req") else 4)
    ]
    faults: Counter[str] = Counter()
    growth = Growth()
    until = monotonic() + SECONDS
    measuring = gevent.spawn(growth.run)
    breaking = [gevent.spawn(_break, site, random.Random(chance.random()), until, faults) for site in sites]
    running = [gevent.spawn(asker.run, until) for asker in askers]
    gevent.joinall(breaking, timeout=SECONDS + LONG, raise_error=True)
    measuring.kill()
    gevent.joinall(running, timeout=LONGEST, raise_error=True)
    stuck = [asker.name for asker, greenlet in zip(askers, running) if not greenlet.ready()]
    states = [repr(client) for client in clients.values()]

    seen = sum((asker.seen for asker in askers), Counter[str]())
    executed = Counter(journal.read_bytes().split())
    twice = [name for name, times in executed.items() if times > 1 and b".once" in name]
    print(f"\nseed {SEED}, {SECONDS:g} s: {sum(seen.values())} requests, {len(executed)} run, faults {dict(faults)}")
    for kind in asks:
        mine = [asker for asker in askers if asker.name.rpartition("-")[0] == kind]
        total = sum((asker.seen for asker in mine), Counter[str]())
        print(f"  {kind:12} longest {max(asker.longest for asker in mine):5.1f} s  {dict(total)}")
    for name, index in (("descriptors", 1), ("greenlets", 2), ("MiB resident", 3)):
        before, after = growth.halves(index)
        print(f"  {name}: {before:.1f} in the second quarter, {after:.1f} in the last")

    try:
        assert not stuck, states
        assert not [what for what in seen if what.startswith("WRONG")]
        assert not twice
        assert max(asker.longest for asker in askers) < LONGEST
        for name, index, slack in (("descriptors", 1, 15), ("greenlets", 2, 15), ("MiB resident", 3, 15)):
            before, after = growth.halves(index)
            assert after <= before + slack, name
        for name, client in clients.items():
            assert client.request(_plain_request(name), timeout=LONG).endswith(b"answer to " + name.encode() + b" ")
    finally:
        for greenlet in running:
            greenlet.kill()
        for client in clients.values():
            client.close()
        for site in sites:
            site.close()


def _plain_request(name: str) -> bytes:
    rest = name.encode() + b" 0 0 "
    return b"%d " % zlib.crc32(rest) + rest
