"""Tests of greensafe.sansio.due."""

from __future__ import annotations

from hypothesis import given, strategies as st

from greensafe.sansio.due import DueQueue

actions = st.lists(st.tuples(st.sampled_from(["push", "kill", "pop"]), st.integers(0, 50)), max_size=300)


@given(actions)
def test_against_a_list(steps: list[tuple[str, int]]) -> None:
    """What is due comes out in order, what is over does not, and next_at is the smallest time."""
    live: dict[int, float] = {}
    queue: DueQueue[int] = DueQueue(lambda thing, at: live.get(thing) == at)
    for number, (action, value) in enumerate(steps):
        if action == "push":
            live[number] = float(value)
            queue.push(float(value), number)
        elif action == "kill" and live:
            del live[sorted(live)[value % len(live)]]
        elif action == "pop":
            due = [thing for _, thing in queue.take_due(value)]
            assert sorted(due) == sorted(thing for thing, at in live.items() if at <= value)
            assert [live[thing] for thing in due] == sorted(live[thing] for thing in due)
            for thing in due:
                del live[thing]
        assert queue.next_at() == (min(live.values()) if live else None)


def test_memory_is_bounded() -> None:
    """A hundred thousand things that end long before their time leave no heap behind."""
    live: set[int] = set()
    queue: DueQueue[int] = DueQueue(lambda thing, at: thing in live)
    largest = 0
    for number in range(100_000):
        live.add(number)
        queue.push(1e9 + number, number)
        live.discard(number - 100)
        largest = max(largest, len(queue))
    assert largest <= 500
