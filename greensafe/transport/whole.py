"""Messages that stay whole, whatever is raised between their frames.

Python runs no signal's handler while code of C runs that calls no Python. So what must not be interrupted is one call of C:

* A message is sent by one call that goes through its frames. If pyzmq raises what a handler has raised in it, the iterator of
  the frames and the traceback tell how many have left, and the others follow before the exception goes on.
* A frame is received and appended to a list by one call. What has been read of a message stays in that list.
* What pyzmq has received when a handler raises in its call is lost, since pyzmq drops it. Then the message has a gap: what is
  left of it is read and thrown away.

It does not know who sends, nor what the frames mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, repeat, takewhile
from operator import attrgetter, length_hint
from typing import Any

import zmq
from zmq.backend import Socket as Backend

from ..hub.interruptions import has_called, is_of_zmq

__all__ = ["BYTES", "FLAGS", "NOBLOCKS", "consume", "finish", "has_gap", "read_rest", "reader"]

_EVENTS = int(zmq.EVENTS)
_NOBLOCK = int(zmq.NOBLOCK)
_POLLOUT = int(zmq.POLLOUT)
_RCVMORE = int(zmq.RCVMORE)
_SNDMORE = int(zmq.SNDMORE)
_MORE = _NOBLOCK | _SNDMORE

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., Any] = Backend.recv
_send: Callable[..., Any] = Backend.send

#: The bytes of a Frame.
BYTES = attrgetter("bytes")

_HAS_MORE = attrgetter("more")

NOBLOCKS = repeat(_NOBLOCK)
_FALSES = repeat(False)

#: Go through an iterator in one call of C.
consume: Callable[[Iterator[Any]], object] = partial(deque, maxlen=0)


class _Flags(dict[int, tuple[int, ...]]):
    """The flags with which a message's frames are sent, by their number."""

    def __missing__(self, count: int) -> tuple[int, ...]:
        return (_MORE,) * (count - 1) + (_NOBLOCK,)


FLAGS = _Flags({count: _Flags()[count] for count in range(1, 17)})


def reader(sock: Any, parts: list[Any], track: bool = False) -> Iterator[None]:
    """Receive one more frame by each `next`, as a Frame, and append it to `parts`; raises what recv raises, and goes on."""
    return map(parts.append, map(_recv, repeat(sock), NOBLOCKS, _FALSES, repeat(track) if track else _FALSES))


def finish(sock: Any, frames: list[Any], left: Iterator[Any], error: BaseException, flags: tuple[int, ...] = ()) -> bool:
    """Finish a message whose sending has raised.

    Args:
        sock: The socket.
        frames: The message.
        left: The iterator of `frames` that `consume(map(_send, …, left, …))` has gone through.
        error: What it raised.
        flags: Those of the frames, if they are not `FLAGS`.

    Returns:
        Whether the message is on its way, all of it. False if nothing of it is.
    """
    count = len(frames)
    flags = flags or FLAGS[count]
    begun = count - length_hint(left)
    if begun == 0 or is_of_zmq(error):
        return False
    called = has_called(error)
    if called is None:
        return begun == count  # nothing can raise between two frames: it was behind the last one
    sent = begun if called else begun - 1
    if not sent:
        return False
    if sent == 1 and not _get(sock, _EVENTS) & _POLLOUT:
        return False  # it was full: libzmq always takes what follows a first frame
    while sent < count:
        left = iter(frames[sent:])
        try:
            consume(map(_send, repeat(sock), left, flags[sent:]))
            return True
        except zmq.ZMQError as refused:
            if is_of_zmq(refused):
                if sent > 1 or refused.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                return False  # a ROUTER took the second frame for a first one
            sent = _sent_of(refused, sent, count, left)
        except BaseException as again:  # noqa: BLE001 - one more signal; the first one's exception goes on
            sent = _sent_of(again, sent, count, left)
    return True


def _sent_of(error: BaseException, before: int, count: int, left: Iterator[Any]) -> int:
    begun = count - length_hint(left)
    return begun - 1 if has_called(error) is False and begun > before else begun


def has_gap(sock: Any, parts: list[Any], error: BaseException) -> bool:
    """Return whether pyzmq has lost a frame of the message being read into `parts`, as `error` came from `reader`'s next."""
    if is_of_zmq(error) or not has_called(error):
        return False
    # Within a message the next frame is always there. Before one there may have been nothing, or a message of one frame.
    return bool(parts and parts[-1].more) or bool(_get(sock, _RCVMORE))


def read_rest(sock: Any, at_most: int) -> bool:
    """Read on in a message up to its end, or so many frames, and throw them away; whether there are more.

    A frame takes 0.4 µs by one call for all. Nothing else can be read from the socket meanwhile, so that counts.
    """
    if _get(sock, _RCVMORE):
        consume(islice(takewhile(_HAS_MORE, map(_recv, repeat(sock), NOBLOCKS, _FALSES)), at_most))
    return bool(_get(sock, _RCVMORE))
