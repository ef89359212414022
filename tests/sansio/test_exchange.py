"""Tests of greensafe.sansio.exchange: its table, and both roles against each other over a faulty link."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from greensafe.errors import LocalProtocolError, RemoteError
from greensafe.sansio.envelope import Kind, split
from greensafe.sansio.exchange import Event, Exchange, State
from greensafe.sansio.requester import Asked, Connection, Requester, Resolution
from greensafe.sansio.responder import Cancel, Effect, Expire, Kill, Responder, Send

#: state, whether the handler runs, event -> state. Every other combination is refused.
TABLE = {
    (State.RUNNING, True, Event.ANSWER): State.ANSWERED,
    (State.PROMISED, True, Event.ANSWER): State.ANSWERED,
    (State.PROMISED, False, Event.ANSWER): State.OVER,
    (State.ABANDONED, False, Event.ANSWER): State.OVER,
    (State.RUNNING, True, Event.PROMISE): State.PROMISED,
    (State.RUNNING, True, Event.FINISH): State.ABANDONED,
    (State.PROMISED, True, Event.FINISH): State.PROMISED,
    (State.ANSWERED, True, Event.FINISH): State.OVER,
}


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("state", list(State))
def test_every_event_in_every_state(state: State, is_running: bool, event: Event) -> None:
    """Each event fits exactly the states of the table; elsewhere the error names role, state and event, and nothing changes."""
    exchange = Exchange(7, split([b"id", b"", b"x"]), 0.0)
    exchange.state, exchange.is_running = state, is_running
    expected = TABLE.get((state, is_running, event))
    if expected is not None:
        exchange.move(event)
        assert exchange.state is expected
        return
    with pytest.raises(LocalProtocolError, match=rf"responder: {event.value} .*request 7, .*{state.value}"):
        exchange.move(event)
    assert (exchange.state, exchange.is_running) == (state, is_running)


def test_what_is_told_of_a_state() -> None:
    """Answered are ANSWERED and OVER, over is OVER."""
    exchange = Exchange(1, split([b"id", b"", b"x"]), 0.0)
    told = {}
    for state in State:
        exchange.state = state
        told[state] = exchange.is_answered, exchange.is_over
    assert {state for state in State if told[state][0]} == {State.ANSWERED, State.OVER}
    assert {state for state in State if told[state][1]} == {State.OVER}


# Both against each other.

GRACE = 1.0
PATIENCE = 5.0
#: Longer than anything that a run leaves to be waited for.
FOR_EVER = 10_000.0


class _Client:
    """A requester and its one connection, again and again."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.requester = Requester(PATIENCE)
        self.connections = 0
        self.connect()

    def connect(self) -> None:
        self.connections += 1
        self.connection = Connection()
        self.route = b"%b%d" % (self.name, self.connections)


class _World:
    """Two clients and a server, a link that drops, delays, duplicates and reorders, connections that break, and a clock.

    The body of a request, and of every answer to it, is its id.
    """

    def __init__(self, seed: int, loss: float, double: float, hops: int) -> None:
        self.random = random.Random(seed)
        self.loss, self.double = loss, double
        self.proxies = [b"proxy%d" % number for number in range(hops - 1)]
        self.now = 0.0
        self.clients = [_Client(b"one"), _Client(b"two")]
        self.link: list[tuple[_Client, bytes, list[bytes], bool]] = []
        self.opened: Counter[bytes] = Counter()
        self.ended: Counter[bytes] = Counter()
        self.waiting: list[tuple[_Client, Asked]] = []
        self.start()

    def start(self) -> None:
        """The server is there, or there again, and knows nothing."""
        self.responder = Responder(grace=GRACE, instance=self.random.randbytes(16))
        self.kept: list[Exchange] = []
        self.handlers: list[Exchange] = []
        self.promised: list[Exchange] = []
        self.answers: Counter[int] = Counter()

    # The link.

    def put(self, client: _Client, frames: list[bytes], to_server: bool, route: bytes | None = None) -> None:
        if self.random.random() >= self.loss:
            item = (client, route or client.route, frames, to_server)
            self.link.extend([item, item] if self.random.random() < self.double else [item])

    def put_back(self, frames: list[bytes]) -> None:
        """What the server says goes to whoever had that route, unless the connection is gone."""
        route = frames[len(self.proxies)]
        for client in self.clients:
            if client.route == route:
                self.put(client, frames[len(self.proxies) + 1 :], False)

    def deliver(self) -> None:
        if not self.link:
            return
        client, route, frames, to_server = self.link.pop(self.random.randrange(len(self.link)))
        if to_server:
            self.accept([*self.proxies, route, *frames])
        elif route == client.route:
            answer = client.requester.receive(frames, client.connection, self.now)
            if answer is not None:
                self.resolve(client, answer)

    # The clients.

    def ask(self) -> None:
        client = self.random.choice(self.clients)
        request_id = client.name.ljust(8, b".") + len(self.opened).to_bytes(8, "big")
        limit = self.random.choice([None, self.now + self.random.uniform(0.1, 20)])
        asked = client.requester.open(request_id, [request_id], limit, request_id)
        self.opened[request_id] += 1
        self.send(client, asked)

    def send(self, client: _Client, asked: Asked) -> None:
        self.put(client, client.requester.send(asked, client.connection, self.now), True)

    def resolve(self, client: _Client, answer: Resolution) -> None:
        request_id = answer.asked.request_id
        assert answer.body[0] == request_id == answer.asked.owner
        if answer.kind == Kind.REJECTED:
            self.waiting.append((client, answer.asked))
        else:
            self.ended[request_id] += 1

    def send_again(self) -> None:
        waiting, self.waiting = self.waiting, []
        for client, asked in waiting:
            if asked.is_open and asked.connection is None:
                self.send(client, asked)

    def give_up(self) -> None:
        client = self.random.choice(self.clients)
        for asked in client.requester.asked()[:1]:
            note = client.requester.cancel(asked)
            if note is not None:
                self.put(client, note, True)
            assert client.requester.abandon(asked)
            self.ended[asked.request_id] += 1

    def break_connection(self) -> None:
        client = self.random.choice(self.clients)
        for asked in client.requester.lose(client.connection):
            if self.random.random() < 0.5:
                self.waiting.append((client, asked))
            else:
                client.requester.abandon(asked)
                self.ended[asked.request_id] += 1
        assert client.connection.sent == {}
        gone, _ = client.route, client.connect()
        if not self.proxies:
            callers = [caller for caller in self.responder._callers if caller.origin[0] == gone]
            for exchange in [exchange for caller in callers for exchange in caller.open.values()]:
                self.apply(self.responder.cancel(exchange, self.now))

    def be_judged(self) -> None:
        """Who is silent is given up, or asked again."""
        client = self.random.choice(self.clients)
        for asked in client.requester.silent(client.connection, self.now):
            client.requester.unsend(asked)
            self.waiting.append((client, asked))

    # The server.

    def accept(self, frames: list[bytes]) -> None:
        received = self.responder.receive(frames, self.now)
        if not isinstance(received, Exchange):
            if received is not None:
                self.apply(received)
            return
        if received.at is not None and received.at <= self.now:
            self.answer(received, Kind.ERROR)
            self.responder.finish(received)
        else:
            self.kept.append(received)
        for notice in (self.responder.greeting(received), self.responder.drain_notice(received)):
            if notice is not None:
                self.put_back(notice)

    def begin(self) -> None:
        if self.kept:
            exchange = self.kept.pop(0)
            if self.random.random() < 0.2:
                self.answer(exchange, Kind.REJECTED)
                self.responder.finish(exchange)
            else:
                self.responder.begin(exchange, self.now, 5.0)
                self.handlers.append(exchange)

    def answer(self, exchange: Exchange, kind: Kind = Kind.REPLY) -> None:
        try:
            frames = self.responder.answer(exchange, exchange.envelope.body, kind)
        except LocalProtocolError:
            return
        self.answers[exchange.key] += 1
        self.put_back(frames)

    def handle(self) -> None:
        if not self.handlers:
            return
        exchange = self.handlers.pop(self.random.randrange(len(self.handlers)))
        way = self.random.choice(["answer", "twice", "promise", "nothing", "hang"])
        if way == "hang":
            self.handlers.append(exchange)
            return
        for _ in range({"answer": 1, "twice": 2}.get(way, 0)):
            self.answer(exchange)
        if way == "promise" and not exchange.is_answered:
            self.responder.promise(exchange)
            self.promised.append(exchange)
        if self.responder.finish(exchange):
            self.answer(exchange, Kind.ERROR)

    def keep_promise(self) -> None:
        if self.promised:
            self.answer(self.promised.pop(self.random.randrange(len(self.promised))))

    def drain(self) -> None:
        for notice in self.responder.drain():
            self.apply(notice)

    def restart(self) -> None:
        self.start()

    def apply(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            self.put_back(effect.frames)
        elif isinstance(effect, (Expire, Cancel)):
            exchange = effect.exchange
            self.answer(exchange, Kind.ERROR)
            if exchange in self.kept:
                self.kept.remove(exchange)
                self.responder.finish(exchange)
        elif isinstance(effect, Kill) and effect.exchange in self.handlers and self.random.random() < 0.7:
            self.handlers.remove(effect.exchange)
            if self.responder.finish(effect.exchange):
                self.answer(effect.exchange, Kind.ERROR)

    # Time.

    def time(self) -> None:
        self.pass_time(self.random.uniform(0, 3))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for effect in self.responder.tick(self.now):
            self.apply(effect)
        for client in self.clients:
            for expired in client.requester.tick(self.now):
                self.ended[expired.request_id] += 1
                assert client.requester.abandon(expired)

    def check(self) -> None:
        """What holds at any moment."""
        responder = self.responder
        counts = (responder.inflight, responder.running, responder.zombies)
        assert min(counts) >= 0
        assert responder.zombies <= responder.running
        is_open = [exchange for exchange in {*self.kept, *self.handlers, *self.promised} if not exchange.is_answered]
        assert responder.inflight == len(is_open)
        assert responder.running == len(self.kept) + len(self.handlers)
        for client in self.clients:
            asked = client.requester.asked()
            assert all(each.connection in (None, client.connection) for each in asked)
            assert {each.request_id for each in asked if each.connection is not None} == set(client.connection.sent)


STEPS = (
    ["ask"] * 6 + ["deliver"] * 10 + ["begin"] * 6 + ["handle"] * 6 + ["time"] * 4 + ["send_again", "keep_promise"] * 2
) + ["give_up", "break_connection", "be_judged", "drain", "restart"]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(STEPS), max_size=200),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([0.0, 0.4]),
    st.integers(1, 3),
)
def test_every_request_resolves_exactly_once(seed: int, steps: list[str], loss: float, double: float, hops: int) -> None:
    """Over a link that drops, delays, doubles and reorders, with connections and servers that come and go, each request ends
    once or is still open, never with another's answer; no count is ever negative, and nothing is left in a table.
    """
    world = _World(seed, loss, double, hops)
    for step in steps:
        getattr(world, step)()
        world.check()
    while world.link or world.kept or world.handlers:
        for step in ("deliver", "begin", "handle", "keep_promise", "check"):
            getattr(world, step)()
        world.pass_time(0.5)
    world.pass_time(FOR_EVER)
    world.pass_time(FOR_EVER)
    _check_the_end(world)


def _check_the_end(world: _World) -> None:
    still_open = {asked.request_id for client in world.clients for asked in client.requester.asked()}
    assert set(world.opened) == set(world.ended) | still_open
    assert not set(world.ended) & still_open
    assert set(world.ended.values()) <= {1}
    assert all(count == 1 for count in world.answers.values())
    responder = world.responder
    assert (responder.inflight, responder.running, responder.zombies) == (0, 0, 0)
    assert sum(world.answers.values()) == responder.answered
    assert responder.next_deadline() is None
    assert not any(caller.open for caller in responder._callers)
    assert responder.is_draining or len(responder._callers) == 0
    for client in world.clients:
        assert client.requester.next_deadline() is None
        assert all(asked.at is None for asked in client.requester.asked())
        client.requester.abandon_all()
        assert client.connection.sent == {}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 30))
def test_without_faults_each_gets_its_answer(seed: int, hops: int, requests: int) -> None:
    """Over a link that only reorders, and a server that does nothing wrong, nobody ends with anything but a reply."""
    world = _World(seed, 0.0, 0.0, hops)
    for number in range(requests):
        client = world.clients[number % 2]
        request_id = number.to_bytes(16, "big")
        world.opened[request_id] += 1
        world.send(client, client.requester.open(request_id, [request_id], None, request_id))
    while world.link or world.kept or world.handlers:
        world.deliver()
        if world.kept:
            exchange = world.kept.pop()
            world.responder.begin(exchange, world.now, None)
            world.answer(exchange)
            world.responder.finish(exchange)
        world.pass_time(0.1)
    assert world.ended == world.opened
    world.pass_time(FOR_EVER)
    _check_the_end(world)


def test_an_error_of_a_server_is_found_in_its_body() -> None:
    """What a server answers to a kind that it does not know is an error for the id of that message."""
    responder, requester, connection = Responder(grace=GRACE), Requester(), Connection()
    asked = requester.open(bytes(16), [b"x"], None, None)
    header, *rest = requester.send(asked, connection, 0.0)
    effect = responder.receive([b"route", header[:5] + b"\x33" + header[6:], *rest], 0.0)
    assert isinstance(effect, Send)
    answer = requester.receive(effect.frames[1:], connection, 0.0)
    assert answer is not None
    assert answer.kind == Kind.ERROR
    error = RemoteError.from_reply(answer.body[0])
    assert error is not None
    assert error.code == "UNIMPLEMENTED"
