"""Tests of greensafe.journal._queue."""

from __future__ import annotations

from typing import Any

from greensafe.errors import JournalUnavailable
from greensafe.journal import Ack, Begin, Effect, Forget
from greensafe.journal._queue import Entry, Queue
from greensafe.journal.steps import Act, JsonOrBytes, in_transaction


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _then(result: Any, error: Any) -> None:
    raise AssertionError("nobody is told here")


def _begin(number: int) -> Entry:
    return Begin(_id(number), [b"body"], since=0.0), _then, Forget(_id(number)), 100


def _queue(*entries: Entry) -> Queue:
    queue = Queue()
    for entry in entries:
        queue.number += 1
        queue.waiting[queue.number] = entry
        queue.weight += entry[3]
    return queue


def _ids(entries: Any) -> list[int]:
    return [int.from_bytes(entry[0].request_id, "big") for entry in entries]


def test_what_waits_is_withdrawn_with_its_weight() -> None:
    """Nothing of it is left, and it is counted; a second time there is nothing to withdraw."""
    queue = _queue(_begin(1), _begin(2))
    assert queue.withdraw(1)
    assert not queue.withdraw(1)
    assert (_ids(queue.waiting.values()), queue.weight, queue.withdrawn, len(queue)) == ([2], 100, 1, 1)
    assert repr(queue) == "<Queue 1 waiting, 0 in the batch, weight 100>"


def test_what_is_being_written_is_undone_first() -> None:
    """If it was new: before all that waits, which may be the same request; what was known, or has failed, is not undone."""
    queue = _queue(_begin(1), _begin(2), _begin(3), _begin(4))
    queue.take()
    assert [queue.withdraw(number) for number in (1, 2, 3)] == [False] * 3
    queue.waiting[9] = _begin(1)
    told = list(zip(queue.end_batch().values(), [None, "known", JournalUnavailable("no"), None], strict=True))
    queue.undo_unwanted(told)
    assert [entry[:2] for entry in queue.waiting.values()] == [(Forget(_id(1)), None), (_begin(1)[0], _then)]
    assert queue.withdrawn == 0


def test_what_is_tried_again_is_undone_when_it_is_stored() -> None:
    """That it is not wanted is not forgotten with the first try, whose other writes are stored."""
    queue = _queue(_begin(1), _begin(2))
    queue.take()
    queue.withdraw(1)
    first, second = queue.end_batch().items()
    queue.batch = dict([first])
    queue.undo_unwanted([(second[1], None)])
    assert not queue.waiting
    queue.undo_unwanted([(entry, None) for entry in queue.end_batch().values()])
    assert [entry[0] for entry in queue.waiting.values()] == [Forget(_id(1))]


def test_what_nobody_waits_for_is_put_back() -> None:
    """In its place, before what has come meanwhile; but neither what was withdrawn, nor an effect that nobody wants."""
    effect = Effect(_id(4), "pay", 1, Act(in_transaction(lambda connection: 1), (), JsonOrBytes()))
    forget, ack = (Forget(_id(1)), None, None, 0), (Ack(_id(7)), None, None, 0)
    queue = _queue(forget, _begin(2), _begin(3), (effect, _then, None, 0))
    queue.take()
    queue.withdraw(3)
    queue.withdraw(4)
    queue.waiting = {9: ack}
    assert queue.put_back(queue.end_batch()) == {1}
    assert list(queue.waiting.items()) == [(1, forget), (9, ack)]


def test_abandoned() -> None:
    """Whoever waits is to be told, but not who waits for an effect that runs; what nobody waits for stays."""
    act = Act(in_transaction(lambda connection: queue.abandon()), (), JsonOrBytes())
    ack = Ack(_id(7)), None, None, 0
    queue = _queue(_begin(1), (Effect(_id(2), "running", 1, act), _then, None, 0), ack)
    queue.take()
    queue.waiting = {11: _begin(3), 12: ack}
    queue.weight = 100
    act.is_under_way = True
    assert queue.under_way() == ["running"]
    assert _ids(queue.abandon()) == [1, 3]
    assert [entry[1] for entry in queue.batch.values()] == [None, _then, None]
    assert (_ids(queue.waiting.values()), queue.weight) == ([7], 0)
    act.is_under_way = False
    assert _ids(queue.abandon()) == [2]


def test_closed_while_a_batch_is_written() -> None:
    """What waits is to be stored if it is wanted anyway; of the batch, what could not be is, and what is new is undone."""
    ack = Ack(_id(7)), None, None, 0
    queue = _queue(_begin(1), ack, _begin(2))
    queue.take()
    queue.waiting = {11: _begin(3), 12: ack}
    assert _ids(queue.close(is_paused=False)) == [1, 7, 2, 3, 7]
    assert queue.unfinished == [ack[0]]
    queue.settle([None, JournalUnavailable("no"), JournalUnavailable("no")])
    assert queue.unfinished == [Forget(_id(1)), ack[0], ack[0]]


def test_closed_in_a_pause() -> None:
    """Then nothing is being written."""
    ack = Ack(_id(7)), None, None, 0
    queue = _queue(_begin(1), ack)
    queue.take()
    assert _ids(queue.close(is_paused=True)) == [1, 7]
    assert (queue.unfinished, queue.late) == ([ack[0]], [])
