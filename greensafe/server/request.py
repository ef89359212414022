"""What does a handler see of a request, how does it answer, and what is a client told about an exception?

It does not know who watches over the request: answers go through a `Gate`, which opens once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import gevent
from gevent.hub import Hub
from gevent.monkey import get_original

from ..deadlines import HandlerScope
from ..errors import Cancelled, JournalError, RemoteError, RemoteProtocolError, Unstorable
from ..hub.threads import call_in
from ..journal.steps import InTransaction, check_name
from ..sansio.exchange import Exchange
from .reports import describe, named

__all__ = ["LATER", "Gate", "InvalidBodyError", "Request", "as_frames", "check_frames", "error_for"]

_this_thread: Callable[[], int] = get_original("_thread", "get_ident")


class Later:
    """The type of `LATER`."""

    def __repr__(self) -> str:
        return "greensafe.LATER"


#: What a handler returns when it, or somebody it handed the request to, will answer by `request.reply`.
LATER: Final = Later()


class InvalidBodyError(RemoteProtocolError, ValueError):
    """Raised when a request's body is not what the handler asked for; let out of the handler it answers INVALID_ARGUMENT."""


class Gate(Protocol):
    """Who sends answers, and sees to it that there is one.

    Attributes:
        hub, thread: Where everything happens, and the number of that thread.
    """

    hub: Hub
    thread: int

    def answer(self, exchange: Exchange, body: Sequence[bytes]) -> None:
        """Send the answer; LocalProtocolError if there was one."""

    def fail(self, exchange: Exchange, error: RemoteError) -> None:
        """Send an error as the answer; LocalProtocolError if there was one."""

    def step(self, exchange: Exchange, name: str, fn: Callable[..., Any] | InTransaction, args: tuple[Any, ...]) -> Any:
        """Run a step, or return what is stored of it."""


class Request:
    """One request, as its handler sees it.

    Attributes:
        frames: The body, a list of bytes; never empty.
        deadline: The scope in which the handler runs; it ends when the answer is overdue.
    """

    __slots__ = ("__weakref__", "_exchange", "_gate", "deadline", "frames")

    def __init__(self, gate: Gate, exchange: Exchange, scope: HandlerScope) -> None:
        self._gate = gate
        self._exchange = exchange
        body = exchange.envelope.body
        # The handler's to change. With a journal, what comes again is compared with what came.
        self.frames: list[bytes] = body if exchange.memory is None else list(body)
        self.deadline = scope

    @property
    def body(self) -> bytes:
        """The first frame of the body."""
        return self.frames[0]

    @property
    def id(self) -> str:
        """The client's id of this request in hex; for a plain client, which sends none, a number of this server's."""
        return describe(self._exchange)[0]

    @property
    def client(self) -> bytes:
        """The routing id of the connection that the request came by.

        A REP keeps that to itself. There it is the client's address, as far as libzmq tells it: the number by tcp
        (b"127.0.0.1"), the numbers of user, group and process by ipc (b"localhost:1000:1000:4711"), b"REP" by inproc.
        """
        return self._exchange.envelope.route[0]

    @property
    def attempt(self) -> int:
        """1; more when a journal has the request run again."""
        memory = self._exchange.memory
        return 1 if memory is None else int(memory.attempt)

    @property
    def metadata(self) -> bytes:
        """What the client's header carries beyond the protocol; b"" for a plain client."""
        return describe(self._exchange)[2]

    @property
    def replied(self) -> bool:
        """Whether the answer has been given, by the handler or for it."""
        return self._exchange.is_answered

    def json(self) -> Any:
        """Decode the body.

        Raises:
            InvalidBodyError: A ValueError; if the handler lets it out, the client is answered INVALID_ARGUMENT.
        """
        try:
            return json.loads(self.frames[0])
        except (ValueError, RecursionError) as error:
            raise InvalidBodyError(f"the request's body is not JSON: {error}") from error

    def reply(self, *frames: bytes) -> None:
        """Answer with these frames, now, from any greenlet.

        In another thread than the server's this waits until the server's hub has had a turn, and done it.

        Raises:
            LocalProtocolError: The request has been answered already, by the handler or by the watchdog; nothing is sent.
            TypeError: A frame is not bytes; nothing is sent, and the request can still be answered.
            RuntimeError: In another thread: the server's hub has had no turn (see `threads.call_in`); nothing is sent.
        """
        gate = self._gate
        if _this_thread() != gate.thread:
            call_in(gate.hub, "Request.reply", self.reply, *frames)
            return
        gate.answer(self._exchange, check_frames(frames))

    def reply_json(self, obj: object) -> None:
        """Answer with one frame of JSON. Errors as in `reply`, and what json.dumps raises."""
        self.reply(json.dumps(obj).encode())

    def error(self, code: str, message: str) -> None:
        """Answer with an error; `code` is one of `errors.CODES`. Errors as in `reply`."""
        error = RemoteError(code, message)
        if _this_thread() != self._gate.thread:
            call_in(self._gate.hub, "Request.error", self._gate.fail, self._exchange, error)
        else:
            self._gate.fail(self._exchange, error)

    def step(self, name: str, fn: Callable[..., Any] | InTransaction, *args: Any) -> Any:
        """Call `fn(*args)`, once for all runs of this request, and return its result.

        With a journal the result is stored before this returns. When the request is run again, what is stored is returned and
        `fn` is not called: the handler goes on at its first unfinished step. What is returned is the *decoded stored* result,
        in the first run too: by default bytes stay bytes, and anything else is what JSON makes of it (a tuple a list).

        A step is known by its name and by how often this run has used the name before: in a loop each turn is a step of its
        own. Where the order may change from run to run, put what tells them apart into the name.

        At least once: if the process dies after `fn` has done something and before that is stored, the next run calls it again.
        Only a step in the journal's own transaction (`greensafe.journal.in_transaction`) runs exactly once. A step that raises
        is not stored. Requests of plain clients, and servers without a journal, store nothing; nor is anything stored after the
        answer.

        Raises:
            TypeError, ValueError: The name is none that can be stored: `fn` was not called. Or the result cannot be encoded, or
                can never be stored (Unstorable): `fn` was called, nothing is stored, and what `in_transaction` did is undone.
                Let it out, and that is the answer, for good.
            JournalError: It could not be stored now; `fn` was called. Let it out, and the client is told UNAVAILABLE.
            RuntimeError: This is another thread than the server's; `fn` was not called.
        """
        if _this_thread() != self._gate.thread:
            raise RuntimeError(
                "Request.step was called in another thread than the server's: call it in the handler, and let its function"
                " do the work in a thread, by gevent.get_hub().threadpool.apply"
            )
        check_name(name)
        if not callable(fn) and not isinstance(fn, InTransaction):
            raise TypeError(f"a step is a function, not {type(fn).__name__}")
        return self._gate.step(self._exchange, name, fn, args)

    def __repr__(self) -> str:
        return named(self._exchange, len(self.frames))


def error_for(error: BaseException) -> RemoteError:
    """What a client is told about an exception that a handler let out. Never raises, whatever the exception is."""
    try:
        return _told(error)
    except BaseException:  # noqa: BLE001 - its __str__ or its class may fail in any way, and must not cost the client its answer
        return RemoteError("INTERNAL", "the handler failed with an exception that cannot be shown")


def _told(error: BaseException) -> RemoteError:
    kind = str(type(error).__name__)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, InvalidBodyError):
        return RemoteError("INVALID_ARGUMENT", str(error), "InvalidBodyError")
    if isinstance(error, gevent.GreenletExit):
        return RemoteError("ABORTED", "the handler was killed", kind)
    if isinstance(error, Cancelled):
        return RemoteError("CANCELLED", str(error), kind)
    if isinstance(error, Unstorable):
        # For good: no further run would end otherwise.
        return RemoteError("INTERNAL", "a step can never be stored in the server's journal, whose log says why", "Unstorable")
    if isinstance(error, JournalError):
        # Its text has the file's path and what is wrong with it: that is for the log. The request stays open, and runs again.
        return RemoteError("UNAVAILABLE", "the server's journal has failed: its log says why", "JournalError")
    if isinstance(error, MemoryError):
        return RemoteError("RESOURCE_EXHAUSTED", "the handler ran out of memory", kind)
    return RemoteError("INTERNAL", str(error), kind)


def as_frames(result: object) -> list[bytes]:
    """What a handler returned, as frames; TypeError names what it was."""
    if isinstance(result, (bytes, bytearray, memoryview)):
        return [bytes(result)]
    if isinstance(result, (list, tuple)):
        return check_frames(result)
    raise TypeError(
        f"a handler returns bytes, a list of bytes, None after request.reply(), or greensafe.LATER, not {type(result).__name__}"
    )


def check_frames(frames: Sequence[Any]) -> list[bytes]:
    """An answer's frames as bytes; TypeError names the one that cannot be sent."""
    if not frames:
        raise TypeError("an answer has at least one frame; b'' is an empty one")
    for index, frame in enumerate(frames):
        if not isinstance(frame, (bytes, bytearray, memoryview)):
            raise TypeError(f"frame {index} of the answer is {type(frame).__name__}, not bytes: encode it first")
    return [bytes(frame) for frame in frames]
