"""The names of a request: for the records of hooks, for log lines and for its handler.

It does not know where they go, nor when.
"""

from __future__ import annotations

from time import monotonic

import gevent

from ..errors import RemoteError
from ..hooks import RequestAnswered, RequestFailed, RequestStarted
from ..sansio.envelope import Header
from ..sansio.exchange import Exchange
from ..stats import Zombie, where

__all__ = ["answered", "describe", "extra", "named", "shown", "started", "zombie"]


def describe(exchange: Exchange) -> tuple[str, bytes, bytes]:
    """The id, the client's routing id and the metadata of a request, as `Request` explains them."""
    envelope = exchange.envelope
    header = envelope.header
    if header is None:
        return str(exchange.key), envelope.route[0], b""
    return header.request_id.hex(), envelope.route[0], header.metadata if isinstance(header, Header) else b""


def named(exchange: Exchange, frames: int | None = None) -> str:
    """The text that stands for a request in log lines, which is the repr of its Request.

    Args:
        exchange: The request.
        frames: How many it has, if its handler may have changed them.
    """
    request_id, client, _ = describe(exchange)
    count = len(exchange.envelope.body) if frames is None else frames
    return f"<Request {request_id} from {shown(client)} {exchange.state.name.lower()} {count} frames>"


def shown(client: bytes) -> str:
    """Return a routing id for people: as text if all of it can be printed, else in hex."""
    try:
        text = client.decode("ascii")
    except UnicodeDecodeError:
        return client.hex()
    return text if text.isprintable() else client.hex()


def started(endpoint: str, exchange: Exchange) -> RequestStarted:
    """The record of a handler that is about to run."""
    attempt = 1 if exchange.memory is None else int(exchange.memory.attempt)
    return RequestStarted(endpoint, *describe(exchange), monotonic() - exchange.arrived_at, attempt)


def answered(endpoint: str, exchange: Exchange, error: RemoteError | None) -> RequestAnswered | RequestFailed:
    """The record of an answer, which is an error or not."""
    request_id, client, _ = describe(exchange)
    age = monotonic() - exchange.arrived_at
    if error is None:
        return RequestAnswered(endpoint, request_id, client, age)
    return RequestFailed(endpoint, request_id, client, age, error.code, error.type, error.message)


def zombie(exchange: Exchange, handler: object, greenlet: gevent.Greenlet, now: float) -> Zombie:
    """The record of a handler that has survived until `now`."""
    request_id, client, _ = describe(exchange)
    return Zombie(
        request_id=request_id,
        client=client,
        handler=getattr(handler, "__qualname__", None) or type(handler).__qualname__,
        greenlet=greenlet.name,
        where=where(greenlet.gr_frame),
        age_seconds=now - exchange.arrived_at,
        kills=exchange.kills,
    )


def extra(endpoint: str, exchange: Exchange) -> dict[str, str]:
    """What a log line about a request carries besides its text."""
    request_id, client, _ = describe(exchange)
    return {"endpoint": endpoint, "request_id": request_id, "client": shown(client)}
