"""Tests of greensafe.sansio.requester."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from greensafe.errors import LocalProtocolError
from greensafe.sansio.envelope import GREET, NO_JOURNAL, Header, Kind, ServerHeader, decode
from greensafe.sansio.liveness import WORDLESS
from greensafe.sansio.requester import LEFT, LONGEST_WORD, MOST_TRIED, Asked, Connection, Requester, Resolution

INSTANCE = b"instance".ljust(16)
JOURNAL = b"journal".ljust(16)


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _ask(requester: Requester, connection: Connection, number: int = 1, now: float = 0.0, at: float | None = None) -> Asked:
    asked = requester.open(_id(number), [b"body"], at, number)
    requester.send(asked, connection, now)
    return asked


def _said(kind: int, number: int = 1, *body: bytes, hops: int = 1, journal: bytes = NO_JOURNAL) -> list[bytes]:
    header = ServerHeader(kind, _id(number), INSTANCE, journal, hops)
    return [header.encode(), b"", *(body or (b"answer",))]


def _echoed(number: int = 1, kind: int = Kind.REQUEST) -> list[bytes]:
    """What a plain REP sends back."""
    return [Header(kind, _id(number)).encode(), b"", b"answer"]


def _header(frames: list[bytes]) -> Header:
    header = decode(frames[0])
    assert isinstance(header, Header)
    return header


# Sending.


def test_what_is_sent() -> None:
    """[header, "", body...]: id, time left, patience, metadata; the earlier of the two limits is told."""
    requester = Requester(5.0)
    asked = requester.open(_id(1), [b"a", b"b"], 15.0, "me", told=12.0, metadata=b"trace")
    frames = requester.send(asked, Connection(), 10.0)
    assert frames[1:] == [b"", b"a", b"b"]
    assert _header(frames) == Header(Kind.REQUEST, _id(1), 2000, 5000, GREET, b"trace")
    assert asked.frames is frames


@pytest.mark.parametrize(
    ("at", "told", "remaining"),
    [(None, None, None), (15.0, None, 5000), (None, 12.0, 2000), (11.0, 12.0, 1000), (9.0, None, 0)],
)
def test_the_limit_that_is_told(at: float | None, told: float | None, remaining: int | None) -> None:
    """Of the caller's limit and the scope around it the earlier one, rounded up to milliseconds, never below 0."""
    requester = Requester()
    asked = requester.open(_id(1), [b"x"], at, None, told=told)
    assert _header(requester.send(asked, Connection(), 10.0)).remaining_ms == remaining


@pytest.mark.parametrize(("patience", "told"), [(None, 0), (5.0, 5000), (0.0001, 1), (1e9, 0xFFFFFFFF)])
def test_the_patience_that_is_told(patience: float | None, told: int) -> None:
    """Whole milliseconds; 0 only for none."""
    requester = Requester(patience)
    asked = requester.open(_id(1), [b"x"], None, None)
    assert _header(requester.send(asked, Connection(), 0.0)).patience_ms == told


def test_who_is_asked_to_greet() -> None:
    """Whoever is not known, or is known by way of others: only a direct server holds for the next request, too."""
    requester = Requester(5.0)
    connection = Connection()
    for number, (hops, flags) in enumerate([(None, GREET), (2, GREET), (3, GREET), (1, 0)], 1):
        if hops is not None:
            requester.receive(_said(Kind.PONG, hops=hops), connection, 0.0)
        asked = requester.open(_id(number), [b"x"], None, None)
        assert _header(requester.send(asked, connection, 0.0)).flags == flags


def test_ids_are_used_once() -> None:
    """Opening an id that is open is refused, and changes nothing."""
    requester = Requester()
    asked = requester.open(_id(1), [b"x"], None, None)
    with pytest.raises(LocalProtocolError, match="open already"):
        requester.open(_id(1), [b"x"], None, None)
    assert requester.asked() == [asked]
    assert requester.abandon_all() == [asked]
    assert len(requester) == 0


# Receiving.


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR])
def test_a_greensafe_answer(kind: Kind) -> None:
    """REPLY and ERROR resolve the request of their id, once."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    assert requester.receive(_said(kind, 1, b"a", b""), connection, 0.0) == Resolution(asked, [b"a", b""], kind, NO_JOURNAL)
    assert not asked.is_open
    assert (len(requester), connection.sent, asked.connection) == (0, {}, None)
    assert (connection.is_heard, connection.is_known, connection.is_direct) == (True, True, True)
    assert (connection.instance, connection.is_journaling) == (INSTANCE, False)


def test_answers_that_teach_nothing_new() -> None:
    """The second reply of a server is taken as the first; one that says something else is learned from, metadata or not."""
    requester, connection = Requester(), Connection()
    for number, (hops, journal) in enumerate([(1, NO_JOURNAL), (1, NO_JOURNAL), (2, JOURNAL), (2, JOURNAL), (1, NO_JOURNAL)]):
        asked = _ask(requester, connection, number)
        answer = requester.receive(_said(Kind.REPLY, number, hops=hops, journal=journal), connection, 0.0)
        assert answer == Resolution(asked, [b"answer"], Kind.REPLY, journal)
        assert (connection.is_direct, connection.journal, asked.is_open, connection.sent) == (hops == 1, journal, False, {})
    asked = _ask(requester, connection, 9)
    traced = ServerHeader(Kind.REPLY, _id(9), INSTANCE, JOURNAL, 2, b"trace").encode()
    assert requester.receive([traced, b"", b"answer"], connection, 0.0) == Resolution(asked, [b"answer"], Kind.REPLY, JOURNAL)
    assert (len(requester), requester.late) == (0, 0)


@pytest.mark.parametrize("first", [_said(Kind.PONG), _echoed(7)])
def test_what_looks_like_an_answer(first: list[bytes]) -> None:
    """However well a server is known: the same bytes on another connection, or with another id, answer nothing."""
    requester, connection, other = Requester(), Connection(), Connection()
    requester.receive(first, connection, 0.0)
    requester.receive(_said(Kind.PONG), other, 0.0)
    asked, before = _ask(requester, connection), requester.late
    for frames in (_said(Kind.REPLY), [asked.frames[0], b"", b"answer"]):
        assert requester.receive(frames, other, 0.0) is None
    for frames in (_said(Kind.REPLY, 2), _echoed(2)):
        assert requester.receive(frames, connection, 0.0) is None
    assert requester.late == before + 4
    assert requester.receive([asked.frames[0] + b"x", b"", b"answer"], connection, 0.0) is None
    assert requester.malformed == 1
    assert asked.is_open
    assert requester.receive([asked.frames[0], b"", b"answer"], connection, 0.0) is not None


def test_a_plain_answer() -> None:
    """A plain REP returns the header as it was; nothing is known of it by that but that it is there."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    assert requester.receive(_echoed(), connection, 0.0) == Resolution(asked, [b"answer"], Kind.REQUEST, b"")
    assert (connection.is_heard, connection.is_known, connection.is_direct) == (True, False, False)


def test_a_rejection() -> None:
    """REJECTED: it was not run and waits again; it can be sent elsewhere, and the answer of there counts."""
    requester, connection, other = Requester(), Connection(), Connection()
    asked = _ask(requester, connection)
    answer = requester.receive(_said(Kind.REJECTED), connection, 0.0)
    assert answer is not None
    assert (answer.kind, answer.asked, asked.is_open, asked.connection, connection.sent) == (
        Kind.REJECTED,
        asked,
        True,
        None,
        {},
    )
    requester.send(asked, other, 0.0)
    assert other.sent == {asked.request_id: asked}
    assert requester.receive(_said(Kind.REPLY), other, 0.0) is not None


def test_a_rejection_of_an_earlier_try() -> None:
    """A REJECTED that comes by another connection than the request is on now does not take it off that."""
    requester, before, now = Requester(), Connection(), Connection()
    asked = _ask(requester, before)
    requester.unsend(asked)
    requester.send(asked, now, 0.0)
    assert requester.receive(_said(Kind.REJECTED), before, 0.0) is None
    assert requester.late == 1
    assert now.sent == {asked.request_id: asked}
    assert requester.receive(_said(Kind.REPLY), now, 0.0) is not None


def test_an_answer_that_comes_after_all() -> None:
    """An answer to an earlier try resolves a request that waits to be sent again: what has arrived is not lost."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    requester.unsend(asked)
    assert requester.receive(_said(Kind.REJECTED), connection, 0.0) is None
    answer = requester.receive(_said(Kind.REPLY), connection, 0.0)
    assert answer is not None
    assert answer.asked is asked
    assert len(requester) == 0


def test_an_answer_to_what_was_never_sent() -> None:
    """Nobody can answer a request that has not left: counted as late."""
    requester = Requester()
    asked = requester.open(_id(1), [b"x"], None, None)
    assert requester.receive(_said(Kind.REPLY), Connection(), 0.0) is None
    assert (requester.late, asked.is_open) == (1, True)


def test_what_resolves_nothing() -> None:
    """Late, duplicate, unknown, malformed and meaningless messages are counted apart and never raise."""
    requester, connection = Requester(), Connection()
    _ask(requester, connection, 1)
    assert requester.receive(_said(Kind.REPLY, 1), connection, 0.0) is not None
    assert requester.receive(_said(Kind.REPLY, 1), connection, 0.0) is None
    assert requester.receive(_said(Kind.REPLY, 99), connection, 0.0) is None
    assert requester.receive(_echoed(99), connection, 0.0) is None
    given_up = _ask(requester, connection, 2)
    assert requester.abandon(given_up)
    assert not requester.abandon(given_up)
    assert requester.receive(_said(Kind.REPLY, 2), connection, 0.0) is None
    assert requester.late == 4
    header = ServerHeader(Kind.REPLY, _id(3), INSTANCE).encode()
    for frames in ([], [b""], [header], [header, b""], [header, b"x", b"y"], [b"junk", b"", b"x"], [b"", header, b"", b"x"]):
        assert requester.receive(frames, connection, 0.0) is None
    assert requester.malformed == 7
    for kind in (0x80, 0x90, 0xFF, Kind.PONG):
        assert requester.receive(_said(kind, 3), connection, 0.0) is None
    for kind in (0x00, 0x05, 0x7F, Kind.CANCEL, Kind.PING, Kind.ACK):
        assert requester.receive(_echoed(3, kind), connection, 0.0) is None
    assert requester.ignored == 10
    assert connection.sent == {}


def test_malformed_messages_tell_nothing() -> None:
    """Of who sends nonsense nothing is known, not even that something was heard of it."""
    requester, connection = Requester(), Connection()
    requester.receive([ServerHeader(Kind.REPLY, _id(1), INSTANCE).encode() + b"x", b"", b"x"], connection, 0.0)
    assert not connection.is_heard
    assert not connection.is_known


# What is known of a connection, and what may be sent on it.


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind >= 0x80] + [0x80, 0xFE])
def test_any_servers_header_makes_it_known(kind: int) -> None:
    """Also of a kind that is unknown; and the last one tells whether it is direct."""
    requester, connection = Requester(), Connection()
    requester.receive(_said(kind, hops=2, journal=JOURNAL), connection, 0.0)
    assert (connection.is_known, connection.is_direct, connection.is_journaling) == (True, False, True)
    requester.receive(_said(kind, hops=1), connection, 0.0)
    assert (connection.is_direct, connection.is_journaling) == (True, False)


def test_cancel() -> None:
    """Only who is known is told, only of what was sent and is open."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    assert requester.cancel(asked) is None
    requester.receive(_said(Kind.WORKING, 1, _id(1)), connection, 0.0)
    note = requester.cancel(asked)
    assert note is not None
    assert (_header(note).kind, _header(note).request_id, note[1:]) == (Kind.CANCEL, _id(1), [b"", b""])
    requester.unsend(asked)
    assert requester.cancel(asked) is None
    requester.send(asked, connection, 0.0)
    requester.abandon(asked)
    assert requester.cancel(asked) is None


def test_knowledge_ends_with_the_connection() -> None:
    """On the next connection to the same place nothing but requests is sent, until a server's header has come back on it."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    requester.receive(_said(Kind.WORKING, 1, _id(1)), connection, 0.0)
    assert requester.lose(connection) == [asked]
    assert connection.sent == {}
    requester.send(asked, Connection(), 0.0)
    assert requester.cancel(asked) is None


def test_a_plain_worker_behind_the_same_proxy() -> None:
    """Once a plain REP has answered on a connection nothing but requests is sent on it, known or not: it might be run there."""
    requester, connection = Requester(), Connection()
    _ask(requester, connection, 1)
    second = _ask(requester, connection, 2)
    requester.receive(_said(Kind.WORKING, 2, _id(2), hops=2), connection, 0.0)
    assert requester.cancel(second) is not None
    requester.receive(_echoed(1), connection, 0.0)
    requester.receive(_said(Kind.WORKING, 2, _id(2), hops=2), connection, 0.0)
    assert requester.cancel(second) is None
    answer = requester.receive(_said(Kind.REPLY, 2, hops=2, journal=JOURNAL), connection, 0.0)
    assert answer is not None
    assert requester.ack(answer, connection) is None


def test_ack() -> None:
    """Only a server that journals is told that its answer has arrived, and only if it was one."""
    requester, connection = Requester(), Connection()
    for number, (frames, acked) in enumerate(
        [
            (lambda number: _echoed(number), False),
            (lambda number: _said(Kind.REPLY, number), False),
            (lambda number: _said(Kind.REPLY, number, journal=JOURNAL), True),
            (lambda number: _said(Kind.ERROR, number, journal=JOURNAL), True),
            # Behind a proxy it could reach the worker that has the answer.
            (lambda number: _said(Kind.REJECTED, number, journal=JOURNAL), False),
            (lambda number: _said(Kind.INTERRUPTED, number, journal=JOURNAL), False),
        ]
    ):
        connection = Connection()
        _ask(requester, connection, number)
        answer = requester.receive(frames(number), connection, 0.0)
        assert answer is not None
        note = requester.ack(answer, connection)
        assert (note is not None) == acked
        if note is not None:
            assert (_header(note).kind, _header(note).request_id, note[1:]) == (Kind.ACK, _id(number), [b"", b""])


def test_draining_is_for_the_server_that_says_it() -> None:
    """A direct server's connection is not used any more; behind a proxy the others go on."""
    for hops, is_draining in ((1, True), (2, False)):
        requester, connection = Requester(), Connection()
        requester.receive(_said(Kind.DRAINING, 0, b"", hops=hops), connection, 0.0)
        assert connection.is_draining == is_draining


def test_closed_is_for_the_server_that_says_it() -> None:
    """What a direct server has not answered when it says that it has closed was not run; behind a proxy nobody knows."""
    for hops, is_over in ((1, True), (2, False)):
        requester, connection = Requester(), Connection()
        asked = _ask(requester, connection)
        assert requester.receive(_said(Kind.CLOSED, 0, b"", hops=hops), connection, 0.0) is None
        assert (connection.is_over, connection.is_draining) == (is_over, is_over)
        assert asked.is_open


# Losses, silence and limits.


def test_a_lost_connection() -> None:
    """Its requests wait again; answers by another connection, an abandoned one, or another loss are as ever."""
    requester, connection = Requester(), Connection()
    first, second = _ask(requester, connection, 1), _ask(requester, connection, 2)
    assert requester.lose(connection) == [first, second]
    assert requester.lose(connection) == []
    assert first.is_open
    again = Connection()
    requester.send(first, again, 0.0)
    requester.abandon(second)
    assert requester.receive(_said(Kind.REPLY, 1), again, 0.0) is not None
    assert len(requester) == 0


def _is_silent(at: float, *, patience: float | None = 5.0, said: Any = None) -> bool:
    requester, connection = Requester(patience), Connection()
    asked = _ask(requester, connection, now=0.0)
    if said is not None:
        requester.receive(said, connection, 1.0)
    return requester.silent(connection, at) == [asked]


def test_silence() -> None:
    """Only who says WORKING can fall silent: a direct server that is known, or one that has said it of this request."""
    due = 5.0 * WORDLESS
    assert not _is_silent(1000.0)
    assert not _is_silent(1000.0, said=_echoed(99))
    assert not _is_silent(1000.0, said=_said(Kind.PONG, 99, hops=2))
    assert not _is_silent(1000.0, said=_said(Kind.WORKING, 99, _id(99), hops=2))
    assert not _is_silent(1000.0, patience=None, said=_said(Kind.PONG, 99))
    assert not _is_silent(due - 0.01, said=_said(Kind.PONG, 99))
    assert _is_silent(due, said=_said(Kind.PONG, 99))
    for hops in (1, 2):
        assert not _is_silent(1.0 + due - 0.01, said=_said(Kind.WORKING, 1, _id(99) + _id(1), hops=hops))
        assert _is_silent(1.0 + due, said=_said(Kind.WORKING, 1, _id(99) + _id(1), hops=hops))


def test_forgiving() -> None:
    """A process that was itself away begins to count anew."""
    requester, connection = Requester(5.0), Connection()
    asked = _ask(requester, connection)
    requester.receive(_said(Kind.WORKING, 1, _id(1)), connection, 0.0)
    requester.forgive(connection, 100.0)
    assert requester.silent(connection, 100.0) == []
    assert requester.silent(connection, 104.0) == [asked]


@given(st.binary(max_size=100))
def test_any_list_of_ids(body: bytes) -> None:
    """WORKING with any bytes: whole ids count, a rest does not, unknown ones are passed over."""
    requester, connection = Requester(5.0), Connection()
    asked = _ask(requester, connection)
    requester.receive(_said(Kind.WORKING, 1, body + b""), connection, 1.0)
    assert asked.is_heard == (_id(1) in {body[start : start + 16] for start in range(0, len(body), 16)})
    requester.receive(_said(Kind.WORKING, 1, _id(1) + body[:15]), connection, 1.0)
    assert asked.is_heard


def test_a_word_that_never_ends() -> None:
    """Of a WORKING only so many ids are read as a server may have reason to name."""
    requester, connection = Requester(5.0), Connection()
    asked = _ask(requester, connection)
    requester.receive(_said(Kind.WORKING, 1, bytes(LONGEST_WORD) + _id(1)), connection, 1.0)
    assert not asked.is_heard
    requester.receive(_said(Kind.WORKING, 1, bytes(LONGEST_WORD - 16) + _id(1)), connection, 1.0)
    assert asked.is_heard


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_reply_of_too_many_frames(is_whole: bool) -> None:
    """Its request ends, and says so; whether all frames are there or the first only. To anybody else it means nothing."""
    requester, connection = Requester(max_frames=10), Connection()
    body = (b"",) * (1000 if is_whole else 9)
    for number, reply in enumerate((_said(Kind.REPLY, 0, *body), _said(Kind.REJECTED, 1, *body), [*_echoed(2), *body])):
        asked = _ask(requester, connection, number)
        answer = requester.receive(reply, connection, 1.0)
        assert answer is not None
        assert (answer.asked, answer.kind, answer.body) == (asked, Kind.ERROR, [])
        assert "more than 10 frames" in answer.flaw
        requester.abandon(asked)
    assert requester.receive(_said(Kind.REPLY, 7, *body), connection, 1.0) is None
    assert requester.receive([b"garbage", *body], connection, 1.0) is None
    assert (requester.malformed, len(requester)) == (5, 0)
    asked = _ask(requester, connection, 9)
    assert requester.receive(_said(Kind.REPLY, 9, *[b""] * 8), connection, 1.0) == (
        asked,
        [b""] * 8,
        Kind.REPLY,
        NO_JOURNAL,
        "",
    )


# What may not have arrived yet.


def _big(requester: Requester, connection: Connection, number: int, now: float, size: int = 1_000_000) -> Asked:
    asked = requester.open(_id(number), [bytes(size)], None, number)
    requester.send(asked, connection, now)
    return asked


def _is_near(size: int, body: int) -> bool:
    """A body of this size, and the frames around it."""
    return body <= size <= body + 1000


def test_bytes_under_way() -> None:
    """Those of requests that were handed over by a time and not heard of since: by WORKING, or by their answer."""
    requester, connection = Requester(5.0), Connection()
    for number in range(3):
        _big(requester, connection, number, float(number))
    assert _is_near(connection.under_way(1.0), 2_000_000)
    assert _is_near(connection.under_way(9.0), 3_000_000)
    requester.receive(_said(Kind.WORKING, 0, _id(0)), connection, 3.0)
    assert _is_near(connection.under_way(9.0), 2_000_000)
    requester.receive(_said(Kind.REPLY, 1), connection, 3.0)
    assert _is_near(connection.under_way(9.0), 1_000_000)
    requester.receive(_echoed(2), connection, 3.0)
    assert connection.under_way(9.0) == 0


@pytest.mark.parametrize("said", [Kind.WORKING, Kind.REPLY, Kind.REQUEST])
def test_bytes_of_requests_that_were_given_up(said: Kind) -> None:
    """They count, until what was sent after them is heard of."""
    requester, connection = Requester(5.0), Connection()
    asked = [_big(requester, connection, number, float(number)) for number in range(4)]
    for each in (asked[0], asked[2]):
        requester.abandon(each)
    assert _is_near(connection.under_way(1.0), 2_000_000)
    assert _is_near(connection.under_way(9.0), 4_000_000)
    for number, left in ((1, [2.0]), (3, [])):
        answer = _echoed(number) if said == Kind.REQUEST else _said(said, number, _id(number))
        requester.receive(answer, connection, 5.0)
        assert [at for at, _ in connection.left] == left


def test_what_was_heard_of_is_not_under_way_when_it_is_given_up() -> None:
    """It has arrived, whatever its caller does."""
    requester, connection = Requester(5.0), Connection()
    asked = _big(requester, connection, 1, 0.0)
    requester.receive(_said(Kind.WORKING, 1, _id(1)), connection, 1.0)
    requester.abandon(asked)
    assert connection.under_way(9.0) == 0


def test_an_answer_by_another_connection_tells_nothing_of_this_one() -> None:
    """A request was sent again; the first one's answer comes."""
    requester, first, second = Requester(5.0), Connection(), Connection()
    requester.abandon(_big(requester, second, 1, 0.0))
    asked = _ask(requester, first, 2)
    requester.unsend(asked)
    requester.send(asked, second, 1.0)
    assert requester.receive(_said(Kind.REPLY, 2), first, 2.0) is not None
    assert _is_near(second.under_way(9.0), 1_000_000)
    assert not second.sent


def test_memory_of_what_was_given_up_is_bounded() -> None:
    """However many: the newest ones are counted together."""
    requester, connection = Requester(5.0), Connection()
    for number in range(3 * LEFT):
        requester.abandon(_big(requester, connection, number, float(number), 1000))
    assert len(connection.left) == LEFT
    assert connection.under_way(math.inf) >= 3 * LEFT * 1000


def _silent_behind(size: int, heard: float | None, at: float = 5.0, kind: Kind = Kind.WORKING) -> list[int]:
    """Which requests are silent at a time: 1 was heard of then, if at all; 2 has that size; 3 is a small one behind it."""
    requester, connection = Requester(5.0), Connection()
    _ask(requester, connection, 1)
    requester.receive(_said(Kind.WORKING, 1, _id(1)), connection, 0.0)
    _big(requester, connection, 2, 0.5, size)
    _ask(requester, connection, 3, 0.6)
    if heard is not None:
        requester.receive(_said(kind, 1, _id(1)), connection, heard)
    return [asked.owner for asked in requester.silent(connection, at)]


def test_a_server_is_not_silent_about_what_it_has_not_got() -> None:
    """As long as it says that it works on others, and what is under way explains why these have not arrived."""
    assert _silent_behind(1_000_000, 4.9) == []
    assert _silent_behind(1_000, 4.9) == [2, 3]
    assert _silent_behind(1_000_000, None) == [1, 2, 3]
    assert _silent_behind(1_000_000, 1_999.9, at=2_000.0) == [2, 3]


def test_a_server_that_has_just_answered_is_not_silent_about_what_it_has_not_got() -> None:
    """Its answer shows that its program runs, as WORKING does: it has nothing else to say WORKING of."""
    assert _silent_behind(1_000_000, 4.9, kind=Kind.REPLY) == []
    assert _silent_behind(1_000, 4.9, kind=Kind.REPLY) == [2, 3]
    assert _silent_behind(1_000_000, 0.9, kind=Kind.REPLY) == [2, 3]


def test_expiry() -> None:
    """A request expires once, at its time, sent or not."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection, at=15.0)
    waiting = requester.open(_id(2), [b"x"], 16.0, None)
    assert requester.next_deadline() == 15.0
    assert list(requester.tick(14.0)) == []
    assert list(requester.tick(16.0)) == [asked, waiting]
    assert list(requester.tick(99.0)) == []
    assert requester.abandon(asked)
    assert requester.receive(_said(Kind.REPLY), connection, 16.0) is None
    requester.abandon(waiting)
    assert requester.next_deadline() is None


def test_memory_is_bounded() -> None:
    """Requests that end long before their limits leave nothing behind."""
    requester, connection = Requester(), Connection()
    for number in range(10_000):
        _ask(requester, connection, number, at=1e9)
        assert requester.receive(_said(Kind.REPLY, number), connection, 0.0) is not None
        assert len(requester._due) < 200
    assert (len(requester), connection.sent) == (0, {})


def test_connections_that_are_lost_again_and_again() -> None:
    """A request that waits meanwhile remembers some of them; what the last ones have brought is its answer."""
    requester = Requester()
    asked = _ask(requester, Connection())
    for _ in range(2 * MOST_TRIED):
        assert asked.connection is not None
        requester.lose(asked.connection)
        requester.send(asked, Connection(), 1.0)
    assert len(asked.tried) == MOST_TRIED
    assert asked.tried[-1] is asked.connection
    assert requester.receive(_said(Kind.REPLY), asked.tried[0], 1.0) is not None


def test_an_answer_of_a_stranger() -> None:
    """A server that was not asked cannot answer: only a connection on which the request was sent, also in an earlier try."""
    requester = Requester()
    asked_one, other, never = Connection(), Connection(), Connection()
    asked = requester.open(_id(1), [b"x"], None, None)
    requester.send(asked, asked_one, 0.0)
    assert requester.receive(_said(Kind.REPLY, 1, b"lie"), never, 0.0) is None
    assert requester.late == 1
    requester.unsend(asked)
    requester.send(asked, other, 0.0)
    answer = requester.receive(_said(Kind.REPLY, 1, b"late but true"), asked_one, 0.0)
    assert answer is not None
    assert answer.body == [b"late but true"]


def test_a_first_try_is_new() -> None:
    """It has no age and is for any journal; so is one that was never handed over, or was rejected."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection, now=1.0)
    assert (_header(asked.frames).age_ms, _header(asked.frames).journal) == (0, NO_JOURNAL)
    requester.unsend(asked)
    assert _header(requester.send(asked, connection, 5.0)).age_ms == 0


def test_a_resend_says_its_age_and_its_journal() -> None:
    """From the first time that it was sent, and at least a millisecond."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection, now=1.0)
    requester.lose(connection)
    requester.bind(asked, JOURNAL)
    for now, age in ((1.0, 1), (3.5, 2500), (1e9, 0xFFFFFFFF)):
        header = _header(requester.send(asked, Connection(), now))
        assert (header.age_ms, header.journal, header.request_id) == (age, JOURNAL, _id(1))
        assert asked.connection is not None
        requester.lose(asked.connection)


def test_an_interrupted_request_waits_again() -> None:
    """INTERRUPTED resolves it, names the journal, and leaves it open, as REJECTED does; by another connection it is late."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    other = Connection()
    assert requester.receive(_said(Kind.INTERRUPTED, journal=JOURNAL), other, 0.0) is None
    answer = requester.receive(_said(Kind.INTERRUPTED, journal=JOURNAL), connection, 0.0)
    assert answer is not None
    assert (answer.kind, answer.journal, asked.is_open, asked.connection) == (Kind.INTERRUPTED, JOURNAL, True, None)
    assert (len(requester), requester.late) == (1, 1)


def test_whose_journal_has_it() -> None:
    """A direct server's; behind a proxy only of who has said WORKING for it; beside a plain peer nobody's; else as before."""
    requester = Requester(5.0)
    before = b"before".ljust(16)

    def lost(*messages: list[bytes]) -> bytes:
        connection = Connection()
        asked = _ask(requester, connection)
        for frames in messages:
            requester.receive(frames, connection, 0.0)
        requester.lose(connection)
        requester.abandon(asked)
        return connection.journal_of(asked, before)

    pong = _said(Kind.PONG, 9, journal=JOURNAL)
    assert lost() == before
    assert lost(pong) == JOURNAL
    assert lost(_said(Kind.PONG, 9)) == NO_JOURNAL
    assert lost(_said(Kind.PONG, 9, hops=2, journal=JOURNAL)) == NO_JOURNAL
    assert lost(_said(Kind.WORKING, 1, _id(1), hops=2, journal=JOURNAL)) == JOURNAL
    assert lost(_said(Kind.WORKING, 9, _id(9), hops=2, journal=JOURNAL)) == NO_JOURNAL
    assert lost(pong, _echoed(9)) == NO_JOURNAL


# The short-cuts.

_IDS = st.sampled_from([_id(1), _id(2), _id(3)])
_HEADS = st.one_of(
    st.builds(
        ServerHeader,
        st.one_of(st.sampled_from([int(each) for each in Kind if each >= 0x80]), st.integers(0x80, 0xFF)),
        _IDS,
        st.sampled_from([INSTANCE, b"another".ljust(16)]),
        st.sampled_from([NO_JOURNAL, JOURNAL]),
        st.sampled_from([0, 1, 1, 1, 2]),
        st.sampled_from([b"", b"", b"trace"]),
    ).map(ServerHeader.encode),
    st.builds(Header, st.sampled_from([1, 1, 2, 3, 4, 9]), _IDS, st.sampled_from([None, 5000])).map(Header.encode),
    st.sampled_from(["as sent 1", "as sent 2"]),
)
#: How a header is damaged: not at all, by one byte, by its end, by more at its end.
_DAMAGES = st.one_of(
    st.none(),
    st.none(),
    st.tuples(st.integers(0, 80), st.integers(1, 255)),
    st.integers(0, 60),
    st.just(b"\0"),
    st.just(b"more"),
)


def _damaged(frame: bytes, damage: Any) -> bytes:
    if isinstance(damage, tuple):
        at, bits = damage[0] % len(frame), damage[1]
        return frame[:at] + bytes((frame[at] ^ bits,)) + frame[at + 1 :]
    if isinstance(damage, int):
        return frame[:damage]
    return frame + (damage or b"")


@given(
    st.lists(st.tuples(_HEADS, _DAMAGES, st.booleans()), max_size=12),
    st.sampled_from([b"", b"trace"]),
    st.sampled_from([None, 12.0]),
)
def test_the_short_cuts_lead_to_the_same_place(received: list[Any], metadata: bytes, at: float | None) -> None:
    """What `receive` does not take apart gives what taking it apart would: the same answer, and the same is known then."""

    def run(is_short: bool) -> list[Any]:
        requester, connections = Requester(5.0), (Connection(), Connection())
        asked = [requester.open(_id(number), [b"body"], at, number, metadata=metadata) for number in (1, 2)]
        for each, connection in zip(asked, connections, strict=True):
            requester.send(each, connection, 10.0)
        sent = {f"as sent {number}": each.frames[0] for number, each in enumerate(asked, 1)}
        seen: list[Any] = []
        for head, damage, is_other in received:
            frames = [_damaged(sent.get(head, head), damage), b"", b"answer", b""]
            connection = connections[is_other]
            answer = (requester.receive if is_short else requester._receive)(frames, connection, 11.0)
            seen.append(None if answer is None else (answer.asked.request_id, *answer[1:]))
            seen.append((requester.late, requester.malformed, requester.ignored, list(requester.pending)))
            for one in connections:
                seen.append([getattr(one, name) for name in Connection.__slots__ if name != "sent"] + [list(one.sent)])
            for each in asked:
                seen.append((each.is_open, each.is_heard, each.heard_at, each.heard_by, each.connection in connections))
        return seen

    assert run(True) == run(False)


@pytest.mark.parametrize("size", range(16, 59))
def test_a_reply_that_is_cut_off(size: int) -> None:
    """Of a server that was not heard of before: the part of a header is none, wherever it ends."""
    requester, connection = Requester(), Connection()
    asked = _ask(requester, connection)
    whole, *rest = _said(Kind.REPLY)
    answer = requester.receive([whole[:size], *rest], connection, 0.0)
    assert (answer is None) == asked.is_open == (size < len(whole))
    assert requester.malformed == (size < len(whole))


def test_limits_that_are_interrupted_come_again() -> None:
    """Whoever is interrupted between two requests whose limits have come gets the rest of them the next time."""
    requester = Requester()
    asked = [requester.open(_id(number), [b"x"], 1.0, None) for number in range(3)]
    for each in requester.tick(2.0):
        requester.abandon(each)
        break
    assert list(requester.tick(2.0)) == asked[1:]
