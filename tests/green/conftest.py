"""What the tests of sockets share: a pair of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import greensafe as zmq

Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(context: zmq.Context, endpoint: str) -> Iterator[Pair]:
    """Makes a bound and a connected socket."""

    def make(bound: int, connected: int, **options: Any) -> tuple[Any, Any]:
        a, b = context.socket(bound, **options), context.socket(connected, **options)
        a.bind(endpoint)
        b.connect(a.last_endpoint.decode().rstrip("\0"))
        return a, b

    return make
