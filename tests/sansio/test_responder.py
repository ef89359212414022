"""Tests of greensafe.sansio.responder."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from typing import Any

import pytest
from interrupting import Interrupter, Interruption

from greensafe.errors import LocalProtocolError, RemoteError, RemoteProtocolError
from greensafe.sansio import callers as callers_module, responder as responder_module
from greensafe.sansio.callers import IDLE_BYTES, LONGEST_PULSE, SHORTEST_PULSE
from greensafe.sansio.envelope import (
    GREET,
    MAX_METADATA,
    MAX_ROUTE,
    MAX_ROUTE_BYTES,
    NO_JOURNAL,
    OTHER_JOURNAL,
    Header,
    Kind,
    ServerHeader,
    decode,
)
from greensafe.sansio.exchange import Exchange, State
from greensafe.sansio.responder import (
    AT_A_TIME,
    MOST_WAYS,
    WAYS_BYTES,
    Acked,
    Cancel,
    Effect,
    Expire,
    Kill,
    Responder,
    Say,
    Send,
    Zombie,
)
from greensafe.sansio.weights import CALLER, DEAD_BYTES

RID = b"\0abcd"
GRACE = 1.0
INSTANCE = b"instance".ljust(16)
JOURNAL = b"journal".ljust(16)


def _responder() -> Responder:
    return Responder(grace=GRACE, instance=INSTANCE)


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _frames(kind: int, number: int = 1, *body: bytes, route: tuple[bytes, ...] = (RID,), **fields: Any) -> list[bytes]:
    return [*route, Header(kind, _id(number), **fields).encode(), b"", *(body or (b"body",))]


def _open(responder: Responder, number: int = 1, now: float = 0.0, limit: float | None = None, **fields: Any) -> Exchange:
    """A request that has arrived and whose handler has started."""
    exchange = responder.receive(_frames(Kind.REQUEST, number, **fields), now)
    assert isinstance(exchange, Exchange)
    responder.begin(exchange, now, limit)
    return exchange


def _said(frames: list[bytes], hops: int = 1) -> ServerHeader:
    header = decode(frames[hops])
    assert isinstance(header, ServerHeader)
    assert frames[hops + 1] == b""
    return header


def _counts(responder: Responder) -> tuple[int, ...]:
    return responder.inflight, responder.running, responder.zombies, len(responder._callers)


# Answers.


def test_plain_answer() -> None:
    """A plain request is answered with its route, untouched, whatever the kind of the answer."""
    responder = _responder()
    exchange = responder.receive([RID, b"corr", b"", b"body"], 0.0)
    assert isinstance(exchange, Exchange)
    responder.begin(exchange, 0.0, None)
    assert responder.greeting(exchange) is None
    assert responder.answer(exchange, [b"x", b"y"], Kind.ERROR) == [RID, b"corr", b"", b"x", b"y"]
    assert not responder.finish(exchange)
    assert exchange.is_over
    assert _counts(responder) == (0, 0, 0, 0)
    assert responder.answered == 1
    assert responder.next_deadline() is None


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR, Kind.REJECTED])
@pytest.mark.parametrize("route", [(RID,), (b"proxy", RID), (b"proxy", b"proxy2", RID)])
def test_greensafe_answer(kind: Kind, route: tuple[bytes, ...]) -> None:
    """A request with a header gets a server's back: its id and metadata, the server's ids, and how many hops it came."""
    responder = _responder()
    exchange = _open(responder, 7, route=route, metadata=b"trace")
    frames = responder.answer(exchange, [b"x"], kind)
    assert tuple(frames[: len(route)]) == route
    assert _said(frames, len(route)) == ServerHeader(kind, _id(7), INSTANCE, NO_JOURNAL, len(route), b"trace")
    assert frames[len(route) + 1 :] == [b"", b"x"]
    responder.finish(exchange)
    assert _counts(responder) == (0, 0, 0, 0)


def test_two_answers() -> None:
    """The second answer is refused and counted; nothing else changes."""
    responder = _responder()
    exchange = _open(responder)
    responder.answer(exchange, [b"x"])
    before = _counts(responder)
    with pytest.raises(LocalProtocolError, match="answer"):
        responder.answer(exchange, [b"y"])
    assert (responder.answered, responder.duplicates, _counts(responder)) == (1, 1, before)


def test_promise() -> None:
    """After a promise the end of the handler means nothing; the answer may come before it or after."""
    for order in ("answer first", "finish first"):
        responder = _responder()
        exchange = _open(responder)
        responder.promise(exchange)
        if order == "answer first":
            responder.answer(exchange, [b"x"])
            assert not responder.finish(exchange)
        else:
            assert not responder.finish(exchange)
            assert exchange.state is State.PROMISED
            responder.answer(exchange, [b"x"])
        assert exchange.is_over
        assert _counts(responder) == (0, 0, 0, 0)


def test_nobody_answers() -> None:
    """A handler that ends without an answer leaves one to be given, once."""
    responder = _responder()
    exchange = _open(responder)
    assert responder.finish(exchange)
    assert _counts(responder) == (1, 0, 0, 1)
    responder.answer(exchange, [b"nothing"], Kind.ERROR)
    assert exchange.is_over
    assert _counts(responder) == (0, 0, 0, 0)


# Limits.


@pytest.mark.parametrize(
    ("limit", "remaining", "at", "by_caller"),
    [
        (None, None, None, False),
        (5.0, None, 17.0, False),
        (5.0, 4000, 14.0, True),
        (5.0, 7001, 17.0, False),
        (5.0, 9000, 17.0, False),
        (None, 0, 10.0, True),
    ],
)
def test_whose_limit(limit: float | None, remaining: int | None, at: float | None, by_caller: bool) -> None:
    """The caller's limit runs from the arrival, the server's from the start; the earlier counts, and whose it is is told."""
    responder = _responder()
    exchange = responder.receive(_frames(Kind.REQUEST, remaining_ms=remaining), 10.0)
    assert isinstance(exchange, Exchange)
    assert exchange.at == (None if remaining is None else 10.0 + remaining / 1000)
    responder.begin(exchange, 12.0, limit)
    assert exchange.at == at
    assert exchange.is_limited_by_caller == by_caller
    assert responder.next_deadline() == at


def test_overdue_before_its_turn() -> None:
    """A request that waits for its turn expires by its caller's limit, and by that alone."""
    responder = _responder()
    exchange = responder.receive(_frames(Kind.REQUEST, remaining_ms=500), 0.0)
    assert isinstance(exchange, Exchange)
    assert responder.tick(0.4) == []
    assert responder.tick(0.5) == [Expire(exchange)]
    assert exchange.is_limited_by_caller
    responder.answer(exchange, [b"overdue"], Kind.ERROR)
    responder.finish(exchange)
    assert responder.tick(100.0) == []
    assert _counts(responder) == (0, 0, 0, 0)


def test_escalation() -> None:
    """Deadline, kill after the grace, zombie once, then a kill every grace until the handler ends."""
    responder = _responder()
    exchange = _open(responder, limit=5.0)
    assert responder.next_deadline() == 5.0
    assert responder.tick(4.9) == []
    assert responder.tick(5.0) == [Expire(exchange)]
    responder.answer(exchange, [b"overdue"], Kind.ERROR)
    assert responder.next_deadline() == 6.0
    assert responder.tick(6.0) == [Kill(exchange)]
    assert responder.zombies == 0
    assert responder.tick(7.5) == [Zombie(exchange), Kill(exchange)]
    assert responder.zombies == 1
    assert responder.tick(8.5) == [Kill(exchange)]
    responder.finish(exchange)
    assert _counts(responder) == (0, 0, 0, 0)
    assert responder.tick(100.0) == []
    assert responder.next_deadline() is None


def test_a_kill_that_comes_late() -> None:
    """This process was stopped when the handler's grace began: it gets it once more, and only once; it is killed then."""
    responder = _responder()
    first, second = _open(responder, 1, limit=5.0), _open(responder, 2, limit=5.0)
    assert responder.tick(5.0) == [Expire(first), Expire(second)]
    responder.answer(first, [b"overdue"], Kind.ERROR)
    assert responder.tick(100.0) == []
    assert responder.next_deadline() == 100.0 + GRACE
    responder.finish(first)
    assert responder.tick(200.0) == [Kill(second)]
    assert responder.tick(300.0) == [Zombie(second), Kill(second)]


def test_a_kill_that_comes_a_little_late() -> None:
    """A busy machine is no reason to put it off."""
    responder = _responder()
    exchange = _open(responder, limit=5.0)
    responder.tick(5.0)
    assert responder.tick(5.0 + 2 * GRACE) == [Kill(exchange)]


def test_a_zombie_that_ends() -> None:
    """A handler that ends after the first kill was none; after the second it was one, and is none any more."""
    for kills, zombies in ((1, 0), (2, 1), (3, 1)):
        responder = _responder()
        exchange = _open(responder, limit=5.0)
        for number in range(kills + 1):
            responder.tick(5.0 + number)
        assert responder.zombies == zombies
        assert responder.finish(exchange)
        assert responder.zombies == 0


def test_expiry_of_a_promise() -> None:
    """A promise that is overdue is answered once; there is no handler to signal or kill."""
    responder = _responder()
    exchange = _open(responder, limit=5.0)
    responder.promise(exchange)
    responder.finish(exchange)
    assert responder.tick(5.0) == [Expire(exchange)]
    responder.answer(exchange, [b"overdue"], Kind.ERROR)
    assert responder.next_deadline() is None


def test_answered_but_still_running() -> None:
    """A handler that goes on after its answer is signalled at the deadline all the same."""
    responder = _responder()
    exchange = _open(responder, limit=5.0)
    responder.answer(exchange, [b"x"])
    assert responder.tick(5.0) == [Expire(exchange)]
    assert responder.tick(6.0) == [Kill(exchange)]


# Greeting and working.


def test_greeting() -> None:
    """Who asks for it hears WORKING at once, with the request's id, unless the answer was there at once."""
    responder = _responder()
    quiet, curious, quick = (_open(responder, number, flags=flags) for number, flags in ((1, 0), (2, GREET), (3, 0xFFFF)))
    assert responder.greeting(quiet) is None
    frames = responder.greeting(curious)
    assert frames is not None
    assert _said(frames) == ServerHeader(Kind.WORKING, _id(2), INSTANCE, NO_JOURNAL, 1)
    assert frames[3:] == [_id(2)]
    responder.answer(quick, [b"x"])
    assert responder.greeting(quick) is None


def _pulses(responder: Responder, until: float, step: float) -> list[tuple[float, list[bytes]]]:
    """When WORKING is said up to `until`, and the ids in it."""
    said = []
    now = 0.0
    while now < until:
        now = round(now + step, 6)
        for effect in responder.tick(now):
            assert isinstance(effect, Say)
            header = _said(effect.frames)
            body = effect.frames[3]
            ids = [body[start : start + 16] for start in range(0, len(body), 16)]
            assert (header.kind, header.request_id, len(effect.frames)) == (Kind.WORKING, ids[0], 4)
            said.append((now, ids))
    return said


def test_working() -> None:
    """One WORKING for all open requests of a client, a fifth of its patience apart, as long as there are any."""
    responder = _responder()
    exchanges = [_open(responder, number, patience_ms=5000) for number in (1, 2, 3)]
    assert responder.next_deadline() == 1.0
    assert _pulses(responder, 2.0, 0.25) == [(1.0, [_id(1), _id(2), _id(3)]), (2.0, [_id(1), _id(2), _id(3)])]
    responder.answer(exchanges[1], [b"x"])
    assert [said.frames[3] for said in responder.tick(3.0) if isinstance(said, Say)] == [_id(1) + _id(3)]
    for exchange in (exchanges[0], exchanges[2]):
        responder.answer(exchange, [b"x"])
    assert responder.tick(4.0) == []
    assert len(responder._callers) == 0
    assert responder.next_deadline() is None


def test_working_is_for_those_who_want_it() -> None:
    """A patience of 0 wants none, and leaves nothing to be remembered; every client has batches of its own."""
    responder = _responder()
    _open(responder, 1)
    assert responder.next_deadline() is None
    _open(responder, 2, patience_ms=5000, route=(b"two",))
    _open(responder, 3, patience_ms=5000, route=(b"proxy", RID))
    batches = [effect.frames for effect in responder.tick(1.0) if isinstance(effect, Say)]
    assert [(frames[0], frames[-1]) for frames in batches] == [(b"two", _id(2)), (b"proxy", _id(3))]


def test_a_shorter_patience_counts() -> None:
    """Of a client's requests the one that waits least long sets the pace, however short or long it says."""
    responder = _responder()
    _open(responder, 1, patience_ms=50_000)
    assert responder.next_deadline() == 10.0
    _open(responder, 2, now=1.0, patience_ms=5000)
    assert responder.next_deadline() == 2.0
    _open(responder, 3, now=1.0, patience_ms=1)
    assert responder.next_deadline() == 1.0 + SHORTEST_PULSE
    assert len(responder.tick(1.0 + SHORTEST_PULSE)) == 1


def test_a_working_that_is_due_is_not_put_off() -> None:
    """A request with less patience brings the next WORKING nearer, never further away."""
    responder = _responder()
    _open(responder, 1, patience_ms=50_000)
    _open(responder, 2, now=9.5, patience_ms=5000)
    assert responder.next_deadline() == 10.0
    assert len(responder.tick(10.0)) == 1
    assert responder.next_deadline() == 11.0


def test_clients_with_much_patience_are_forgotten_in_time() -> None:
    """Clients that come, ask once and go leave nothing, also if each would have waited for weeks."""
    responder = _responder()
    for number in range(100):
        exchange = _open(responder, number, patience_ms=0xFFFFFFFF, route=(b"%d" % number,))
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
    assert responder.tick(LONGEST_PULSE) == []
    assert len(responder._callers) == 0
    assert responder.next_deadline() is None


def test_clients_without_requests_are_remembered_up_to_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come while none is forgotten in time: those with open requests, and so many more."""
    responder = _responder()
    waiting = [_open(responder, number, patience_ms=0xFFFFFFFF, route=(b"waits %d" % number,)) for number in range(100)]
    most = 2000
    monkeypatch.setattr(callers_module, "IDLE_BYTES", most * CALLER)
    for number in range(2 * most):
        exchange = _open(responder, number, patience_ms=0xFFFFFFFF, route=(RID, b"%d" % number))
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
    remembered = len(responder._callers)
    assert most // 2 < remembered < most + len(waiting)
    assert responder.forgotten == 2 * most - remembered + len(waiting)
    assert len(responder._callers._pulses) <= 2 * most
    told = []
    while (responder.next_deadline() or 0.0) <= LONGEST_PULSE:
        told += responder.tick(LONGEST_PULSE)
    assert len(told) == len(waiting)
    assert len(responder._callers) == len(waiting)


def test_clients_that_are_remembered_while_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are to be told CLOSED, but no more of them than else are remembered."""
    responder = _responder()
    responder.drain()
    most = 2000
    monkeypatch.setattr(callers_module, "IDLE_BYTES", most * CALLER)
    for number in range(2 * most):
        exchange = _open(responder, number, route=(RID, b"%d" % number))
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
    assert most // 2 < len(responder._callers) < most


def test_clients_that_are_remembered_weigh_what_their_ids_weigh() -> None:
    """Ids that a client makes up, as long as they may be, are remembered up to a weight, and what is forgotten is let go."""
    responder = _responder()
    waiting = _open(responder, 0, patience_ms=0xFFFFFFFF, route=(b"waits",))
    for number in range(4 * IDLE_BYTES // 60_000):
        exchange = _open(responder, number, patience_ms=0xFFFFFFFF, route=(RID, b"%d" % number + bytes(60_000)))
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
        assert len(responder._callers._pulses) * 60_000 <= IDLE_BYTES + DEAD_BYTES + 200_000
    remembered = sum(len(frame) for caller in responder._callers for frame in caller.origin)
    assert IDLE_BYTES // 2 < remembered < IDLE_BYTES
    assert responder.forgotten > 2 * IDLE_BYTES // 60_000
    assert waiting.caller in list(responder._callers)
    assert [effect for effect in responder.tick(LONGEST_PULSE) if isinstance(effect, Say)]
    assert [caller.origin for caller in responder._callers] == [(b"waits",)]
    assert responder._callers._idle_size == 0


@pytest.mark.parametrize(
    ("route", "metadata"), [((RID, bytes(60_000)), b""), ((RID,), bytes(60_000)), ((RID, bytes(60_000)), None)]
)
def test_what_is_answered_is_not_kept_until_its_limit(route: tuple[bytes, ...], metadata: bytes | None) -> None:
    """A request with weeks to go, whatever stands in its envelope, goes with its answer, or nearly so."""
    responder = _responder()
    for number in range(4 * DEAD_BYTES // 60_000):
        if metadata is None:
            exchange = responder.receive([*route, b"", b"plain"], 0.0)
            assert isinstance(exchange, Exchange)
            responder.begin(exchange, 0.0, 1e6)
        else:
            exchange = _open(responder, number, route=route, metadata=metadata, remaining_ms=10**9)
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
        assert len(responder._due) * 60_000 <= DEAD_BYTES + 60_000


def test_the_pulse_of_a_client_that_keeps_asking() -> None:
    """One request after another, each answered at once: one caller, one entry in the queue, not one for each."""
    responder = _responder()
    for number in range(10_000):
        exchange = _open(responder, number, now=number / 1000, patience_ms=5000)
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
        responder.tick(number / 1000)
        assert max(len(responder._callers), len(responder._callers._pulses)) <= 1
        assert responder._callers._idle_size <= CALLER + 200


def test_two_requests_with_one_id() -> None:
    """A request that was sent again while the first still runs: both are answered, and nothing is left."""
    for order in ((0, 1), (1, 0)):
        for patience in (0, 5000):
            responder = _responder()
            exchanges = [_open(responder, 1, patience_ms=patience) for _ in range(2)]
            for index in order:
                # The id is the later one's for as long as that is open.
                expected = [] if exchanges[1].is_answered else [exchanges[1]]
                assert list(exchanges[1].caller.open.values()) == expected
                responder.answer(exchanges[index], [b"x"])
                responder.finish(exchanges[index])
            responder.tick(2.0)
            assert _counts(responder) == (0, 0, 0, 0)


def test_as_many_hops_as_anybody_puts_there() -> None:
    """253 frames after the routing id are answered like any others; more, which each answer would repeat, are malformed."""
    responder = _responder()
    most = MAX_ROUTE - 3  # the routing id, the header and the delimiter
    odd = _open(responder, 1, route=(RID, *(b"x" for _ in range(most))), patience_ms=5000)
    other = _open(responder, 2, limit=1.0, route=(b"other",))
    assert Expire(other) in responder.tick(1.0)
    assert len(responder.answer(odd, [b"x"])) == most + 4
    with pytest.raises(RemoteProtocolError, match="256"):
        _open(responder, 3, route=(RID, *(b"x" for _ in range(most + 1))))


def test_what_stands_before_the_delimiter_is_bounded() -> None:
    """Ids of more than 64 KiB are malformed, whoever sends them; a header with all its metadata is not counted."""
    responder = _responder()
    long = bytes(MAX_ROUTE_BYTES - len(RID))
    odd = _open(responder, 1, route=(RID, long), metadata=bytes(MAX_METADATA))
    assert len(responder.answer(odd, [b"x"])) == 5
    for frames in ([RID, long + b"x", b"", b"body"], _frames(Kind.REQUEST, 2, route=(RID, long, b"x"))):
        with pytest.raises(RemoteProtocolError, match="65536 bytes"):
            responder.receive(frames, 0.0)
    assert (responder.malformed, responder.inflight) == (2, 0)


def test_too_many_frames() -> None:
    """Whoever sends too many is told, if that can be; nothing is run, whether all frames are there or the first only."""
    responder = Responder(grace=GRACE, instance=INSTANCE, max_frames=10)
    assert isinstance(_open(responder, 1), Exchange)
    for count in (11, 1000):
        body = (b"",) * count
        told = responder.receive(_frames(Kind.REQUEST, 2, *body, metadata=b"m"), 0.0)
        assert isinstance(told, Send)
        assert _said(told.frames) == ServerHeader(Kind.ERROR, _id(2), INSTANCE, NO_JOURNAL, 1, b"m")
        error = RemoteError.from_reply(told.frames[3])
        assert error is not None
        assert (error.code, error.type) == ("INVALID_ARGUMENT", "TooManyFrames")
        told = responder.receive([RID, b"own", b"", *body], 0.0)
        assert isinstance(told, Send)
        assert told.frames[:3] == [RID, b"own", b""]
        assert RemoteError.from_reply(told.frames[3]) is not None
        for frames in (_frames(Kind.CANCEL, 1, *body), [RID, *(b"x" for _ in body)]):
            with pytest.raises(RemoteProtocolError):
                responder.receive(frames, 0.0)
    assert (responder.malformed, responder.received, responder.inflight) == (8, 1, 1)


def test_limits_that_come_together_are_seen_to_in_parts() -> None:
    """However many run out at once: after some of them the next part is due at once, and none is left out."""
    responder = _responder()
    open_ = [_open(responder, number, remaining_ms=1000) for number in range(3 * AT_A_TIME)]
    seen = []
    for _ in range(3):
        assert (responder.next_deadline() or 9.0) <= 1.0
        effects = responder.tick(1.0)
        assert len(effects) == AT_A_TIME
        seen += [effect.exchange for effect in effects if isinstance(effect, Expire)]
    assert seen == open_
    assert responder.next_deadline() == 1.0 + GRACE


# Cancel, ack, ping and the rest.


def test_cancel() -> None:
    """The client's own open request is cancelled; its handler is killed after the grace if it goes on."""
    responder = _responder()
    exchange = _open(responder, 1, now=1.0, limit=60.0)
    assert responder.receive(_frames(Kind.CANCEL, 1), 2.0) == Cancel(exchange)
    assert responder.cancelled == 1
    responder.answer(exchange, [b"cancelled"], Kind.ERROR)
    assert responder.tick(2.9) == []
    assert responder.tick(3.0) == [Kill(exchange)]
    responder.finish(exchange)
    assert responder.tick(100.0) == []
    assert _counts(responder) == (0, 0, 0, 0)


def test_cancel_of_what_is_not_open() -> None:
    """Unknown ids, other clients' and what is answered: ignored and counted."""
    responder = _responder()
    exchange = _open(responder, 1)
    assert responder.receive(_frames(Kind.CANCEL, 2), 0.0) is None
    assert responder.receive(_frames(Kind.CANCEL, 1, route=(b"other",)), 0.0) is None
    assert responder.receive(_frames(Kind.CANCEL, 1, route=(b"proxy", RID)), 0.0) is None
    responder.answer(exchange, [b"x"])
    assert responder.receive(_frames(Kind.CANCEL, 1), 0.0) is None
    assert (responder.ignored, responder.cancelled) == (4, 0)
    responder.finish(exchange)
    assert _counts(responder) == (0, 0, 0, 0)


def test_ping() -> None:
    """PING is answered PONG with id, metadata and body, and opens nothing."""
    responder = _responder()
    effect = responder.receive(_frames(Kind.PING, 5, b"a", b"b", route=(b"proxy", RID), metadata=b"m"), 0.0)
    assert isinstance(effect, Send)
    assert _said(effect.frames, 2) == ServerHeader(Kind.PONG, _id(5), INSTANCE, NO_JOURNAL, 2, b"m")
    assert effect.frames[:2] + effect.frames[3:] == [b"proxy", RID, b"", b"a", b"b"]
    assert _counts(responder) == (0, 0, 0, 0)


def test_ack() -> None:
    """ACK is ignored and counted as long as nothing is journaled."""
    responder = _responder()
    assert responder.receive(_frames(Kind.ACK, 1), 0.0) is None
    assert (responder.ignored, responder.malformed) == (1, 0)


@pytest.mark.parametrize("kind", [0x00, 0x05, 0x42, 0x7F])
def test_unknown_kinds(kind: int) -> None:
    """A client's kind that this server does not know is answered with an error, not run."""
    responder = _responder()
    effect = responder.receive(_frames(kind, 9, metadata=b"m"), 0.0)
    assert isinstance(effect, Send)
    assert _said(effect.frames) == ServerHeader(Kind.ERROR, _id(9), INSTANCE, NO_JOURNAL, 1, b"m")
    error = RemoteError.from_reply(effect.frames[-1])
    assert error is not None
    assert (error.code, error.type) == ("UNIMPLEMENTED", "UnknownKind")
    assert responder.malformed == 1
    assert _counts(responder) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind >= 0x80] + [0x80, 0xFF])
def test_servers_kinds_are_refused(kind: int) -> None:
    """A server's message is dropped and counted: answering one server in the name of another would never end."""
    responder = _responder()
    with pytest.raises(RemoteProtocolError, match="for a client"):
        responder.receive([RID, ServerHeader(kind, _id(1), INSTANCE).encode(), b"", b"x"], 0.0)
    with pytest.raises(RemoteProtocolError):
        responder.receive([RID, b"no delimiter"], 0.0)
    assert responder.malformed == 2
    assert _counts(responder) == (0, 0, 0, 0)


def test_unknown_versions_are_served_as_plain() -> None:
    """A header of another version is somebody's id: run, and answered with that frame as it was."""
    responder = _responder()
    other = bytearray(Header(Kind.CANCEL, _id(1)).encode())
    other[4] = 2
    exchange = responder.receive([RID, bytes(other), b"", b"x"], 0.0)
    assert isinstance(exchange, Exchange)
    assert exchange.envelope.header is None
    assert responder.answer(exchange, [b"y"]) == [RID, bytes(other), b"", b"y"]


# Draining.


def test_draining() -> None:
    """Clients with open requests are told at once, others as they ask, each once; plain ones never."""
    responder = _responder()
    first = _open(responder, 1, route=(b"one",))
    plain = responder.receive([b"plain", b"", b"x"], 0.0)
    assert isinstance(plain, Exchange)
    assert responder.drain_notice(first) is None
    notices = responder.drain()
    assert [(notice.frames[0], _said(notice.frames).kind, notice.frames[3:]) for notice in notices] == [
        (b"one", Kind.DRAINING, [b""])
    ]
    assert responder.drain() == []
    assert responder.drain_notice(_open(responder, 2, route=(b"one",))) is None
    assert responder.drain_notice(plain) is None
    told = responder.drain_notice(_open(responder, 3, route=(b"two",)))
    assert told is not None
    assert _said(told) == ServerHeader(Kind.DRAINING, bytes(16), INSTANCE, NO_JOURNAL, 1)


def _journaling() -> Responder:
    return Responder(grace=GRACE, instance=INSTANCE, journal=JOURNAL)


def test_ack_with_a_journal() -> None:
    """ACK says whose answer need not be kept any longer, whether it is known here or not."""
    assert _journaling().receive(_frames(Kind.ACK, 1), 0.0) == Acked(_id(1))


@pytest.mark.parametrize("responder", [_responder(), _journaling()])
def test_for_another_journal(responder: Responder) -> None:
    """A request that may have run for a server with another journal is refused, and not run."""
    effect = responder.receive(_frames(Kind.REQUEST, 3, age_ms=5, journal=b"other".ljust(16), metadata=b"m"), 0.0)
    assert isinstance(effect, Send)
    said = _said(effect.frames)
    assert (said.kind, said.request_id, said.metadata) == (Kind.REJECTED, _id(3), b"m")
    error = RemoteError.from_reply(effect.frames[3])
    assert error is not None
    assert (error.code, error.type) == ("FAILED_PRECONDITION", OTHER_JOURNAL)
    assert (responder.misdirected, responder.received, _counts(responder)) == (1, 0, (0, 0, 0, 0))


def test_for_this_journal() -> None:
    """Its own requests are run."""
    assert isinstance(_journaling().receive(_frames(Kind.REQUEST, 3, age_ms=5, journal=JOURNAL), 0.0), Exchange)


def test_the_same_request_by_another_way_joins() -> None:
    """It is not opened anew; WORKING goes to all who have sent it, and so does the answer, to the latest first."""
    responder = _journaling()
    exchange = _open(responder, patience_ms=1000)
    effect = responder.receive(_frames(Kind.REQUEST, route=(b"proxy", b"new"), patience_ms=1000, flags=GREET), 0.1)
    assert isinstance(effect, Send)
    assert (effect.frames[:2], _said(effect.frames, 2).kind) == ([b"proxy", b"new"], Kind.WORKING)
    assert responder.receive(_frames(Kind.REQUEST, route=(b"third",)), 0.1) is None
    assert (responder.joined, responder.received, responder.inflight) == (2, 1, 1)
    assert {frames[0] for frames in _sends(responder.tick(0.4))} == {RID, b"proxy"}
    responder.seal(exchange)
    assert responder.inflight == 1
    told = [responder.deliver(exchange, [b"x"]), *responder.copies(exchange, [b"x"])]
    assert [frames[0] for frames in told] == [b"third", b"proxy", RID]
    assert [frames[-1] for frames in told] == [b"x"] * 3
    assert [_said(frames, hops).hops for frames, hops in zip(told, (1, 2, 1), strict=True)] == [1, 2, 1]
    responder.finish(exchange)
    responder.tick(10.0)
    assert _counts(responder) == (0, 0, 0, 0)
    assert responder.open_ids() == []


def test_joins_until_the_answer_has_left() -> None:
    """An answer that is held is not asked for again; after it has left the same id is a new request."""
    responder = _journaling()
    exchange = _open(responder)
    responder.seal(exchange)
    exchange.is_held = True
    responder.finish(exchange)
    assert not exchange.is_over
    assert responder.receive(_frames(Kind.REQUEST, route=(b"new",)), 0.1) is None
    exchange.is_held = False
    assert responder.deliver(exchange, [b"x"])[0] == b"new"
    assert exchange.is_over
    assert isinstance(responder.receive(_frames(Kind.REQUEST), 0.1), Exchange)


def test_the_same_way_again_joins_as_well() -> None:
    """One answer for two messages that came by one way."""
    responder = _journaling()
    exchange = _open(responder)
    assert responder.receive(_frames(Kind.REQUEST), 0.1) is None
    assert responder.answer(exchange, [b"x"])[0] == RID
    assert responder.copies(exchange, [b"x"]) == []


def test_another_body_does_not_join() -> None:
    """The same id with another body is an error, and what is open stays as it is."""
    responder = _journaling()
    exchange = _open(responder)
    effect = responder.receive(_frames(Kind.REQUEST, 1, b"other", route=(b"new",)), 0.1)
    assert isinstance(effect, Send)
    assert _said(effect.frames).kind == Kind.ERROR
    error = RemoteError.from_reply(effect.frames[3])
    assert error is not None
    assert (error.code, error.type) == ("INVALID_ARGUMENT", "OtherBody")
    assert (responder.joined, exchange.also, responder.answer(exchange, [b"x"])[0]) == (0, (), RID)


def test_ways_are_bounded() -> None:
    """Who sends the same request by ever new ways costs no more than the latest of them."""
    responder = _journaling()
    exchange = _open(responder)
    for number in range(3 * MOST_WAYS):
        responder.receive(_frames(Kind.REQUEST, route=(b"way %d" % number,)), 0.1)
    responder.answer(exchange, [b"x"])
    assert len(responder.copies(exchange, [b"x"])) == MOST_WAYS
    responder.finish(exchange)
    assert _counts(responder) == (0, 0, 0, 0)  # nothing is kept of the ways that were forgotten


def test_what_has_come_by_several_ways_is_not_kept_until_its_limit() -> None:
    """With its answer the ways go, and the body that they share, however long the client would have waited."""
    responder = _journaling()
    exchange = _open(responder, remaining_ms=10**9)
    responder.receive(_frames(Kind.REQUEST, route=(b"new",), remaining_ms=10**9), 0.1)
    (way,) = exchange.also
    assert way.body is exchange.envelope.body
    responder.answer(exchange, [b"x"])
    responder.copies(exchange, [b"x"])
    assert exchange.also == ()


@pytest.mark.parametrize("seed", range(20))
def test_sums(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes in whatever order, what is bounded is what is there, and nothing of it is left in the end."""
    monkeypatch.setattr(callers_module, "IDLE_BYTES", 5000)
    monkeypatch.setattr(responder_module, "WAYS_BYTES", 3000)
    monkeypatch.setattr(responder_module, "SMALL_WAY", 300)
    monkeypatch.setattr(responder_module, "DEAD_BYTES", 3000)
    monkeypatch.setattr(callers_module, "DEAD_BYTES", 3000)
    chance, now = random.Random(seed), 0.0
    responder = _responder() if seed % 3 == 0 else _journaling()
    owed: list[Exchange] = []
    running: list[Exchange] = []

    def answer(exchange: Exchange) -> None:
        owed.remove(exchange)
        if not exchange.is_answered:
            responder.seal(exchange)
        responder.deliver(exchange, [b"x"])
        responder.copies(exchange, [b"x"])

    def finish(exchange: Exchange) -> None:
        running.remove(exchange)
        if responder.finish(exchange):
            answer(exchange)

    for _ in range(300):
        act = chance.random()
        if act < 0.5:
            route = (b"%d" % chance.randrange(4), *[b"%d" % chance.randrange(12) + bytes(chance.choice((0, 300)))])
            received = responder.receive(
                _frames(
                    chance.choice([Kind.REQUEST] * 6 + [Kind.CANCEL]),
                    chance.randrange(15),
                    route=route[: chance.randrange(1, 3)],
                    remaining_ms=chance.choice((None, 0, 5000)),
                    patience_ms=chance.choice((0, 1, 500, 10**6)),
                    metadata=bytes(chance.choice((0, 200))),
                ),
                now,
            )
            if isinstance(received, Exchange):
                owed.append(received)
                running.append(received)
        elif act < 0.75 and owed:
            answer(chance.choice(owed))
        elif act < 0.8 and owed:
            exchange = chance.choice(owed)  # its answer is held: it may come again meanwhile
            if not exchange.is_answered:
                responder.seal(exchange)
        elif act < 0.9 and running:
            finish(chance.choice(running))
        else:
            now += chance.choice((0.0, SHORTEST_PULSE, 1.0, 40.0))
            responder.tick(now)
            responder.next_deadline()
        idle = [caller.size for caller in responder._callers if not caller.open]
        assert responder._callers._idle_size == sum(idle) <= callers_module.IDLE_BYTES
        assert responder._ways_size == sum(exchange.ways_size for exchange in owed)
        assert {id(each) for caller in responder._callers for each in caller.open.values()} <= set(map(id, owed))
    for exchange in [*running]:
        finish(exchange)
    for exchange in [*owed]:
        answer(exchange)
    for _ in range(100):
        now += LONGEST_PULSE
        responder.tick(now)
    assert (len(responder._callers), responder._callers._idle_size, responder._ways_size) == (0, 0, 0)
    assert (len(responder._callers._pulses), responder.next_deadline()) == (0, None)


def test_limit() -> None:
    """The caller's limit of before holds if it is the earlier one, and is its own, not the server's."""
    responder = _journaling()
    exchange = _open(responder, limit=5.0)
    responder.limit(exchange, 7.0)
    assert (exchange.at, exchange.is_limited_by_caller) == (5.0, False)
    responder.limit(exchange, 2.0)
    assert (exchange.at, exchange.is_limited_by_caller) == (2.0, True)
    assert responder.tick(2.0) == [Expire(exchange)]


def test_cancelled_by_any_way() -> None:
    """Whoever has sent it can take it back, for all."""
    responder = _journaling()
    exchange = _open(responder)
    responder.receive(_frames(Kind.REQUEST, route=(b"new",)), 0.1)
    assert responder.receive(_frames(Kind.CANCEL), 0.2) == Cancel(exchange)


def _sends(effects: list[Any]) -> list[list[bytes]]:
    return [effect.frames for effect in effects if isinstance(effect, Send | Say)]


def test_the_ways_of_a_request_that_comes_again_are_bounded() -> None:
    """With a journal a request may be sent by any number of ways, with long ids and metadata: not all are kept."""
    responder = _journaling()
    for number in range(60):
        _open(responder, number, route=(b"first",))
        for way in range(MOST_WAYS):
            frames = _frames(Kind.REQUEST, number, route=(b"way %d" % way, bytes(60_000)), metadata=bytes(60_000))
            assert responder.receive(frames, 0.0) is None
            assert responder._ways_size < WAYS_BYTES
    open_ = list((responder._ids or {}).values())
    kept = [way for exchange in open_ for way in (exchange.envelope, *exchange.also)]
    assert sum(len(frame) for way in kept for frame in way.route) < WAYS_BYTES
    assert {id(way.body) for way in kept} == {id(exchange.envelope.body) for exchange in open_}
    assert 0 < responder.ignored < 60 * MOST_WAYS
    assert responder.receive(_frames(Kind.REQUEST, 0, route=(b"small",), flags=GREET), 0.0) is not None
    for exchange in open_:
        assert len(responder.answer(exchange, [b"x"])) >= 3
        responder.copies(exchange, [b"x"])
        responder.finish(exchange)
    assert responder._ways_size == 0
    assert len(responder._callers) == 0


def test_closing() -> None:
    """Who has asked while it drained, or shortly before, is told, also if it was answered long ago; nobody else is."""
    responder = _responder()
    early = _open(responder, 1, route=(b"early",), patience_ms=5000)
    responder.answer(early, [b"x"])
    responder.tick(2.0)
    for number, patience in enumerate((0, 5000)):
        exchange = _open(responder, 2, now=2.0, route=(b"with %d" % number,), patience_ms=patience)
        responder.drain()
        responder.answer(exchange, [b"x"])
    responder.tick(10.0)
    responder.tick(20.0)
    assert [(notice.frames[0], _said(notice.frames), notice.frames[3:]) for notice in responder.close()] == [
        (route, ServerHeader(Kind.CLOSED, bytes(16), INSTANCE, NO_JOURNAL, 1), [b""]) for route in (b"with 0", b"with 1")
    ]


class _Gone(set[Exchange]):
    """A set that counts how often it is gone through."""

    times = 0

    def __iter__(self) -> Any:
        self.times += 1
        return super().__iter__()


def test_many_kills_that_are_put_off_at_once() -> None:
    """Each costs the same, however many there are; those that have ended since are forgotten."""
    responder = _responder()
    responder._spared = spared = _Gone()
    exchanges = [_open(responder, number, limit=1.0) for number in range(1, 6)]
    assert len(responder.tick(1.0)) == 5
    assert responder.tick(3600.0) == []
    assert (len(spared), spared.times) == (5, 0)
    for exchange in exchanges:
        responder.answer(exchange, [b"x"])
        responder.finish(exchange)
    _open(responder, 6, now=3600.0, limit=1.0)
    responder.tick(3601.0)
    assert responder.tick(7200.0) == []
    assert len(responder._spared) == 1


def test_a_tick_that_is_interrupted_forgets_nothing() -> None:
    """Wherever a signal's handler raises in it: done again, it finds each limit once, and who is to hear WORKING."""
    for number in itertools.count():
        responder = _responder()
        exchanges = [_open(responder, each, remaining_ms=1000, patience_ms=2000) for each in range(3)]
        effects: list[Effect] = []
        with Interrupter(number, "sansio") as interrupter, suppress(Interruption):
            responder.tick(1.0, effects)
        if not interrupter.has_raised:
            break
        responder.tick(1.0, effects)
        assert [each for each in effects if isinstance(each, Expire)] == [Expire(each) for each in exchanges], interrupter.where
        assert {each for each in responder.tick(1.0 + GRACE) if isinstance(each, Kill)} == {Kill(each) for each in exchanges}
    assert number > 20  # how many places there are depends on the Python
