"""The way by which answers leave a REP or ROUTER that the caller owns.

Rules:

* Nothing waits for a client: what a ROUTER's pipe has no room for is sent by a greenlet of its own, within `FULL_PEER` seconds.
  They and their greenlets have at most `OUTBOX` bytes for one client and `OUTBOXES` for all; one alone may be larger.
* The program may answer a REP's request by the socket's own send. Then that was the answer: nothing else is sent, and what the
  handler gives besides is a second answer.
* What is dropped is counted in the socket's `Tally`; an answer that is dropped is logged, with its request.

It does not know how requests are received; see `supervision`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import gevent
import zmq

from ..errors import RemoteError
from ..green.socket import Socket
from ..sansio.envelope import Kind
from ..sansio.exchange import Exchange
from ..sansio.weights import weight
from .log_lines import Lines
from .tally import Tally
from .watchdog import Watchdog

__all__ = ["FULL_PEER", "Sender", "SocketWatchdog", "has_sent"]

#: The name that docs/observation.md gives: a user looks for `supervise`.
log = logging.getLogger("greensafe.supervision")

#: Seconds that an answer waits for a ROUTER's client whose pipe is full before it is dropped.
FULL_PEER = 30.0

#: Bytes of answers that wait for one client and for all, and of the greenlet in which each waits.
OUTBOX = 16 * 2**20
OUTBOXES = 256 * 2**20
WAITING = 8000

#: Bytes that wait for a client beyond which it is not sent what is said again soon.
SPARE = 2**20


def has_sent(sock: Socket) -> bool:
    """Whether the program has answered a REP's pending request by the socket's own send."""
    lockstep = sock._lockstep
    return lockstep is not None and not lockstep.is_open and not lockstep.is_half_sent


class Sender:
    """What sends the answers of one watchdog by a socket: it does not wait, and calls `then` behind each.

    Attributes:
        answering: The request whose answer is sent; None for what is nobody's answer.
    """

    __slots__ = ("_lines", "_sock", "_tally", "_then", "answering")

    def __init__(self, sock: Socket, tally: Tally, lines: Lines, then: Callable[[], object] | None = None) -> None:
        self._sock = sock
        self._tally = tally
        self._lines = lines
        self._then = then
        self.answering: Exchange | None = None

    def __call__(self, frames: list[bytes]) -> None:
        if self._sock.closed:
            self._tally.unreachable += 1
            self._drop(logging.WARNING, "the socket was closed before it", self.answering)
        elif self._sock.type == zmq.REP:
            self._send_rep(frames[2:])
        else:
            self._send_router(frames, OUTBOX)
        if self._then is not None:
            self._then()

    def send_if_read(self, frames: list[bytes]) -> None:
        """Send, unless much waits for the client already: for what is said again soon. (To a REP's clients nothing is.)"""
        if not self._sock.closed:
            self._send_router(frames, SPARE)

    def has_sent(self) -> bool:
        """Whether the program has answered by itself; see the function."""
        return has_sent(self._sock)

    def _send_rep(self, body: list[bytes]) -> None:
        lockstep = self._sock._lockstep
        assert lockstep is not None
        if lockstep.is_half_sent:
            self._sock.reset()  # what went out cannot be taken back: the message is ended where it is
        elif lockstep.is_open:
            self._sock.send_multipart(body, zmq.NOBLOCK)

    def _send_router(self, frames: list[bytes], most: int) -> None:
        try:
            self._sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            size = WAITING + weight(frames)
            if self._tally.keep(frames[0], size, most, OUTBOXES):
                gevent.spawn(self._send_later, frames, self.answering).rawlink(lambda _: self._tally.release(frames[0], size))
            else:
                self._drop_unread("its client does not read", self.answering)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._tally.unreachable += 1
            self._drop(logging.INFO, "its client is gone", self.answering)

    def _send_later(self, frames: list[bytes], answering: Exchange | None) -> None:
        self._tally.unsent += 1
        try:
            self._sock.send_multipart(frames, timeout=FULL_PEER)
        except zmq.Again as error:
            self._drop_unread(str(error), answering)
        except zmq.ZMQError as error:
            self._tally.unreachable += 1
            self._drop(logging.WARNING, str(error), answering)
        finally:
            self._tally.unsent -= 1

    def _drop_unread(self, why: str, answering: Exchange | None) -> None:
        if answering is None:
            self._tally.unsaid += 1
        else:
            self._tally.unread += 1
            self._drop(logging.WARNING, why, answering)

    def _drop(self, level: int, why: str, answering: Exchange | None) -> None:
        """Log that an answer is dropped; what is nobody's answer is counted only."""
        if answering is not None:
            self._lines.say_of(log, level, answering, "answer to %s dropped: %s", why)


class SocketWatchdog(Watchdog):
    """The watchdog over a socket of the caller's, which may answer a REP's request by the socket's own send.

    Its `send` is a Sender.
    """

    _send: Sender

    def answer(
        self, exchange: Exchange, body: Sequence[bytes], kind: Kind = Kind.REPLY, error: RemoteError | None = None
    ) -> None:
        self._has_left(exchange)
        self._send.answering = exchange
        try:
            super().answer(exchange, body, kind, error)
        finally:
            self._send.answering = None

    def fail(self, exchange: Exchange, error: RemoteError, kind: Kind = Kind.ERROR, told: RemoteError | None = None) -> None:
        if not self._has_left(exchange):
            super().fail(exchange, error, kind, told)

    def _answer_overdue(self, exchange: Exchange, signal: BaseException | None = None) -> None:
        if not self._has_left(exchange):
            super()._answer_overdue(exchange, signal)

    def _has_left(self, exchange: Exchange) -> bool:
        """Open the gate for an answer that the program has sent by itself; whether that was so, and nobody had noticed yet."""
        if exchange.is_answered or not self._send.has_sent():
            return False
        self.note_answered(exchange)
        return True

    def _reply(self, exchange: Exchange, frames: Sequence[bytes]) -> None:
        if self._has_left(exchange):
            self._drop_second(exchange)
            return
        self._send.answering = exchange
        try:
            super()._reply(exchange, frames)
        finally:
            self._send.answering = None
