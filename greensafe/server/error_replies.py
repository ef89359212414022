"""What a client is told of an error, and what only the log and the hooks have.

| the error | told to the client | with `tell_errors=False` |
| --- | --- | --- |
| a RemoteError that the handler raises, `request.error`, what on_error returns: meant for the client | as it is | as it is |
| what greensafe itself says: the deadline, a stop, no answer, a body that is no JSON | as it is | as it is |
| a JournalError | that the journal failed; no path, no cause | the same |
| any other exception, also the error of a server that the handler has asked | its class's name and text | its class's name |

With `tell_errors=False` the last kind has the request's id in place of its text: the log has the rest under that id. A
traceback is told to nobody.

It does not know how an error is sent, nor what else a server does about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import gevent

from ..errors import JournalError, RemoteError
from ..sansio.envelope import CALLER_LIMIT, SERVER_STOPPED, Kind
from ..sansio.exchange import Exchange
from .options import OnError
from .reports import describe
from .request import Gate, InvalidBodyError, Request, as_frames

__all__ = ["Telling", "is_meant", "replaced", "withheld"]

#: What greensafe tells of these is its own words.
_OWN = (InvalidBodyError, JournalError, MemoryError, gevent.GreenletExit)


class Telling:
    """What one server tells its clients.

    Args:
        on_error: The program's: called with (request, error) before an error is sent; see `replaced` for what it returns. It
            may also answer by itself.
        tells_errors: Clients are told the text of what a handler lets out.
    """

    __slots__ = ("_asking", "_on_error", "_tells_errors")

    def __init__(self, on_error: OnError | None, tells_errors: bool) -> None:
        self._on_error = on_error
        self._tells_errors = tells_errors
        #: The requests that on_error is being asked about: it is not asked again about what it says itself by `request.error`.
        self._asking: set[int] = set()

    def __repr__(self) -> str:
        return f"<Telling on_error={self._on_error!r} tells_errors={self._tells_errors}>"

    def told(self, error: BaseException, known: RemoteError, exchange: Exchange) -> RemoteError:
        """What the client is told of an exception that a handler let out, of which `error_for` has made `known`."""
        return known if self._tells_errors else withheld(error, known, describe(exchange)[0])

    def chosen(self, gate: Gate, exchange: Exchange, error: RemoteError, kind: Kind) -> Sequence[bytes] | None:
        """The body that on_error puts in the place of the standard one; None for that one. Raises what on_error raises.

        For a plain client on_error is asked about each error. A greensafe client acts by itself on a request that was not run,
        on its own limit and on a server that stops; it has to be told these as they are.
        """
        if self._on_error is None or exchange.key in self._asking:
            return None
        is_plain = exchange.envelope.header is None
        if not is_plain and (kind is not Kind.ERROR or error.type in (CALLER_LIMIT, SERVER_STOPPED)):
            return None
        self._asking.add(exchange.key)
        try:
            return replaced(self._on_error(Request(gate, exchange, exchange.owner), error), is_plain)
        finally:
            self._asking.discard(exchange.key)


def is_meant(error: BaseException) -> bool:
    """Whether an exception that a handler let out is meant for the client: a RemoteError of its own, not another server's."""
    return isinstance(error, RemoteError) and not error._is_from_peer


def withheld(error: BaseException, told: RemoteError, request_id: str) -> RemoteError:
    """What a client is told in place of `told`, which is what `error_for` has made of `error`, with `tell_errors=False`."""
    if is_meant(error) or isinstance(error, _OWN):
        return told
    message = f"the request failed: the server's log says why, under the id {request_id}"
    return RemoteError(told.code, message, type(error).__name__)


def replaced(result: object, is_plain: bool) -> Sequence[bytes] | None:
    """The body that on_error has chosen by what it has returned; None for the standard one.

    Frames are for plain clients only: a greensafe client would take them for an answer, or for nonsense.
    """
    if result is None:
        return None
    if isinstance(result, RemoteError):
        return [result.to_reply()]
    try:
        frames = as_frames(result)
    except TypeError as error:
        raise TypeError(
            f"on_error returns a RemoteError, bytes, a list of bytes or None, not {type(result).__name__}"
        ) from error
    return frames if is_plain else None
