"""What does a step's result look like where it is kept?

A codec turns a result into bytes and back. The handler gets what comes *back*, in the first run too, so that all runs see the
same: of a tuple a list, of a dict with numbers as keys one with strings.

It does not know requests, nor where the bytes go.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Codec", "InTransaction", "JsonOrBytes", "in_transaction"]


class Codec(Protocol):
    """Results of steps, as bytes. What either raises is raised by `request.step`."""

    def encode(self, value: Any) -> bytes:
        """The bytes to keep."""

    def decode(self, data: bytes) -> Any:
        """What was encoded, or what is taken for it."""


class JsonOrBytes:
    """The default: bytes as they are, anything else as JSON. Never pickle: whoever can write the file could run code.

    A byte in front tells them apart: `62` (b) for bytes, `6A` (j) for JSON.
    """

    def encode(self, value: Any) -> bytes:
        """TypeError or ValueError if it is neither bytes nor JSON."""
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
