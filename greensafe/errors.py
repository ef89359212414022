"""The errors that greensafe raises, each also a subclass of what existing code already catches.

    GreensafeError(Exception)
      TimedOut(TimeoutError, gevent.Timeout)
        OperationTimeout(zmq.Again)            a timeout= of one operation
        DeadlineExceeded                       a `with deadline` scope
      PeerError(zmq.ZMQError, ConnectionError)
        Unreachable, Disconnected, PeerSilent, Refused
      RemoteError                              the peer answered with an error
      Cancelled
      ProtocolError
        LocalProtocolError, RemoteProtocolError
      JournalError
        JournalUnavailable                     the journal's place cannot be written to, whatever is written
        Unstorable(ValueError)                 what was to be written can never be stored

Every one is also what code written for gevent, pyzmq or the standard library catches already; that is the only reason why
this module imports the two. errno is never EPIPE, ECONNRESET or ENOTCONN: WSGI servers take those for their own client's
disconnect. All can be pickled, copied and printed, and none starts a timer.
"""

from __future__ import annotations

import errno
import json
from typing import Any, ClassVar

import zmq.error
from gevent.timeout import Timeout

from .hub.printable import printable

__all__ = [
    "CODES",
    "Cancelled",
    "DeadlineExceeded",
    "Disconnected",
    "GreensafeError",
    "JournalError",
    "JournalUnavailable",
    "LocalProtocolError",
    "OperationTimeout",
    "PeerError",
    "PeerSilent",
    "ProtocolError",
    "Refused",
    "RemoteError",
    "RemoteProtocolError",
    "TimedOut",
    "Unreachable",
    "Unstorable",
]

#: The codes of a RemoteError: gRPC's canonical names (https://grpc.io/docs/guides/status-codes/), less OK.
CODES = frozenset(
    {
        "ABORTED",
        "ALREADY_EXISTS",
        "CANCELLED",
        "DATA_LOSS",
        "DEADLINE_EXCEEDED",
        "FAILED_PRECONDITION",
        "INTERNAL",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "OUT_OF_RANGE",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "UNAUTHENTICATED",
        "UNAVAILABLE",
        "UNIMPLEMENTED",
        "UNKNOWN",
    }
)


#: Characters of a peer's text that an error's str shows.
_LONG = 10_000


class GreensafeError(Exception):
    """The root of greensafe's errors."""


class TimedOut(GreensafeError, TimeoutError, Timeout):  # type: ignore[misc]  # gevent is untyped
    """Raised when a limit ran out; see its two subclasses.

    Attributes:
        seconds: The limit, or None if it was not known.
        op: The operation that was limited, such as "recv".
        endpoint: What the socket was bound or connected to last.
    """

    def __init__(self, seconds: float | None = None, op: str | None = None, endpoint: str | None = None) -> None:
        # Not Timeout.__init__, which would make a timer; its own attributes are set for code that catches it as a Timeout.
        GreensafeError.__init__(self, seconds, op, endpoint)
        self.seconds = seconds
        self.exception = None
        self.timer = None
        self.op = op
        self.endpoint = endpoint

    @property
    def pending(self) -> bool:
        """False: this is the report of a limit, not a running timer."""
        return False

    def start(self) -> None:
        """Refuse: see `pending`."""
        raise RuntimeError("this is the report of a limit that ran out; for a new limit use greensafe.deadline(seconds)")

    def cancel(self) -> None:
        """Do nothing: there is no timer."""

    def close(self) -> None:
        """Do nothing: there is no timer."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.seconds, self.op, self.endpoint)

    def __str__(self) -> str:
        subject = self.op or "the operation"
        where = f" on {self.endpoint}" if self.endpoint else ""
        limit = "" if self.seconds is None else f" within {self.seconds:g} s"
        return f"{subject}{where} did not finish{limit}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seconds={self.seconds!r}, op={self.op!r}, endpoint={self.endpoint!r})"


class OperationTimeout(TimedOut, zmq.error.Again):  # type: ignore[misc]  # both bases have a strerror
    """Raised when the limit of one operation ran out: timeout=, default_timeout, RCVTIMEO or SNDTIMEO."""

    def __init__(self, seconds: float | None = None, op: str | None = None, endpoint: str | None = None) -> None:
        super().__init__(seconds, op, endpoint)
        self.errno = errno.EAGAIN
        self.strerror = str(self)


class DeadlineExceeded(TimedOut):
    """Raised by a `with deadline` block whose time ran out before the block was finished."""

    def __str__(self) -> str:
        return "the deadline has passed" if self.seconds is None else f"the block did not finish within {self.seconds:g} s"


class PeerError(GreensafeError, zmq.error.ZMQError, ConnectionError):  # type: ignore[misc]  # as above
    """Raised when something happened to the peer; see the subclasses.

    Attributes:
        endpoint: The peer's endpoint, if known.
        maybe_executed: False only if the request provably was not delivered.
        request_id: The request's id in hex, if it had one.
    """

    _errno = errno.EHOSTUNREACH

    def __init__(
        self, message: str, *, endpoint: str | None = None, maybe_executed: bool = True, request_id: str | None = None
    ) -> None:
        GreensafeError.__init__(self, message)
        self.message = message
        self.endpoint = endpoint
        self.maybe_executed = maybe_executed
        self.request_id = request_id
        self.errno = self._errno
        self.strerror = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_peer_error, (type(self), self.message, self._details())

    def _details(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "maybe_executed": self.maybe_executed, "request_id": self.request_id}

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        details = ", ".join(f"{name}={value!r}" for name, value in self._details().items())
        return f"{type(self).__name__}({self.message!r}, {details})"


def _rebuild_peer_error(kind: type[PeerError], message: str, details: dict[str, Any]) -> PeerError:
    return kind(message, **details)


class Unreachable(PeerError):
    """Raised when nobody is there: nothing was delivered."""

    def __init__(
        self, message: str, *, endpoint: str | None = None, maybe_executed: bool = False, request_id: str | None = None
    ) -> None:
        super().__init__(message, endpoint=endpoint, maybe_executed=maybe_executed, request_id=request_id)


class Disconnected(PeerError):
    """Raised when the connection that carried the request is gone."""


class PeerSilent(PeerError):
    """Raised when a peer gives no more signs of life although its connection stands.

    Attributes:
        silent: What is silent: "link" (nothing comes through), "process" (its machine, or something in between, takes what is
            sent, and it does not answer) or "hub" (its process answers, its event loop does not turn, or it is gone behind a
            proxy); None if that cannot be told.
    """

    _errno = errno.ETIMEDOUT

    def __init__(
        self,
        message: str,
        *,
        endpoint: str | None = None,
        maybe_executed: bool = True,
        request_id: str | None = None,
        silent: str | None = None,
    ) -> None:
        super().__init__(message, endpoint=endpoint, maybe_executed=maybe_executed, request_id=request_id)
        self.silent = silent

    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "silent": self.silent}


class Refused(PeerError):
    """Raised when the peer refuses this client (authentication, socket type, not ZeroMQ): trying again cannot help."""

    _errno = errno.ECONNREFUSED


class RemoteError(GreensafeError):
    """Raised when the peer answered with an error; raised in a handler it is the answer.

    Its str is one line for logs and terminals: message and type, which the peer has chosen, are escaped in it, and cut off.

    Attributes:
        code: One of `CODES`.
        message: What went wrong, for people; as the peer has sent it.
        type: What kind of error it was there, usually an exception's name; "" if not told.
        traceback: The peer's traceback as text, if it tells it.
        maybe_executed: False only if the server has said that it did not run the request, and no earlier try of it was lost.
    """

    #: How the frame of every error begins. No program writes that by accident, so it tells an error from data.
    FRAME_HEAD: ClassVar[bytes] = b'{"greensafe": 1, "error": {"code": "'

    #: The most bytes of such a frame.
    MAX_FRAME: ClassVar[int] = 65_536

    maybe_executed = True

    def __init__(self, code: str, message: str, type: str = "", traceback: str | None = None) -> None:
        if code not in CODES:
            raise ValueError(f"{code!r} is none of the error codes: {', '.join(sorted(CODES))}")
        if not isinstance(message, str):
            raise TypeError(f"message is a str, not {message!r}")
        if not isinstance(type, str):
            raise TypeError(f"type is a str, not {type!r}")
        super().__init__(code, message, type, traceback)
        self.code = code
        self.message = message
        self.type = type
        self.traceback = traceback
        self._is_from_peer = False

    def __str__(self) -> str:
        return f"{self.code}: {printable(self.message, _LONG)}" + (f" ({printable(self.type)})" if self.type else "")

    def to_reply(self) -> bytes:
        """Return the frame that carries this error, in JSON; see "Errors" in docs/protocol.md.

        It has at most `MAX_FRAME` bytes: of a longer text the beginning is kept, and how much is left out is said.
        """
        frame = _frame(self.code, self.type, self.message)
        if len(frame) <= self.MAX_FRAME:
            return frame
        left_out = max(len(self.message) - _KEPT_MESSAGE, 0)
        note = f" ... ({left_out} more characters)" if left_out else ""
        return _frame(self.code, self.type[:_KEPT_TYPE], self.message[:_KEPT_MESSAGE] + note)

    @classmethod
    def from_reply(cls, body: bytes, *, is_error: bool = False) -> RemoteError | None:
        """Return the error in a reply of one frame, or None if the reply is data; never raises, whatever the bytes are.

        Args:
            body: The frame.
            is_error: The reply's header says that it is an error: then `{"error": ...}` needs no mark, and may hold more.
        """
        try:
            if is_error:
                error = json.loads(body)["error"]
                return cls._told_by_peer(error["code"], str(error["message"]), str(error.get("type", "")))
            if body.startswith(cls.FRAME_HEAD) and len(body) <= cls.MAX_FRAME:
                # Pairs instead of dicts: they show what stands there twice, or besides. The head is that of two objects.
                match json.loads(body.decode(), object_pairs_hook=list):
                    case [_, ("error", [("code", str(code)), ("type", str(name)), ("message", str(message))])]:
                        return cls._told_by_peer(code, message, name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return None

    @classmethod
    def _told_by_peer(cls, code: str, message: str, type: str) -> RemoteError:
        error = cls(code, message, type)
        error._is_from_peer = True
        return error


#: Characters that are kept of a text which is too long for a frame: JSON makes twelve bytes of one at most.
_KEPT_MESSAGE, _KEPT_TYPE = 5000, 200


def _frame(code: str, name: str, message: str) -> bytes:
    return json.dumps({"greensafe": 1, "error": {"code": code, "type": name, "message": message}}).encode()


class Cancelled(GreensafeError):
    """Raised when somebody ended what was waited for: `deadline.cancel(cause)`, or `Client.close()`.

    Attributes:
        cause: What they gave as the reason.
    """

    def __init__(self, cause: object = None) -> None:
        super().__init__(cause)
        self.cause = cause

    def __str__(self) -> str:
        return "cancelled" if self.cause is None else f"cancelled: {self.cause}"


class ProtocolError(GreensafeError):
    """Raised when somebody does not keep to the protocol; see the subclasses."""


class LocalProtocolError(ProtocolError):
    """Raised when this program does what the state of an exchange does not allow, such as answering twice."""


class RemoteProtocolError(ProtocolError):
    """Raised when the peer sent what the protocol does not allow."""


class JournalError(GreensafeError):
    """Raised when a journal cannot be read or written."""


class JournalUnavailable(JournalError):
    """Raised when a journal cannot be written to, whatever is written: its file is locked, or its disk is full."""


class Unstorable(JournalError, ValueError):
    """Raised when a journal can never store a value, however often it is tried: it is too large, or text that is none."""
