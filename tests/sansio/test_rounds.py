"""Tests of greensafe.sansio.rounds."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from greensafe.sansio import rounds
from greensafe.sansio.rounds import INTERVAL, LONG, Rounds

EACH, ALL = 5, 20


class _Client:
    def __init__(self, *origin: bytes, pulse: float = INTERVAL, is_open: bool = True) -> None:
        self.origin = origin
        self.open = {b"id": None} if is_open else {}
        self.due = math.inf
        self.pulse = pulse


def _is_live(client: _Client, at: float) -> bool:
    return client.due == at


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "EACH", EACH)
    monkeypatch.setattr(rounds, "ALL", ALL)


def _push(made: Rounds[_Client], client: _Client, at: float) -> None:
    client.due = at
    made.push(at, client)


def _run(made: Rounds[_Client], until: float) -> list[tuple[float, _Client]]:
    """Take whenever something is to be done; who is told is to be told again after its pulse."""
    told = []
    now = 0.0
    while (at := made.next_at()) is not None and at <= until:
        now = max(now, at)
        for client in list(made.take(now)):
            told.append((now, client))
            if client.open:
                _push(made, client, now + client.pulse)
    return told


def _made(*clients: _Client) -> Rounds[_Client]:
    made: Rounds[_Client] = Rounds(_is_live)
    for client in clients:
        _push(made, client, client.pulse)
    return made


def test_few_clients_are_told_on_time() -> None:
    """As long as no bound is met each is told exactly when it is to be."""
    quick, slow = _Client(b"a"), _Client(b"b", pulse=1.0)
    told = _run(_made(quick, slow), 1.0)
    assert [now for now, client in told if client is slow] == [1.0]
    times = [now for now, client in told if client is quick]
    assert times[:19] == pytest.approx([INTERVAL * number for number in range(1, 20)])
    assert _made().next_at() is None


def test_one_connection_is_told_so_much_in_an_interval() -> None:
    """However many ids it makes up, and whenever they are due; each of them is told in its turn."""
    clients = [_Client(b"a", b"%d" % number, pulse=INTERVAL * (1 + number / 100)) for number in range(100)]
    told = _run(_made(*clients), 2.0)
    assert len(told) == pytest.approx(EACH * 2.0 / INTERVAL, rel=0.1)
    for start, _ in told:
        assert sum(start <= now < start + INTERVAL - 1e-9 for now, _ in told) <= 2 * EACH  # of two intervals that it meets
    counts = Counter(client for _, client in told)
    assert set(counts) == set(clients)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_connection_with_many_clients_takes_nothing_from_another_one() -> None:
    """A client that has a connection for itself is told as ever."""
    crowd = [_Client(b"a", b"%d" % number) for number in range(500)]
    alone = _Client(b"b")
    told = [now for now, client in _run(_made(*crowd, alone), 2.0) if client is alone]
    assert len(told) >= 2.0 / INTERVAL / 2 - 2


def test_all_connections_together() -> None:
    """So much in an interval, in turn."""
    clients = [_Client(b"%d" % number) for number in range(200)]
    told = _run(_made(*clients), 2.0)
    assert len(told) == pytest.approx(ALL * 2.0 / INTERVAL, rel=0.1)
    counts = Counter(client for _, client in told)
    assert set(counts) == set(clients)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_connections_take_turns_within_an_interval() -> None:
    """None of them waits until others have had all that they may have."""
    made = _made(*(_Client(b"%d" % (number % 8), b"%d" % number) for number in range(8 * ALL)))
    told = [list(made.take(INTERVAL)) for _ in range(8)]
    assert sum(map(len, told)) == ALL
    counts = Counter(client.origin[0] for client in list(made.take(2 * INTERVAL)))
    assert len(counts) == 8
    assert set(counts.values()) == {ALL // 8, ALL // 8 + 1}


@pytest.mark.parametrize("has_long_ids", [True, False])
def test_long_messages_count_as_several(has_long_ids: bool) -> None:
    """Whether its ids are long or its requests many, a client that makes the message long takes others' room, not more room."""
    crowd = [_Client(b"a", b"%d" % number + bytes(LONG if has_long_ids else 1)) for number in range(50)]
    if not has_long_ids:
        for client in crowd:
            client.open = dict.fromkeys(b"%d" % number for number in range(LONG // 16 + 1))
    told = _run(_made(*crowd), 2.0)
    assert len(told) == pytest.approx((EACH + 1) // 2 * 2.0 / INTERVAL, rel=0.1)
    assert {client for _, client in told} == set(crowd)


def test_the_longest_message_is_told_all_the_same() -> None:
    """A client with more requests than fit is told in each interval."""
    client = _Client(b"a")
    client.open = dict.fromkeys(b"%d" % number for number in range(2 * ALL * LONG // 16))
    assert len(_run(_made(client), 2.0)) >= 2.0 / INTERVAL - 1


def test_one_call_does_a_part() -> None:
    """Of what is due only so much is taken out at a time; the next call is due at once."""
    made = _made(*(_Client(b"a", b"%d" % number, is_open=False) for number in range(3 * ALL)))
    for left in (2, 1, 0):
        assert len(list(made.take(1.0))) == ALL
        assert len(made) == left * ALL
        assert (made.next_at() or math.inf) <= (1.0 if left else math.inf)


def test_clients_without_requests_cost_nothing() -> None:
    """Nothing is said to them, so they keep nobody from being told."""
    made: Rounds[_Client] = Rounds(_is_live)
    idle = [_Client(b"a", b"%d" % number, is_open=False) for number in range(EACH + 1)]
    busy = _Client(b"a", b"busy")
    for client in (*idle, busy):
        _push(made, client, 1.0)
    assert list(made.take(1.0)) == [*idle, busy]


@pytest.mark.parametrize("is_swept", [True, False])
def test_what_is_over_is_let_go(is_swept: bool) -> None:
    """Of clients that are forgotten while they wait for their turn nothing is told, and nothing stays."""
    clients = [_Client(b"a", b"%d" % number) for number in range(2 * EACH)]
    made = _made(*clients, _Client(b"b", pulse=9.0))
    assert list(made.take(INTERVAL)) == clients[:EACH]
    for client in clients[EACH:]:
        client.due = math.inf
    assert len(made) == EACH + 1
    if is_swept:
        made.sweep()
        assert len(made) == 1
    assert list(made.take(2 * INTERVAL)) == []
    assert len(made) == 1
    assert made.next_at() == 9.0
