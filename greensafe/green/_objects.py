"""How do objects travel as messages: text, JSON, pickles, and what the program makes of frames itself?

A message that cannot be decoded is read whole all the same, so that what is left of it is never taken for the next message;
the error says so in a note. The socket can be used afterwards (a REP owes an answer, as after any request).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import zmq
from zmq.utils import jsonapi

from ._in_parts import throw_away_in_parts
from ._waiting import EXPIRED, UNSET, Timeout, WaitingSocket

__all__ = ["ObjectSocket"]

T = TypeVar("T")


class ObjectSocket(WaitingSocket):
    """The part of a green socket that sends and receives objects; see `socket.Socket`."""

    def recv_string(self, flags: int = 0, encoding: str = "utf-8", *, timeout: Timeout = UNSET) -> str:
        """Receive one frame as text; see `recv` for the rest.

        Raises:
            UnicodeDecodeError: The message, with all its frames, was read and is gone.
        """
        text: str = self._receive_as("recv_string", flags, timeout, lambda frame: frame.decode(encoding))
        return text

    def recv_json(self, flags: int = 0, *, timeout: Timeout = UNSET, **kwargs: Any) -> Any:
        """Receive one frame as JSON; kwargs go to json.loads. See `recv` for the rest.

        Raises:
            ValueError: It is no JSON, or no UTF-8. The message, with all its frames, was read and is gone.
        """
        return self._receive_as("recv_json", flags, timeout, lambda frame: jsonapi.loads(frame, **kwargs))

    def recv_pyobj(self, flags: int = 0, *, timeout: Timeout = UNSET) -> Any:
        """Receive one frame as a pickle: only from a peer that you trust with running code. See `recv` for the rest.

        Raises:
            Exception: What unpickling raised. The message, with all its frames, was read and is gone.
        """
        return self._receive_as("recv_pyobj", flags, timeout, pickle.loads)

    def recv_serialized(
        self, deserialize: Callable[[list[Any]], T], flags: int = 0, copy: bool = True, *, timeout: Timeout = UNSET
    ) -> T:
        """Receive a whole message and return what `deserialize(frames)` makes of it. See `recv` for the rest."""
        frames = self._receive_all("recv_serialized", flags, copy, False, timeout)
        if frames is EXPIRED:
            return self._ended()  # type: ignore[no-any-return]  # whatever a subclass decides
        return self._decoded("recv_serialized", frames, deserialize)

    recv_unicode = recv_string

    def send_string(
        self,
        u: str,
        flags: int = 0,
        copy: bool = True,
        encoding: str = "utf-8",
        *,
        timeout: Timeout = UNSET,
        **kwargs: Any,
    ) -> zmq.MessageTracker | None:
        """Send text as one frame; see `send` for the rest."""
        if not isinstance(u, str):
            raise TypeError("str objects only")
        return self._send_as("send_string", [u.encode(encoding)], flags, copy, timeout, kwargs)

    def send_json(self, obj: Any, flags: int = 0, *, timeout: Timeout = UNSET, **kwargs: Any) -> None:
        """Send an object as one frame of JSON; kwargs go to json.dumps. See `send` for the rest."""
        extra: dict[str, Any] = {key: kwargs.pop(key) for key in ("routing_id", "group") if key in kwargs}
        self._send_as("send_json", [jsonapi.dumps(obj, **kwargs)], flags, True, timeout, extra)

    def send_pyobj(
        self, obj: Any, flags: int = 0, protocol: int = pickle.DEFAULT_PROTOCOL, *, timeout: Timeout = UNSET, **kwargs: Any
    ) -> zmq.MessageTracker | None:
        """Send an object as one frame of pickle; see `send` for the rest."""
        return self._send_as("send_pyobj", [pickle.dumps(obj, protocol)], flags, kwargs.pop("copy", True), timeout, kwargs)

    def send_serialized(
        self,
        msg: Any,
        serialize: Callable[[Any], Sequence[Any]],
        flags: int = 0,
        copy: bool = True,
        *,
        timeout: Timeout = UNSET,
        **kwargs: Any,
    ) -> zmq.MessageTracker | None:
        """Send the frames that `serialize(msg)` returns as one message; see `send` for the rest."""
        return self._send_as("send_serialized", serialize(msg), flags, copy, timeout, kwargs)

    send_unicode = send_string

    # Inside.

    def _receive_as(self, op: str, flags: int, timeout: Timeout, decode: Callable[[bytes], Any]) -> Any:
        frame = self._receive(op, flags, True, False, timeout)
        return self._ended() if frame is EXPIRED else self._decoded(op, frame, decode)

    def _decoded(self, op: str, received: Any, decode: Callable[[Any], T]) -> T:
        try:
            return decode(received)
        except BaseException as error:  # also of a kill or a Timeout, if decoding waits
            if throw_away_in_parts(self._waits, self) and self._lockstep is not None:
                self._lockstep.on_received(self)
            error.add_note(f"{op}: the message was read whole and is gone; the socket can be used")
            raise

    def _send_as(
        self, op: str, frames: Sequence[Any], flags: int, copy: bool, timeout: Timeout, extra: dict[str, Any]
    ) -> zmq.MessageTracker | None:
        track = bool(extra.pop("track", False))
        result = self._transmit_all(op, frames, flags, copy, track, timeout, extra)
        return self._ended() if result is EXPIRED else result  # type: ignore[no-any-return]
