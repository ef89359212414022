"""What the tests of sockets share: a pair of them over each transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import greensafe as zmq

Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture(params=["tcp", "ipc", "inproc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An endpoint to bind to."""
    return {"tcp": "tcp://127.0.0.1:*", "ipc": f"ipc://{tmp_path}/s", "inproc": "inproc://s"}[request.param]


@pytest.fixture
def pair(context: zmq.Context, endpoint: str) -> Iterator[Pair]:
    """Makes a bound and a connected socket."""

    def make(bound: int, connected: int, **options: Any) -> tuple[Any, Any]:
        a, b = context.socket(bound, **options), context.socket(connected, **options)
        a.bind(endpoint)
        b.connect(a.last_endpoint.decode().rstrip("\0"))
        return a, b

    return make
