"""The writes that wait for a journal, and those that are being written.

Each write has a number, by which it can be withdrawn: what has not begun to be written is taken out, with all that it holds;
of what is being written nobody is told any more, and it is undone by the next batch if it turns out to be new.

It does not know what is written, nor when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import JournalError, JournalUnavailable
from ..sansio.records import Effect, Write
from .steps import is_under_way

__all__ = ["Entry", "Queue", "Then"]

#: Called with a write's result and None, or with None and the error.
Then = Callable[[Any, "JournalError | None"], None]

#: A write, the callback of its caller, the write that undoes it, and its weight.
Entry = tuple[Write, "Then | None", "Write | None", int]


class Queue:
    """The writes to one journal, in their order.

    Attributes:
        number: That of the last write that was added.
        waiting: What has not begun to be written, by its number.
        batch: What is being written, or is to be tried again.
        weight: The sum of the weights of what waits.
        withdrawn: Writes that were taken out before anything of them was written.
        late: After `close`, the batch that is still being written.
        unfinished: After `close`, what is to be stored before the journal is closed.
    """

    __slots__ = ("_is_unwanted", "batch", "late", "number", "unfinished", "waiting", "weight", "withdrawn")

    def __init__(self) -> None:
        self.number = 0
        self.waiting: dict[int, Entry] = {}
        self.batch: dict[int, Entry] = {}
        self.weight = 0
        self.withdrawn = 0
        self.late: list[Entry] = []
        self.unfinished: list[Write] = []
        #: Something of the batch was withdrawn.
        self._is_unwanted = False

    def __len__(self) -> int:
        return len(self.waiting) + len(self.batch)

    def __repr__(self) -> str:
        return f"<Queue {len(self.waiting)} waiting, {len(self.batch)} in the batch, weight {self.weight}>"

    def take(self) -> None:
        """Make all that waits the next batch."""
        self.batch, self.waiting, self.weight = self.waiting, {}, 0

    def end_batch(self) -> dict[int, Entry]:
        """Take the batch out: it is written, or has failed."""
        batch, self.batch = self.batch, {}
        return batch

    def withdraw(self, number: int) -> bool:
        """Take back a write; return True if nothing of it was written, nor will be."""
        entry = self.waiting.pop(number, None)
        if entry is not None:
            self.weight -= entry[3]
            self.withdrawn += 1
            return True
        if number in self.batch:
            self._disown(number)
        return False

    def take_waited_for(self) -> list[Entry]:
        """Take out what somebody waits for, of what waits; the rest goes with the next batch."""
        taken = {number: entry for number, entry in self.waiting.items() if entry[1] is not None}
        for number in taken:
            del self.waiting[number]
        self.weight -= sum(entry[3] for entry in taken.values())
        return list(taken.values())

    def put_back(self, failed: dict[int, Entry]) -> set[int]:
        """Have what nobody waits for go with the next batch, of what the place could not take; return its numbers.

        Not what was withdrawn, if it is not wanted then: it is not there, and need not be undone.
        """
        kept = {
            number: (write, then, undo, weight)
            for number, (write, then, undo, weight) in failed.items()
            if then is None and undo is None and not isinstance(write, Effect)
        }
        self.waiting = {**kept, **self.waiting}
        return set(kept)

    def under_way(self) -> list[str]:
        """Return the names of the steps whose effects are running just now."""
        return [write.name for write, *_ in self.batch.values() if isinstance(write, Effect) and is_under_way(write)]

    def abandon(self) -> list[Entry]:
        """Take out what is waited for; return it, with the batch's, but for effects that run: only those are still notified."""
        found = [(number, entry) for number, entry in self.batch.items() if entry[1] is not None and not is_under_way(entry[0])]
        for number, _ in found:
            self._disown(number)
        return [entry for _, entry in found] + self.take_waited_for()

    def undo_unwanted(self, told: Iterable[tuple[Entry, Any]]) -> None:
        """Have undone what was withdrawn while it was written, if it was new; before all that waits, which may have its id."""
        if not self._is_unwanted:
            return
        self._is_unwanted = bool(self.batch)  # it is to be tried again
        first: dict[int, Entry] = {}
        for (_, then, undo, _), result in told:
            if then is None and undo is not None and result is None:
                self.number += 1
                first[self.number] = undo, None, None, 0
        self.waiting = {**first, **self.waiting}

    def close(self, is_paused: bool) -> list[Entry]:
        """Add nothing more; return all that was to be written. The batch is being written, unless it `is_paused`."""
        batch, waiting = list(self.batch.values()), list(self.waiting.values())
        self.batch, self.waiting, self.weight = {}, {}, 0
        if is_paused:
            self.unfinished = [write for write, _, undo, _ in batch + waiting if undo is None]
        else:
            self.late = batch
            self.unfinished = [write for write, _, undo, _ in waiting if undo is None]
        return batch + waiting

    def settle(self, results: list[Any]) -> None:
        """Take the results of the batch that was being written at the end: undo or store, before the rest, what needs it."""
        late, self.late = self.late, []
        first: list[Write] = []
        for (write, _, undo, _), result in zip(late, results, strict=True):
            if isinstance(result, JournalUnavailable):
                first += [write] if undo is None else []
            elif undo is not None and result is None:
                first.append(undo)
        self.unfinished = first + self.unfinished

    def _disown(self, number: int) -> None:
        write, _, undo, weight = self.batch[number]
        self.batch[number] = write, None, undo, weight
        self._is_unwanted = True
