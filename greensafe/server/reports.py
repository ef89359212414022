"""What is said of one request in records, and in log lines?

It does not know who is told, nor when.
"""

from __future__ import annotations

from time import monotonic

import gevent

from ..errors import RemoteError
from ..hooks import RequestAnswered, RequestFailed, RequestStarted
from ..stats import Zombie, where
from .options import Handler
from .request import Request, shown

__all__ = ["answered", "extra", "started", "zombie"]


def started(endpoint: str, request: Request) -> RequestStarted:
    """The record of a handler that is about to run."""
    return RequestStarted(endpoint, request.id, request.client, request.metadata, _age(request), request.attempt)


def answered(endpoint: str, request: Request, error: RemoteError | None) -> RequestAnswered | RequestFailed:
    """The record of an answer, which is an error or not."""
    if error is None:
        return RequestAnswered(endpoint, request.id, request.client, _age(request))
    return RequestFailed(endpoint, request.id, request.client, _age(request), error.code, error.type, error.message)


def zombie(request: Request, handler: Handler, greenlet: gevent.Greenlet, now: float) -> Zombie:
    """The record of a handler that has survived until `now`."""
    return Zombie(
        request_id=request.id,
        client=request.client,
        handler=getattr(handler, "__qualname__", None) or type(handler).__qualname__,
        greenlet=greenlet.name,
        where=where(greenlet.gr_frame),
        age_seconds=now - request._exchange.arrived_at,
        kills=request._exchange.kills,
    )


def extra(endpoint: str, request: Request) -> dict[str, str]:
    """What a log line about a request carries besides its text."""
    return {"endpoint": endpoint, "request_id": request.id, "client": shown(request.client)}


def _age(request: Request) -> float:
    return monotonic() - request._exchange.arrived_at
