"""Tests of greensafe.sansio.turns."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, strategies as st

from greensafe.sansio.turns import Turns

origins = st.tuples(st.sampled_from([b"A", b"B", b"C"]), st.sampled_from([b"1", b"2", b"3"]))


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "next"]), origins), max_size=200))
def test_against_a_list(steps: list[tuple[str, tuple[bytes, ...]]]) -> None:
    """What was added and not removed is next in the end, each client's oldest first."""
    turns = Turns()
    waiting: list[tuple[tuple[bytes, ...], int]] = []
    for key, (action, origin) in enumerate(steps):
        if action == "add":
            turns.add(origin, key)
            waiting.append((origin, key))
        elif action == "remove" and waiting:
            gone = waiting.pop(key % len(waiting))
            turns.remove(*gone)
        elif action == "next" and waiting:
            _take(turns, waiting)
        assert len(turns) == len({origin[0] for origin, _ in waiting})
    while waiting:
        _take(turns, waiting)
    assert not turns


def _take(turns: Turns, waiting: list[tuple[tuple[bytes, ...], int]]) -> tuple[bytes, ...]:
    key = turns.next()
    [origin] = [origin for origin, each in waiting if each == key]
    assert key == min(each for other, each in waiting if other == origin)
    turns.remove(origin, key)
    waiting.remove((origin, key))
    return origin


@given(st.lists(origins, min_size=1, max_size=100))
def test_everybody_gets_a_turn(coming: list[tuple[bytes, ...]]) -> None:
    """While nobody comes, no connection that waits is ever two turns behind another one, nor a client behind one beside it."""
    turns = Turns()
    waiting = [(origin, key) for key, origin in enumerate(coming)]
    for each in waiting:
        turns.add(*each)
    served: Counter[bytes] = Counter()
    clients: Counter[tuple[bytes, ...]] = Counter()
    while waiting:
        origin = _take(turns, waiting)
        served[origin[0]] += 1
        clients[origin] += 1
        for other, _ in waiting:
            assert served[other[0]] >= served[origin[0]] - 1
            assert other[0] != origin[0] or clients[other] >= clients[origin] - 1


def test_a_frame_before_each_request_makes_no_client_of_it() -> None:
    """Whoever puts a frame of its own before each of a thousand requests has one turn in two against a single other client."""
    turns = Turns()
    for key in range(1000):
        turns.add((b"greedy", b"%d" % key), key)
    turns.add((b"modest",), 1000)
    first = turns.next()
    turns.remove((b"greedy", b"0"), first)
    assert (first, turns.next()) == (0, 1000)
