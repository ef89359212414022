"""The messages that leave by one socket: each at once, or as soon as its peer has room.

Rules:

* Sending never blocks. A message for a peer whose pipe is full waits in that peer's own queue, and only that peer's: `limit`
  bytes at most, and `OUTBOXES` for all peers. What is beyond is dropped and counted. Emptying a list of frames that was handed
  over takes the message back, if it has not left yet.
* Each send may have to wake libzmq's I/O thread (10 µs and more, most of a request's cost). Messages that are only gathered
  (`soon`) leave together later: one wake-up for all.
* A message leaves whole, whatever a signal's handler raises meanwhile (see `whole`).

It does not know what is in the messages, but that a ROUTER's first frame names the peer.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from zmq.backend import Socket as Backend

from ..hub.interruptions import is_interruption
from ..sansio.weights import MESSAGE, weight
from .whole import FLAGS, consume, finish

__all__ = ["ENDED", "OUTBOX", "Outbox"]

#: Bytes that a server keeps for one peer whose pipe is full, beyond its high-water mark: some 35,000 small messages.
OUTBOX = 16 * 2**20

#: The same for all peers of one socket together: so many may read slowly before what is for them is dropped.
OUTBOXES = 256 * 2**20

#: Bytes that wait for a peer beyond which it is not sent what is said again soon.
SPARE = 2**20

#: Messages that wait for a peer below which those that were taken back are not searched for.
SWEPT = 64

#: What libzmq says of a socket that cannot be used any more.
ENDED = frozenset({zmq.ETERM, zmq.ENOTSOCK})
_UNREACHABLE = ENDED | {zmq.EHOSTUNREACH}

_EVENTS = int(zmq.EVENTS)

_get: Callable[[Any, int], Any] = Backend.get
_send: Callable[..., Any] = Backend.send


def _ignore(*_: object) -> None:
    pass


class _Queue:
    """The messages that wait for one peer, each with its weight in bytes."""

    __slots__ = ("messages", "size", "swept")

    def __init__(self) -> None:
        self.messages: deque[tuple[list[bytes], int]] = deque()
        self.size = 0
        #: Messages that were left when it was swept last.
        self.swept = SWEPT

    def sweep(self) -> int:
        """Forget the messages that were taken back; return what they weighed. To be called when they may be half of it."""
        before = self.size
        self.messages = deque(entry for entry in self.messages if entry[0])
        self.size = sum(size for _, size in self.messages)
        self.swept = max(SWEPT, len(self.messages))
        return before - self.size


class Outbox:
    """The messages that are to leave by one socket.

    Args:
        sock: A plain ROUTER (with ROUTER_MANDATORY) or DEALER.
        limit: Bytes kept for a peer whose pipe is full; None for no limit.
        on_full: Called when a message has to wait for its peer. Nothing tells when there is room: `retry` is to be called then.
        on_failure: Called with the error when sending has failed by no fault of the message: it waits as if its peer were full.

    Attributes:
        peers: The queue of each peer that is full, by its routing id (a DEALER's: b""). It is the same dict all the time.
        soon: Messages that `send_gathered` sends, or the next `send`. It is the same deque all the time.
        sent_last: In this turn of the loop: what libzmq has taken. The owner sets it to None when a turn begins.
        kept_last: In this turn: what is kept for a peer that has no room, or was dropped. Likewise.
        size: What the messages weigh that wait for a peer, in bytes.
        dropped: Messages thrown away because their peer's queue was full.
        unsaid: Messages handed to `send_if_read` that were dropped.
        unreachable: Messages thrown away because their peer is gone (EHOSTUNREACH) or the socket is.
    """

    __slots__ = (
        "_is_router",
        "_limit",
        "_on_failure",
        "_on_full",
        "_sock",
        "_socks",
        "dropped",
        "kept_last",
        "peers",
        "sent_last",
        "size",
        "soon",
        "unreachable",
        "unsaid",
    )

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        limit: int | None,
        on_full: Callable[[], object],
        on_failure: Callable[[BaseException], object],
    ) -> None:
        self._sock = sock
        self._socks = itertools.repeat(sock)
        self._is_router = sock.type == zmq.ROUTER
        self._limit = limit
        self._on_full = on_full
        self._on_failure = on_failure
        self.peers: dict[bytes, _Queue] = {}
        self.soon: deque[list[bytes]] = deque()
        self.sent_last: list[bytes] | None = None
        self.kept_last: list[bytes] | None = None
        self.size = self.dropped = self.unsaid = self.unreachable = 0

    def __repr__(self) -> str:
        return f"<Outbox {len(self)} messages, {self.size} bytes for {len(self.peers)} peers>"

    def __len__(self) -> int:
        """Messages that have not been handed to libzmq, nearly always because their peer's pipe is full."""
        return len(self.soon) + sum(len(queue.messages) for queue in self.peers.values())

    def send(self, frames: list[bytes]) -> None:
        """Send now, or keep it for its peer."""
        key = frames[0] if self._is_router else b""
        waiting = self.peers.get(key) if self.peers else None
        if waiting is not None:
            self._keep(waiting, frames)
        elif not self._try_send(frames):
            self._on_full()
            self.peers[key] = waiting = _Queue()
            self._keep(waiting, frames)

    def send_gathered(self) -> None:
        """Send what is in `soon`."""
        soon = self.soon
        while soon:
            frames = soon[0]
            if frames and frames is not self.sent_last and frames is not self.kept_last:
                self.send(frames)
            del soon[0]  # no call, so nothing comes between the two

    def has_room(self, frames: list[bytes]) -> bool:
        """Return whether little waits for this message's peer; counts it as unsaid otherwise."""
        waiting = self.peers.get(frames[0] if self._is_router else b"") if self.peers else None
        if waiting is not None and waiting.size > SPARE:
            self.unsaid += 1
            return False
        return True

    def has_taken(self, frames: list[bytes]) -> bool:
        """Return whether this message, whose sending was interrupted in this turn, leaves all the same, or has left."""
        return frames is self.sent_last or frames is self.kept_last or any(frames is each for each in self.soon)

    def retry(self, count: int | None) -> None:
        """Send what was gathered, and try again to send what is kept for the first `count` peers; None for all."""
        self.send_gathered()
        peers = self.peers
        for key in list(itertools.islice(peers, count)):
            waiting = peers[key]
            del peers[key]  # neither this nor the next `del` is a call: nothing comes between them and what follows
            messages = waiting.messages
            try:
                while messages:
                    frames, size = messages[0]
                    if frames and frames is not self.sent_last and not self._try_send(frames):
                        break
                    del messages[0]
                    waiting.size -= size
                    self.size -= size
            finally:
                if messages:
                    peers[key] = waiting

    def unsent(self) -> list[list[bytes]]:
        """The messages that have not been handed to libzmq, as they were handed over."""
        return [*self.soon, *(frames for queue in self.peers.values() for frames, _ in queue.messages)]

    def close(self) -> None:
        """Forget all that waits, and whom to tell: this and its owner hold each other until then."""
        self.peers.clear()
        self.soon.clear()
        self._on_full = self._on_failure = _ignore

    def _try_send(self, frames: list[bytes]) -> bool:
        """Send it; return False if the peer has no room, or sending fails. Nothing switches in here, so it goes out whole."""
        left = iter(frames)
        try:
            try:
                consume(map(_send, self._socks, left, FLAGS[len(frames)]))
            except zmq.Again as error:
                if type(error) is not zmq.Again:
                    raise  # by a signal's handler
                # libzmq throttles its commands: reading EVENTS processes them, then the second try tells the truth.
                left = iter(frames)
                _get(self._sock, _EVENTS)
                consume(map(_send, self._socks, left, FLAGS[len(frames)]))
        except BaseException as error:
            if finish(self._sock, frames, left, error):
                self.sent_last = frames
                raise
            return self._not_sent(error)
        self.sent_last = frames
        return True

    def _not_sent(self, error: BaseException) -> bool:
        """Judge why nothing of a message has left; return whether it counts as done all the same."""
        if type(error) is zmq.Again:
            return False
        if not isinstance(error, zmq.ZMQError) or is_interruption(error):
            raise error
        if error.errno not in _UNREACHABLE:
            self._on_failure(error)
            return False
        self.unreachable += 1
        return True

    def _keep(self, waiting: _Queue, frames: list[bytes]) -> None:
        size = MESSAGE + weight(frames)
        limit = self._limit
        if limit is None or (self.size < OUTBOXES and (not waiting.messages or waiting.size + size <= limit)):
            if len(waiting.messages) >= 2 * waiting.swept:
                self.size -= waiting.sweep()
            waiting.messages += ((frames, size),)  # no call; see retry
            waiting.size += size
            self.size += size
        else:
            self.dropped += 1
        self.kept_last = frames
