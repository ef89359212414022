"""How is a step of a handler run, so that no other run of its request repeats it?

What is stored is returned without calling anything; what is not is called, stored and read back. After the answer nothing is
stored any more: steps that still run are not for another run. Requests without an id store nothing either, but have effects.

It does not know how things are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent.event import AsyncResult

from ..journal.commits import Commits
from ..journal.steps import Act, Codec, InTransaction
from ..sansio.exchange import Exchange
from ..sansio.records import Effect, Failed, Step
from .storing import Memory

__all__ = ["Steps"]


class Steps:
    """The steps of one server's requests.

    Args:
        commits: Where they are stored.
        codec: For their results.
    """

    __slots__ = ("_codec", "_commits")

    def __init__(self, commits: Commits, codec: Codec) -> None:
        self._commits = commits
        self._codec = codec

    def __repr__(self) -> str:
        return f"<Steps {self._commits!r}>"

    def run(self, exchange: Exchange, name: str, fn: Callable[..., Any] | InTransaction, args: tuple[Any, ...]) -> Any:
        """The step's result, as `Request.step` says."""
        memory: Memory | None = exchange.memory
        if memory is None:
            return self._in_transaction(exchange, b"", name, 0, fn, args)
        number = memory.counts[name] = memory.counts.get(name, 0) + 1
        stored = memory.steps.get((name, number))
        if stored is not None:
            return self._codec.decode(stored)
        request_id = b"" if exchange.is_answered else memory.request_id
        if isinstance(fn, InTransaction):
            return self._in_transaction(exchange, request_id, name, number, fn, args)
        data = self._codec.encode(fn(*args))
        if not isinstance(data, (bytes, bytearray, memoryview)):
            # sqlite would keep it as something else, or silently not at all.
            raise TypeError(f"a step_codec's encode returns bytes, not {type(data).__name__}")
        data = bytes(data)  # as it comes back in the next run
        if not exchange.is_answered:
            self._store(Step(memory.request_id, name, number, data))
        return self._codec.decode(data)

    def _in_transaction(
        self, exchange: Exchange, request_id: bytes, name: str, number: int, fn: Any, args: tuple[Any, ...]
    ) -> Any:
        act = Act(fn, args, self._codec)
        try:
            result = self._store(Effect(request_id, name, number, act))
        finally:
            act.is_wanted = False
        if isinstance(result, Failed):
            raise result.error
        return self._codec.decode(result)

    def _store(self, write: Step | Effect) -> Any:
        """Wait until something is stored. Whoever ends the wait leaves it open whether it is.

        An effect that has not begun by then is not done: it would happen unseen. What a step has done is stored all the same:
        its request may be answered, but only for now.
        """
        done = AsyncResult()
        number = self._commits.write(
            write, lambda result, error: done.set(result) if error is None else done.set_exception(error)
        )
        try:
            return done.get()
        except BaseException:
            if isinstance(write, Effect):
                self._commits.withdraw(number)
            raise
