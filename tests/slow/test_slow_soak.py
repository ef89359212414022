"""Three minutes in which clients come and go and nothing goes well: is every request answered once, and does nothing grow?

Two thousand clients and more, of all kinds, some of which are killed in the middle; handlers that fail in all ways; servers
that are overloaded, drained and restarted. GREENSAFE_SOAK_SEED and GREENSAFE_SOAK_SECONDS choose another run. A seed repeats
who comes and what they ask; what they meet is up to the machine.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG, ROOT, wait_until
from leaks import Census, census
from misbehaving import EXPECTED, WEIGHED, answer_to, counts, misbehaving_server

import greensafe as zmq
from greensafe import Cancelled, Client, DeadlineExceeded, Disconnected, OperationTimeout, RemoteError, Server, deadline

SEED = int(os.environ.get("GREENSAFE_SOAK_SEED", "5"))
SECONDS = float(os.environ.get("GREENSAFE_SOAK_SECONDS", "180"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(int(SECONDS) + 600)]

#: Clients that come together; all have gone before the next round.
CLIENTS = 100

#: At least so many come, however few seconds the run is given.
AT_LEAST = 2000

#: Rounds in which everything is used once and is not measured.
WARM_UP = 3

#: Seconds beyond which no request of a client that stays may last: all of a round's may be before it.
LONGEST = 60.0

#: MiB by which a process may have grown after all rounds: 2,000 clients at 28 KiB each would be 55.
GROWTH = 12.0


class Site:
    """A server's process; SIGTERM drains it, then it is started again."""

    def __init__(self, endpoint: str, overload: str, journal: Path) -> None:
        self._command = [sys.executable, str(ROOT / "tests/misbehaving.py"), endpoint, overload, str(journal)]
        self.restarts = 0
        self._start()

    def _start(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None
        # In another thread: a hub that is held up does not hear that a server drains.
        line = gevent.get_hub().threadpool.apply(self.process.stdout.readline)
        self.endpoint = self._command[2] = line.strip()
        assert self.endpoint, self.stop()

    def stop(self) -> dict[str, Any]:
        """Drain it; how it stood at its end."""
        self.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.process.poll() is not None)
        out, err = self.process.communicate()
        assert (self.process.returncode, err) == (0, ""), (self.process.returncode, err)
        found: dict[str, Any] = json.loads(out)
        return found

    def restart(self) -> dict[str, Any]:
        found = self.stop()
        self.restarts += 1
        self._start()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Place:
    """Where clients may ask, and what may befall a request there besides what its handler does."""

    def __init__(self, name: str, *endpoints: str, rejects: bool = False, stops: bool = False) -> None:
        self.name = name
        self.endpoints = endpoints
        self.may_be = ({"RESOURCE_EXHAUSTED"} if rejects else set()) | ({"UNAVAILABLE", "Disconnected"} if stops else set())


class Judge:
    """Who asked what, and whether what came for it was right."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0
        self.clients: Counter[str] = Counter()

    def judge(self, place: Place, body: bytes, outcome: bytes | BaseException, took: float, also: tuple[str, ...] = ()) -> None:
        mode = body.decode().split(" ")[1]
        got = outcome.code if isinstance(outcome, RemoteError) else "" if isinstance(outcome, bytes) else type(outcome).__name__
        self.longest = max(self.longest, took)
        self.seen[got or "answered"] += 1
        if got == "Disconnected":
            self.lost[f"{body.decode().split()[0].rpartition('.')[0].rpartition('.')[2]} at {place.name}"] += 1
        may_be = {EXPECTED[mode], *place.may_be, *also}
        if mode in ("waits", "later"):
            may_be.add("DEADLINE_EXCEEDED")  # on a machine that is busy enough
        if got not in may_be or (isinstance(outcome, bytes) and outcome != answer_to(body)):
            self.wrong.append(f"{place.name} {body!r}: {outcome!r:.200}")


class Visit:
    """One client, from its coming to its going."""

    def __init__(self, name: str, kind: str, place: Place, chance: random.Random, judge: Judge, context: zmq.Context) -> None:
        self.name = name
        self.kind = kind
        self._place = place
        self._judge = judge
        self._context = context
        self._chance = chance
        self._bodies = [f"{name}.{n} {chance.choice(WEIGHED)}".encode() for n in range(chance.randint(1, 8))]
        self._pause = chance.uniform(0, 1.5)

    def run(self) -> None:
        gevent.sleep(self._pause)
        KINDS[self.kind](self)

    def _client(self) -> Client:
        return Client(*self._place.endpoints, context=self._context)

    def _asked(self, ask: Callable[[bytes], bytes], body: bytes, also: tuple[str, ...] = ()) -> None:
        """Ask, and have judged what comes."""
        start = monotonic()
        outcome: bytes | BaseException
        try:
            reply = ask(body)
            outcome = RemoteError.from_reply(reply) or reply
        except (RemoteError, Disconnected, Cancelled, OperationTimeout, DeadlineExceeded) as error:
            outcome = error
        self._judge.judge(self._place, body, outcome, monotonic() - start, also)

    def one_after_the_other(self) -> None:
        with self._client() as client:
            for body in self._bodies:
                self._asked(client.request, body)
            assert not any(client.stats.drops.values()), client.stats

    def all_at_once(self) -> None:
        with self._client() as client:
            asking = [gevent.spawn(self._asked, client.request, body) for body in self._bodies]
            gevent.joinall(asking, raise_error=True)
            assert not any(client.stats.drops.values()), client.stats

    def impatient(self) -> None:
        """Its requests are cancelled, or come too late to be run."""
        with self._client() as client:
            for body in self._bodies:
                limit = self._chance.choice([0.02, 0.1, 0.3])

                def ask(body: bytes, limit: float = limit) -> bytes:
                    if self._chance.random() < 0.5:
                        return client.request(body, timeout=limit)
                    with deadline(limit):
                        return client.request(body)

                self._asked(ask, body, ("OperationTimeout", "DeadlineExceeded"))

    def closes(self) -> None:
        """It is closed while it asks."""
        with self._client() as client:
            asking = [gevent.spawn(self._asked, client.request, body, ("Cancelled",)) for body in self._bodies]
            gevent.sleep(self._chance.uniform(0, 0.2))
            client.close()
            gevent.joinall(asking, raise_error=True)

    def killed(self) -> None:
        """Its greenlets are killed in the middle; whom that comes too late for is judged as any other."""
        with self._client() as client:
            asking = [gevent.spawn(self._asked, client.request, body) for body in self._bodies]
            gevent.sleep(self._chance.uniform(0, 0.2))
            gevent.killall(asking)

    def req(self) -> None:
        """A plain REQ; a restart that it meets is told as Disconnected."""
        sock = self._context.socket(zmq.REQ)
        sock.connect(self._chance.choice(self._place.endpoints))
        try:
            for body in self._bodies:
                sock.send(body)
                self._asked(lambda body: sock.recv(), body)
        finally:
            sock.close(0)

    def dealer(self) -> None:
        """A plain DEALER: as many answers as requests, each the right one, and then no more."""
        sock = self._context.socket(zmq.DEALER)
        sock.connect(self._place.endpoints[0])
        start = monotonic()
        try:
            for number, body in enumerate(self._bodies):
                sock.send_multipart([b"%d" % number, b"", body])
            open_ones = dict(enumerate(self._bodies))
            while open_ones:
                number_, _, reply = sock.recv_multipart(timeout=LONGEST)
                outcome = RemoteError.from_reply(reply) or reply
                self._judge.judge(self._place, open_ones.pop(int(number_)), outcome, monotonic() - start)
            with pytest.raises(zmq.Again):
                sock.recv(zmq.NOBLOCK)
        finally:
            sock.close(0)

    def dealer_that_leaves(self) -> None:
        """A plain DEALER that does not wait for its answers."""
        sock = self._context.socket(zmq.DEALER)
        sock.connect(self._place.endpoints[0])
        for body in self._bodies:
            sock.send_multipart([b"", body])
        gevent.sleep(self._chance.uniform(0, 0.2))
        sock.close(0)


KINDS: dict[str, Callable[[Visit], None]] = {
    name: getattr(Visit, name)
    for name in ("one_after_the_other", "all_at_once", "impatient", "closes", "killed", "req", "dealer", "dealer_that_leaves")
}

#: A process of clients that is killed.
VICTIM = """
import sys, gevent, greensafe, zmq
endpoints, modes = sys.argv[1].split(), sys.argv[2].split()
context = zmq.Context()
for number in range(10):
    sock = context.socket(zmq.DEALER)
    sock.connect(endpoints[number % len(endpoints)])
    for mode in modes:
        sock.send_multipart([b"", f"victim {mode}".encode()])
clients = [greensafe.Client(*endpoints) for _ in range(5)]
def ask(client, mode):
    while True:
        try:
            client.request(f"victim {mode}".encode())
        except (greensafe.RemoteError, greensafe.Disconnected):
            pass
for client in clients:
    for mode in modes:
        gevent.spawn(ask, client, mode)
print("ready", flush=True)
gevent.sleep(60)
"""


def _victims(endpoints: list[str], chance: random.Random) -> None:
    """Clients whose process is killed."""
    command = [sys.executable, "-c", VICTIM, " ".join(endpoints), " ".join(chance.sample(WEIGHED, 8))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    try:
        gevent.sleep(chance.uniform(1, 2))
    finally:
        process.kill()
        process.communicate()


def _balance(where: str, stats: dict[str, Any]) -> str:
    """What is wrong with how a server stood at its end; "" for nothing: all that it has read it has answered."""
    is_right = stats["received"] == stats["answered"] and stats["inflight"] == stats["backlog"] == stats["running"] == 0
    return "" if is_right else f"{where}: {stats}"


class Soak:
    """The servers, and the rounds of clients."""

    def __init__(self, folder: Path, context: zmq.Context) -> None:
        self._context = context
        self.journal = folder / "ran"
        self.journal.touch()
        self._chance = random.Random(SEED)
        self.steady = Site("tcp://127.0.0.1:0", "wait", self.journal)
        self.rolling = [
            Site("tcp://127.0.0.1:0", "wait", self.journal),
            Site(f"ipc://{folder}/rolling", "wait", self.journal),
            Site(f"ipc://{folder}/rejecting", "reject", self.journal),
        ]
        self.near = f"ipc://{folder}/near"
        one, other, rejecting = (site.endpoint for site in self.rolling)
        places = [
            Place("steady", self.steady.endpoint),
            Place("rolling", one, other, stops=True),
            Place("one", one, stops=True),
            Place("rejecting", rejecting, stops=True, rejects=True),
            Place("rejecting or not", rejecting, other, stops=True, rejects=True),
            Place("near", self.near, stops=True),
        ]
        self._places = {place.name: place for place in places}
        self.judge = Judge()
        self.unbalanced: list[str] = []
        self.stops = 0
        self.sizes: list[float] = []

    def close(self) -> None:
        for site in (self.steady, *self.rolling):
            site.kill()

    def visits(self, number: int) -> Iterator[Visit]:
        """Who comes in a round."""
        chance = random.Random(f"{SEED} {number}")
        for which in range(CLIENTS):
            kind = chance.choice([*KINDS, "one_after_the_other", "all_at_once"])
            where = "steady" if kind == "dealer" else chance.choice(list(self._places))
            self.judge.clients[kind] += 1
            name = f"{number}.{which}.{kind}"
            yield Visit(name, kind, self._places[where], random.Random(f"{SEED} {name}"), self.judge, self._context)

    def round(self, number: int) -> None:
        """Clients come, servers are restarted among them, and all clients go."""
        chance = random.Random(f"{SEED} restarts {number}")
        # Not two of them together, so that a client of both always has a place.
        order = chance.sample(self.rolling, 2)
        near = misbehaving_server(self.near, self.journal, context=self._context)
        near.start()
        visiting = [gevent.spawn(visit.run) for visit in self.visits(number)]
        others = [
            gevent.spawn(self._restart, order, chance),
            gevent.spawn(self._stop_and_start, near, chance),
            gevent.spawn(_victims, [self.steady.endpoint, *(site.endpoint for site in self.rolling)], chance),
        ]
        gevent.joinall([*visiting, *others], timeout=2 * LONGEST, raise_error=True)
        stuck = [greenlet for greenlet in visiting if not greenlet.ready()]
        assert not stuck, (stuck, near, self._ask_steady("stats"))
        self._note("near", near)

    def _restart(self, order: list[Site], chance: random.Random) -> None:
        for site in order:
            gevent.sleep(chance.uniform(0.2, 1))
            if problem := _balance(site.endpoint, site.restart()):
                self.unbalanced.append(problem)

    def _stop_and_start(self, near: Server, chance: random.Random) -> None:
        for _ in range(3):
            gevent.sleep(chance.uniform(0.1, 0.8))
            self._note("near", near, chance.choice([0, 0.2, 5]))
            gevent.sleep(chance.uniform(0, 0.2))
            near.start()

    def _note(self, where: str, server: Server, timeout: float = 5) -> None:
        server.stop(timeout)
        self.stops += 1
        stats = server.stats
        if stats.received != stats.answered or stats.inflight:
            self.unbalanced.append(f"{where}: {stats}")

    def _ask_steady(self, what: str) -> dict[str, Any]:
        with Client(self.steady.endpoint, context=self._context) as client:
            found: dict[str, Any] = json.loads(client.request(what.encode(), timeout=LONG))
            return found

    def quiet(self) -> dict[str, float]:
        """What the steady server's process holds when all clients have gone and all zombies have ended."""
        # One request is the question itself.
        wait_until(lambda: [self._ask_steady("stats")[what] for what in ("inflight", "zombie_count", "unsent")] == [1, 0, 0])
        return self._ask_steady("counts")


def _show(soak: Soak, rounds: int, took: float) -> None:
    judge = soak.judge
    restarts = sum(site.restarts for site in soak.rolling)
    print(f"\nseed {SEED}, {took:.0f} s: {rounds} rounds, {sum(judge.clients.values())} clients {dict(judge.clients)}")
    print(f"  {restarts} restarts, {soak.stops} stops in this process; longest {judge.longest:.1f} s")
    print(f"  {sum(judge.seen.values())} requests of clients that stayed: {dict(judge.seen)}")
    print(f"  disconnected were {dict(judge.lost)}")
    print(f"  MiB of this process after each round: {' '.join(f'{size:.0f}' for size in soak.sizes)}")


def test_soak(tmp_path: Path) -> None:
    """Each request of a client that stays has one answer, the right one or the documented error; nothing grows."""
    context = zmq.Context()  # one that keeps no list of its sockets
    soak = Soak(tmp_path, context)
    logging.disable()  # every second request fails, and what pytest keeps of it would be growth
    start = monotonic()
    rounds = 0
    try:
        while rounds < WARM_UP or monotonic() - start < SECONDS or rounds * CLIENTS < AT_LEAST:
            if rounds == WARM_UP:
                there, here = soak.quiet(), counts()
            before = census()
            soak.round(rounds)
            if rounds:  # the first one makes the threads of the context
                _check_ended(before)
            soak.sizes.append(counts()["MiB"])
            rounds += 1
        _show(soak, rounds, monotonic() - start)
        _check_growth("the server's process", there, soak.quiet)
        _check_growth("this process", here, counts)
        ends = [_balance(site.endpoint, site.stop()) for site in (soak.steady, *soak.rolling)]
        assert not [each for each in (*soak.unbalanced, *ends) if each]
        assert not soak.judge.wrong, soak.judge.wrong[:20]
        assert soak.judge.longest < LONGEST
        twice = [body for body, times in Counter(soak.journal.read_bytes().splitlines()).items() if times > 1]
        assert not [body for body in twice if not body.startswith(b"victim")]
    finally:
        logging.disable(logging.NOTSET)
        soak.close()
        context.destroy(linger=0)


def _check_ended(before: Census) -> None:
    """All greenlets, threads and contexts of a round end. (Not so descriptors: the restarted servers have new pipes.)"""

    def lasting() -> list[str]:
        return [line for line in census().since(before) if not line.startswith(("descriptor", "child"))]

    try:
        wait_until(lambda: not lasting())
    except AssertionError:
        raise AssertionError(lasting()) from None


def _check_growth(where: str, before: dict[str, float], now: Callable[[], dict[str, float]]) -> None:
    """Give what is counted time to end; memory is read then."""
    wait_until(lambda: all(now()[what] <= before[what] for what in ("descriptors", "greenlets", "threads")))
    after = now()
    print(f"  {where}: {before} before, {after} after")
    assert after["MiB"] <= before["MiB"] + GROWTH
