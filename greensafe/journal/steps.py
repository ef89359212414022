"""The results of steps, as a journal keeps them.

A codec turns a result into bytes and back. The handler gets what comes *back*, in the first run too, so that all runs see the
same: of a tuple a list, of a dict with numbers as keys one with strings.

It does not know requests, nor where the bytes go.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import JournalError

__all__ = ["Act", "Codec", "InTransaction", "JsonOrBytes", "check_name", "in_transaction", "is_under_way"]


class Codec(Protocol):
    """Results of steps, as bytes. What either raises is raised by `request.step`."""

    def encode(self, value: Any) -> bytes:
        """The bytes to keep."""

    def decode(self, data: bytes) -> Any:
        """Return the value that was encoded, or what stands for it."""


class JsonOrBytes:
    """The default: bytes as they are, anything else as JSON. Never pickle: a user that can write the file could run code.

    A byte in front tells them apart: `62` (b) for bytes, `6A` (j) for JSON.
    """

    def encode(self, value: Any) -> bytes:
        """Return the bytes to store. TypeError or ValueError if the value is neither bytes nor JSON."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            return b"b" + bytes(value)
        return b"j" + json.dumps(value, separators=(",", ":")).encode()

    def decode(self, data: bytes) -> Any:
        """ValueError if this codec did not write it."""
        if data[:1] == b"b":
            return data[1:]
        if data[:1] == b"j":
            return json.loads(data[1:])
        raise ValueError(f"a step's result that begins with {data[:1]!r} was written by another codec")


class InTransaction:
    """A function that is called with the journal's connection; see `in_transaction`."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act


def in_transaction(act: Callable[..., Any]) -> InTransaction:
    """Have `request.step` call `act(connection, *args)` in the transaction that stores its result.

    So both are there after a crash, or neither: the step runs exactly once. `act` runs in the journal's thread, where it must
    not wait by gevent, and must neither commit nor roll back.
    """
    if not callable(act):
        raise TypeError(f"in_transaction takes a function of a connection, not {type(act).__name__}")
    return InTransaction(act)


class Act:
    """An effect as the journal's thread calls it: the function, and the codec for its result.

    Attributes:
        is_under_way: It was called and has not returned.
        is_wanted: Somebody waits for it; if not, the function is not called, and the effect fails.
    """

    __slots__ = ("_args", "_codec", "_fn", "is_under_way", "is_wanted")

    def __init__(self, fn: InTransaction, args: tuple[Any, ...], codec: Codec) -> None:
        self._fn = fn
        self._args = args
        self._codec = codec
        self.is_under_way = False
        self.is_wanted = True

    def __call__(self, connection: Any) -> bytes:
        if not self.is_wanted:
            raise JournalError("nobody waits for this effect any more: it was not done")
        self.is_under_way = True
        try:
            return self._codec.encode(self._fn.act(connection, *self._args))
        finally:
            self.is_under_way = False


def is_under_way(write: object) -> bool:
    """Return whether a write is an effect whose function is running just now."""
    act = getattr(write, "act", None)
    return isinstance(act, Act) and act.is_under_way


def check_name(name: object) -> None:
    """Raise TypeError or ValueError for a step's name that no journal can keep."""
    if not isinstance(name, str):
        raise TypeError(f"a step's name is a str, not {type(name).__name__}")
    try:
        name.isascii() or name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a step's name is text that can be stored; {name!a} has half of a surrogate pair in it") from None
