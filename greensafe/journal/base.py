"""The interface between a server and the place where it keeps what must survive it.

A `Journal` stores requests, the results of their finished steps and their answers. It is told in batches of writes, which
`sansio.records` names. Rules for a backend:

* A batch is atomic and durable: when `commit` returns, all of it survives a crash and a loss of power; when it raises, none of
  it is there. Writes of a batch take effect in their order, so one sees what those before it have done.
* What it has once accepted it keeps until it is told otherwise or `tidy` drops it. What `tidy` drops is counted, and the
  journal remembers up to when: an unknown request that was first sent before that is `State.DROPPED`, not new.
* It is called by one thread at a time, which may be another one each time and is never the hub's. `id`, `now` and `dropped`
  are asked by any.
* It raises JournalError, and nothing else, for whatever goes wrong with the place.
* `commit` raises JournalUnavailable, which is one, if and only if no write of the batch is to blame: the place is locked, full,
  read-only or out of reach, and would not store one small write either. Then the next call of `commit` has the very same writes
  again, as long as `_patience` lasts. Any other JournalError may be one write's fault, and the batch comes again in halves.
* What it can never store, however often it is tried, is Unstorable, a JournalError too: what is larger than the place can ever
  hold, say. Its request is answered for good. Any bytes, and any text that UTF-8 can encode, can be stored.
* So a batch must not be stored twice because it comes twice. Where a commit may have taken effect although nobody knows (its
  connection was lost just then), the backend finds out, at the latest when it is called next.

The *journal's time* is in seconds. It is counted by the monotonic clock as long as the machine runs, by the time of day across
a reboot, and never goes backwards; so a limit that was stored before a crash means the same after it.

It does not know what requests are about, who asks or answers, nor when an attempt is one too many: see `sansio.resume`.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..sansio.records import Write

__all__ = ["Journal"]


class Journal(abc.ABC):
    """The interface of a journal backend. The module's head has the rules, `greensafe.testing.JournalConformance` their tests.

    Attributes:
        id: 16 bytes that tell this journal from all others, the same each time it is opened; known once it is open.
    """

    id: bytes

    @abc.abstractmethod
    def open(self) -> None:
        """Make it ready, with what was stored before.

        Raises:
            JournalError: It is not there, not one, of a newer version, damaged, or in use by another server. The text says
                which, and what to try. Nothing was changed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give it free for others; it can be opened again. Does nothing if it is closed."""

    @abc.abstractmethod
    def now(self) -> float:
        """The journal's time."""

    @abc.abstractmethod
    def commit(self, writes: Sequence[Write]) -> list[Any]:
        """Do all of them, or none; return their results, which are what each of the classes says.

        No writes at all are a question, asked while the place is known to be ill: an error says that it still is. So it should
        try what a write would, and change nothing that anybody sees.

        Raises:
            JournalError: None of it is stored. One of the writes may be the cause (a step of a request that is not OPEN, a
                body that is too large): the others may be tried again without it.
            Unstorable: None of it is stored, and one of the writes never can be.
            JournalUnavailable: None of it is stored, and none of the writes is the cause; see the module's head.
        """

    @abc.abstractmethod
    def tidy(self, running: Collection[bytes]) -> bool:
        """Drop what is too old, or too much, but none of the `running` ids; return True if there is more to do.

        Those that are OPEN do not age: after a crash their clients have at least about half the time that makes others too old
        to come again.
        It takes a bounded time. Called after commits, and now and then.

        Raises:
            JournalError: Nothing was dropped in this call. JournalUnavailable: since the place cannot be written to.
        """

    @property
    @abc.abstractmethod
    def dropped(self) -> Mapping[str, int]:
        """The count of requests dropped since it was first opened, by cause."""
