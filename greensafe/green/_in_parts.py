"""Read a green socket's long message in parts, so that other greenlets run meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import zmq

from ..hub.turns import TURN, let_others_run
from ..transport.inlet import AT_ONCE, THROWN_AT_ONCE
from ..transport.whole import read_rest
from ._waits import Waits

__all__ = ["read_in_parts", "throw_away_in_parts"]


def read_in_parts(waits: Waits, parts: list[zmq.Frame], step: Iterator[None]) -> None:
    """Read a green socket's message to its end, and let others run meanwhile; nobody else receives from the socket then."""
    waits.hold(gevent.getcurrent(), [])
    try:
        until = monotonic() + TURN
        while True:
            for _ in range(AT_ONCE):
                if not parts[-1].more:
                    return
                next(step)
            if monotonic() > until:
                let_others_run()
                until = monotonic() + TURN
    finally:
        waits.hold(None, [])


def throw_away_in_parts(waits: Waits, sock: zmq.Socket[Any]) -> bool:
    """Read on to the end of the message of which a frame was received, let others run meanwhile; whether there was more."""
    was_more = bool(waits.kept) or bool(sock.getsockopt(zmq.RCVMORE))
    waits.hold(gevent.getcurrent(), [])
    try:
        until = monotonic() + TURN
        while read_rest(sock, THROWN_AT_ONCE):
            if monotonic() > until:
                let_others_run()
                until = monotonic() + TURN
    finally:
        waits.hold(None, [])
    return was_more
