"""Tests of greensafe.sansio.exchange: the tables one by one, and both roles against each other over a faulty link."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from greensafe.errors import LocalProtocolError, RemoteProtocolError
from greensafe.sansio.envelope import Header, Kind
from greensafe.sansio.exchange import Exchange, Expire, Kill, Requester, Responder, State, Zombie

RID = b"\0abcd"
GRACE = 1.0


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _request(number: int = 1, remaining: int | None = None) -> list[bytes]:
    return [RID, Header(Kind.REQUEST, _id(number), remaining).encode(), b"", b"body"]


# The responder.


def test_plain_answer() -> None:
    """A plain request is answered with its route, untouched."""
    responder = Responder(grace=GRACE)
    exchange = responder.receive([RID, b"corr", b"", b"body"], 0.0, None)
    assert responder.answer(exchange, [b"x", b"y"]) == [RID, b"corr", b"", b"x", b"y"]
    assert not responder.finish(exchange)
    assert exchange.is_over
    assert (responder.inflight, responder.running, responder.answered) == (0, 0, 1)
    assert responder.next_deadline() is None


@pytest.mark.parametrize("error", [False, True])
def test_greensafe_answer(error: bool) -> None:
    """A request with a header gets one back: the same id, kind REPLY or ERROR."""
    responder = Responder(grace=GRACE)
    exchange = responder.receive(_request(7), 0.0, None)
    frames = responder.answer(exchange, [b"x"], error=error)
    assert frames[0] == RID
    header = Header.decode(frames[1])
    assert header is not None
    assert header.kind is (Kind.ERROR if error else Kind.REPLY)
    assert header.request_id == _id(7)
    assert frames[2:] == [b"", b"x"]


#: What each event may meet: every other combination is refused.
EVENTS = {
    ("answer", State.RUNNING): State.ANSWERED,
    ("answer", State.PROMISED): State.OVER,
    ("answer", State.ABANDONED): State.OVER,
    ("promise", State.RUNNING): State.PROMISED,
    ("finish", State.RUNNING): State.ABANDONED,
    ("finish", State.ANSWERED): State.OVER,
}


def _in_state(responder: Responder, state: State) -> Exchange:
    exchange = responder.receive(_request(), 0.0, None)
    if state is State.PROMISED:
        responder.promise(exchange)
        responder.finish(exchange)
    elif state is State.ABANDONED:
        responder.finish(exchange)
    elif state is not State.RUNNING:
        responder.answer(exchange, [b""])
        if state is State.OVER:
            responder.finish(exchange)
    assert exchange.state is state
    return exchange


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", ["answer", "promise", "finish"])
def test_every_event_in_every_state(event: str, state: State) -> None:
    """Each event fits exactly the states of the table; elsewhere the error names role, state and event."""
    responder = Responder(grace=GRACE)
    exchange = _in_state(responder, state)
    args: list[Any] = [exchange, [b"x"]] if event == "answer" else [exchange]
    if (event, state) in EVENTS:
        getattr(responder, event)(*args)
        assert exchange.state is EVENTS[event, state]
        return
    before = (responder.inflight, responder.running, responder.answered)
    with pytest.raises(LocalProtocolError, match=rf"responder: {event}.*{state.value}"):
        getattr(responder, event)(*args)
    assert exchange.state is state
    assert (responder.inflight, responder.running, responder.answered) == before
    assert responder.duplicates == (event == "answer")


def test_promise_answered_before_the_handler_has_ended() -> None:
    """A promise may be kept before the handler's greenlet has ended."""
    responder = Responder(grace=GRACE)
    exchange = responder.receive(_request(), 0.0, None)
    responder.promise(exchange)
    responder.answer(exchange, [b"x"])
    assert not responder.finish(exchange)
    assert exchange.is_over


def test_escalation() -> None:
    """Deadline, kill after the grace, zombie once, then a kill every grace until the handler ends."""
    responder = Responder(grace=GRACE)
    exchange = responder.receive(_request(), 0.0, 5.0)
    assert responder.next_deadline() == 5.0
    assert responder.tick(4.9) == []
    assert responder.tick(5.0) == [Expire(exchange)]
    responder.answer(exchange, [b"overdue"], error=True)
    assert responder.next_deadline() == 6.0
    assert responder.tick(6.0) == [Kill(exchange)]
    assert responder.zombies == 0
    assert responder.tick(7.5) == [Zombie(exchange), Kill(exchange)]
    assert responder.zombies == 1
    assert responder.tick(8.5) == [Kill(exchange)]
    responder.finish(exchange)
    assert responder.zombies == 0
    assert responder.tick(100.0) == []
    assert responder.next_deadline() is None


def test_expiry_of_a_promise() -> None:
    """A promise that is overdue is answered once; there is no handler to signal or kill."""
    responder = Responder(grace=GRACE)
    exchange = _promised(responder)
    assert responder.tick(5.0) == [Expire(exchange)]
    responder.answer(exchange, [b"overdue"], error=True)
    assert responder.next_deadline() is None


def _promised(responder: Responder) -> Exchange:
    exchange = responder.receive(_request(), 0.0, 5.0)
    responder.promise(exchange)
    responder.finish(exchange)
    return exchange


def test_answered_but_still_running() -> None:
    """A handler that goes on after its answer is signalled at the deadline all the same."""
    responder = Responder(grace=GRACE)
    exchange = responder.receive(_request(), 0.0, 5.0)
    responder.answer(exchange, [b"x"])
    assert responder.tick(5.0) == [Expire(exchange)]
    assert responder.tick(6.0) == [Kill(exchange)]


@pytest.mark.parametrize(
    ("limit", "remaining", "at", "by_caller"),
    [
        (None, None, None, False),
        (5.0, None, 15.0, False),
        (5.0, 2000, 12.0, True),
        (5.0, 9000, 15.0, False),
        (None, 0, 10.0, True),
    ],
)
def test_whose_limit(limit: float | None, remaining: int | None, at: float | None, by_caller: bool) -> None:
    """The earlier of the server's limit and the caller's counts, and it is known whose it is."""
    exchange = Responder(grace=GRACE).receive(_request(1, remaining), 10.0, limit)
    assert exchange.at == at
    assert exchange.is_limited_by_caller == by_caller


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.REQUEST])
def test_other_kinds_are_refused(kind: Kind) -> None:
    """A server takes requests; everything else is counted as malformed and changes nothing."""
    responder = Responder(grace=GRACE)
    with pytest.raises(RemoteProtocolError, match=kind.name):
        responder.receive([RID, Header(kind, _id(1)).encode(), b"", b"x"], 0.0, None)
    with pytest.raises(RemoteProtocolError):
        responder.receive([RID, b"no delimiter"], 0.0, None)
    assert (responder.malformed, responder.inflight, responder.running) == (2, 0, 0)


# The requester.


def _reply(number: int, kind: Kind = Kind.REPLY, *body: bytes) -> list[bytes]:
    return [Header(kind, _id(number)).encode(), b"", *(body or (b"answer",))]


@pytest.mark.parametrize(
    ("kind", "error", "greensafe"), [(Kind.REPLY, False, True), (Kind.ERROR, True, True), (Kind.REQUEST, False, False)]
)
def test_resolution(kind: Kind, error: bool, greensafe: bool) -> None:
    """A reply, an error, and a plain REP's reply, which returns the header as it was."""
    requester = Requester()
    frames = requester.open(_id(1), [b"a", b"b"], 0.0, None, "me")
    assert frames[1:] == [b"", b"a", b"b"]
    resolution = requester.receive(_reply(1, kind))
    assert resolution is not None
    assert (resolution.owner, resolution.body, resolution.error, resolution.greensafe) == ("me", [b"answer"], error, greensafe)
    assert len(requester) == 0


def test_what_resolves_nothing() -> None:
    """Late, duplicate, unknown, malformed and meaningless messages are counted apart and never raise."""
    requester = Requester()
    requester.open(_id(1), [b"x"], 0.0, None, None)
    assert requester.receive(_reply(1)) is not None
    assert requester.receive(_reply(1)) is None
    assert requester.receive(_reply(99)) is None
    requester.open(_id(2), [b"x"], 0.0, None, None)
    assert requester.abandon(_id(2))
    assert not requester.abandon(_id(2))
    assert requester.receive(_reply(2)) is None
    assert requester.late == 3
    header = Header(Kind.REPLY, _id(3)).encode()
    for frames in ([], [b""], [header], [header, b""], [header, b"x", b"y"], [b"junk", b"", b"x"]):
        assert requester.receive(frames) is None
    assert requester.malformed == 6
    assert requester.receive(_reply(3, Kind.WORKING)) is None
    assert requester.ignored == 1


def test_ids_are_used_once() -> None:
    """Opening an id that is open is refused."""
    requester = Requester()
    requester.open(_id(1), [b"x"], 0.0, None, None)
    with pytest.raises(LocalProtocolError, match="open already"):
        requester.open(_id(1), [b"x"], 0.0, None, None)
    assert requester.abandon_all() == [None]


def test_expiry() -> None:
    """A request expires once, at its time; the server is told the earlier of the two limits."""
    requester = Requester()
    header = Header.decode(requester.open(_id(1), [b"x"], 10.0, 15.0, "me", told=12.0)[0])
    assert header is not None
    assert header.remaining_ms == 2000
    assert requester.next_deadline() == 15.0
    assert requester.tick(14.0) == []
    assert [(each.request_id, each.owner) for each in requester.tick(15.0)] == [(_id(1), "me")]
    assert requester.tick(99.0) == []
    assert requester.receive(_reply(1)) is None
    assert requester.next_deadline() is None


# Both against each other.


class _World:
    """Two requesters and a responder, a link that drops, delays, duplicates and reorders, and a clock."""

    def __init__(self, seed: int, loss: float, double: float) -> None:
        self.random = random.Random(seed)
        self.loss, self.double = loss, double
        self.now = 0.0
        self.responder = Responder(grace=GRACE)
        self.requesters = {b"\0one": Requester(), b"\0two": Requester()}
        self.link: list[tuple[bool, bytes, list[bytes]]] = []
        self.handlers: list[Exchange] = []
        self.promised: list[Exchange] = []
        self.opened: Counter[bytes] = Counter()
        self.resolved: Counter[bytes] = Counter()
        self.answers: Counter[int] = Counter()

    def put(self, to_server: bool, peer: bytes, frames: list[bytes]) -> None:
        if self.random.random() >= self.loss:
            self.link.append((to_server, peer, frames))
            if self.random.random() < self.double:
                self.link.append((to_server, peer, frames))

    def ask(self, number: int) -> None:
        peer = self.random.choice(list(self.requesters))
        request_id = peer.ljust(8, b".") + number.to_bytes(8, "big")
        limit = self.now + self.random.uniform(0.1, 20)
        self.opened[request_id] += 1
        self.put(True, peer, self.requesters[peer].open(request_id, [request_id], self.now, limit, request_id))

    def deliver(self) -> None:
        if not self.link:
            return
        to_server, peer, frames = self.link.pop(self.random.randrange(len(self.link)))
        if to_server:
            self.handlers.append(self.responder.receive([peer, *frames], self.now, 5.0))
        elif (resolution := self.requesters[peer].receive(frames)) is not None:
            self.resolved[resolution.request_id] += 1
            assert resolution.body[0] == resolution.request_id == resolution.owner

    def answer(self, exchange: Exchange, *, error: bool = False) -> None:
        body = exchange.envelope.body
        try:
            frames = self.responder.answer(exchange, body, error=error)
        except LocalProtocolError:
            return
        self.answers[exchange.key] += 1
        self.put(False, frames[0], frames[1:])

    def handle(self) -> None:
        if not self.handlers:
            return
        exchange = self.handlers.pop(self.random.randrange(len(self.handlers)))
        way = self.random.choice(["answer", "twice", "promise", "nothing", "hang"])
        if way == "hang":
            self.handlers.append(exchange)
            return
        if way in ("answer", "twice"):
            self.answer(exchange)
        if way == "twice":
            self.answer(exchange)
        if way == "promise" and not exchange.is_answered:
            self.responder.promise(exchange)
            self.promised.append(exchange)
        if self.responder.finish(exchange):
            self.answer(exchange, error=True)

    def keep_promise(self) -> None:
        if self.promised:
            self.answer(self.promised.pop(self.random.randrange(len(self.promised))))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for effect in self.responder.tick(self.now):
            if isinstance(effect, Expire):
                self.answer(effect.exchange, error=True)
            elif isinstance(effect, Kill) and effect.exchange in self.handlers and self.random.random() < 0.7:
                self.handlers.remove(effect.exchange)
                self.responder.finish(effect.exchange)
        for requester in self.requesters.values():
            for expired in requester.tick(self.now):
                self.resolved[expired.request_id] += 1


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["ask", "ask", "deliver", "deliver", "handle", "keep_promise", "time"]), max_size=150),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([0.0, 0.4]),
)
def test_every_request_resolves_exactly_once(seed: int, steps: list[str], loss: float, double: float) -> None:
    """Over a link that drops, delays, duplicates and reorders, each request resolves once, never with another's reply."""
    world = _World(seed, loss, double)
    for number, step in enumerate(steps):
        if step == "ask":
            world.ask(number)
        elif step == "time":
            world.pass_time(world.random.uniform(0, 3))
        else:
            getattr(world, step)()
    while world.link or world.handlers:
        world.deliver()
        world.handle()
        world.pass_time(0.5)
    world.pass_time(1000)
    world.pass_time(1000)
    assert world.resolved == world.opened
    assert all(count == 1 for count in world.answers.values())
    responder = world.responder
    assert (responder.inflight, responder.running, responder.zombies) == (0, 0, 0)
    assert sum(world.answers.values()) == responder.answered
    assert responder.next_deadline() is None
    for requester in world.requesters.values():
        assert len(requester) == 0
        assert requester.next_deadline() is None
