"""How does one operation on a socket wait, and what ends the wait?

Rules:

* Completion wins: a message that is there is delivered, at timeout 0 and after expiry too. One non-blocking try precedes
  every error that says that time ran out.
* A message is sent and received whole: nothing switches between its frames, also when they are sent or received one by one
  (while there is room, and by one greenlet at a time).
* An exception thrown into a wait (a deadline, a gevent.Timeout, a kill) leaves every message where it was, and a REQ able to
  send again.
* First come, first served: who waits already is served before a newcomer.

Who waits is kept in `_waits`, the state of REQ and REP in `_lockstep`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast

import zmq
from gevent import getcurrent
from zmq.backend import Socket as Backend

from ..deadlines import DeadlineSignal, check, to_seconds
from ..errors import OperationTimeout, PeerError
from ..transport.binding import Binding
from ..transport.inheritance import noted
from ..transport.inlet import AT_ONCE, INTERRUPTED
from ..transport.routing_ids import draw_ids
from ..transport.whole import BYTES, FLAGS, finish, has_gap, read_rest, reader
from ._in_parts import read_in_parts
from ._lockstep import Lockstep
from ._waits import POLLIN, POLLOUT, Waits, events_of

if TYPE_CHECKING:
    from .context import Context

__all__ = ["DEFAULT_LINGER", "EXPIRED", "UNSET", "Timeout", "WaitingSocket"]


log = logging.getLogger("greensafe.green._waiting")


class Unset(enum.Enum):
    """The type of `UNSET`: no timeout was given, so the socket's own default holds."""

    UNSET = "UNSET"


UNSET: Final = Unset.UNSET

#: Milliseconds that a closed socket's unsent messages are kept for a peer that does not come. libzmq's own default, for ever,
#: leaks the socket and hangs Context.term().
DEFAULT_LINGER = 30_000

#: The same for a REQ: a request that nobody waits for any more is worth less.
REQ_LINGER = 1_000

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_RCVMORE = int(zmq.RCVMORE)
_RCVTIMEO = int(zmq.RCVTIMEO)
_SNDTIMEO = int(zmq.SNDTIMEO)
_LINGER = int(zmq.LINGER)
_LAST_ENDPOINT = int(zmq.LAST_ENDPOINT)

#: Counts the frames that follow a message's first one, until it is long.
_FEW = (None,) * AT_ONCE

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., Any] = Backend.recv
_send: Callable[..., Any] = Backend.send
_sugar_send: Callable[..., Any] = zmq.Socket.send

#: What a cooperative attempt returns instead of a message when its own limit ran out.
EXPIRED: Final = object()

Timeout = float | None | Unset


class WaitingSocket(zmq.Socket[bytes]):
    """What every operation of a green socket is made of; see `socket.Socket`."""

    context: Context
    _waits: Waits
    _binding: Binding
    _lockstep: Lockstep | None
    _default_timeout: float | None
    _last_limit: tuple[str, float]
    _limits: dict[int, float | None]
    _lost: PeerError | None = None

    def __init__(
        self,
        ctx_or_socket: zmq.Context[Any] | zmq.Socket[Any] | None = None,
        socket_type: int = 0,
        default_timeout: Timeout = UNSET,
        *,
        shadow: zmq.Socket[Any] | int = 0,
        copy_threshold: int | None = None,
    ) -> None:
        base = shadow or ctx_or_socket
        shared = base if isinstance(base, WaitingSocket) else None
        self._waits = Waits() if shared is None else shared._waits  # or a call of the one would eat the other's edges
        self._binding = Binding() if shared is None else shared._binding
        self._limits = {}
        self._lockstep = None
        if default_timeout is UNSET:
            default_timeout = getattr(ctx_or_socket, "default_timeout", None)
        self._default_timeout = to_seconds(default_timeout)
        begin_anew = getattr(ctx_or_socket, "_own", None)
        if begin_anew is not None:
            begin_anew()  # a Context of ours that was made before a fork
        draw_ids(socket_type)
        with noted(ctx_or_socket):
            super().__init__(  # type: ignore[call-overload]
                ctx_or_socket, socket_type, shadow=shadow, copy_threshold=copy_threshold
            )
        if shared is not None:
            self._lockstep = shared._lockstep
        elif self.type in (zmq.REQ, zmq.REP):
            self._lockstep = Lockstep(self.type == zmq.REQ)
            self._waits.set_lockstep()
        if not self._shadow:
            Backend.set(self, _LINGER, REQ_LINGER if self.type == zmq.REQ else DEFAULT_LINGER)

    @property
    def default_timeout(self) -> float | None:
        """Seconds that send and recv wait unless timeout= says otherwise; None leaves it to RCVTIMEO and SNDTIMEO."""
        return self._default_timeout

    @default_timeout.setter
    def default_timeout(self, value: Any) -> None:
        self._default_timeout = to_seconds(value)

    def on_timeout(self) -> Any:
        """Decide what happens when timeout=, default_timeout, RCVTIMEO or SNDTIMEO runs out; called once per call.

        What it returns is what the interrupted call returns. The default raises OperationTimeout.
        """
        raise self._timed_out(*self._last_limit)

    def _timed_out(self, op: str, seconds: float) -> OperationTimeout:
        hosts = self._waits.hosts
        error = OperationTimeout(seconds, op, self._endpoint() or (hosts and hosts.endpoint))
        if hosts is not None and hosts.trouble:
            error.add_note(f"the socket is not connected: {hosts.trouble}")
        return error

    def on_disconnect(self, error: PeerError) -> Any:
        """Decide what happens when the request that a REQ waits for is lost; called once per call, as `on_timeout` is.

        What it returns is what the interrupted call returns. The socket can send again. The default raises `error`.
        """
        raise error

    def _ended(self) -> Any:
        """What a call returns, or raises, whose message did not come."""
        error, self._lost = self._lost, None
        return self.on_timeout() if error is None else self.on_disconnect(error)

    def _recheck(self) -> None:
        waits = self._waits
        if waits.queue:
            waits.recheck(self)

    def _endpoint(self) -> str | None:
        try:
            return cast(bytes, _get(self, _LAST_ENDPOINT)).rstrip(b"\0").decode() or None
        except (zmq.ZMQError, UnicodeDecodeError):
            return None

    def _receive(self, op: str, flags: int, copy: bool, track: bool, timeout: Timeout) -> Any:
        """One frame, or EXPIRED."""
        waits = self._waits
        left = waits.straight_in
        if left > 0 and not flags:
            waits.straight_in = left - 1
            try:
                return _recv(self, _NOBLOCK, copy, track)
            except zmq.Again:
                waits.look_first()
        if waits.held and (kept := self._take_kept(1)):
            frame = kept[0].bytes if copy else kept[0]
        else:
            frame = self._try_or_wait(op, POLLIN, partial(_recv, self, int(flags) | _NOBLOCK, copy, track), flags, timeout)
        if self._lockstep is not None and frame is not EXPIRED and not waits.kept:
            self._lockstep.on_received(self)
        return frame

    def _receive_all(self, op: str, flags: int, copy: bool, track: bool, timeout: Timeout) -> Any:
        """A list of frames, or EXPIRED. What was read of the message stays with the socket when something ends this."""
        waits = self._waits
        parts: list[Any] = []
        step = reader(self, parts, track)
        left = waits.straight_in
        try:
            if left > 0 and not flags:
                waits.straight_in = left - 1
                try:
                    next(step)
                except zmq.Again as error:
                    if parts or type(error) is not zmq.Again:
                        raise  # by a signal's handler
                    waits.look_first()
            elif waits.held:
                parts += self._take_kept()
            if not parts and self._try_or_wait(op, POLLIN, partial(next, step), flags, timeout) is EXPIRED:
                return EXPIRED
            # A Frame knows whether more follow, which costs a third of asking the socket.
            for _ in _FEW:
                if not parts[-1].more:
                    break
                # libzmq hands over whole messages: the rest is there, and nobody else may read it.
                next(step)
            else:
                read_in_parts(waits, parts, step)
            if self._lockstep is not None:
                self._lockstep.on_received(self)
            if waits.queue:
                waits.recheck(self)
            return list(map(BYTES, parts)) if copy else parts
        except BaseException as error:
            self._keep(parts, error)
            raise

    def _take_kept(self, count: int | None = None) -> list[Any]:
        """The first frames that are kept of a message, all by default; none while another greenlet reads it."""
        waits = self._waits
        if waits.reader is not None:
            return []
        kept, rest = waits.kept[:count], waits.kept[count:] if count is not None else []
        waits.hold(None, rest)
        return kept

    def _keep(self, parts: list[Any], error: BaseException) -> None:
        """Receiving a message has ended by an exception: what was read of it is for whoever receives next."""
        if has_gap(self, parts, error):
            log.warning("%r: a message was thrown away: %s", self, INTERRUPTED)
            while read_rest(self, AT_ONCE):
                pass
            if self._lockstep is not None:
                self._lockstep.on_received(self)
                self._lockstep.is_interrupted = True
                if not self._lockstep.is_req:
                    self._lockstep.reset_rep(self)
        elif parts and not self.closed:
            self._waits.hold(None, parts)

    def _transmit(
        self, op: str, data: Any, flags: int, copy: bool, track: bool, timeout: Timeout, extra: dict[str, Any] | None
    ) -> Any:
        """A MessageTracker or None, or EXPIRED."""
        waits = self._waits
        left = waits.straight_out
        if left > 0 and not flags and not extra:
            waits.straight_out = left - 1
            try:
                return _send(self, data, _NOBLOCK, copy, track)
            except zmq.Again:
                pass
        lockstep = self._lockstep
        if lockstep is not None:
            if waits.is_inherited:
                waits.check_owner()
            self._before_send(lockstep)
        nonblocking = int(flags) | _NOBLOCK
        attempt = partial(_sugar_send, self, data, nonblocking, copy, track, **(extra or {}))
        try:
            result = self._try_or_wait(op, POLLOUT, attempt, flags, timeout)
            if result is not EXPIRED:
                self._note_sent([data], bool(nonblocking & _SNDMORE))
        except BaseException as error:
            if lockstep is not None and not isinstance(error, zmq.ZMQError):
                lockstep.on_interrupted(self)
            raise
        return result

    def _before_send(self, lockstep: Lockstep) -> None:
        if self._waits.kept and lockstep.is_req:
            self._waits.hold(None, [])  # a reply that its receiver was not given: it is given up
            lockstep.is_interrupted = True
        lockstep.before_send(self)

    def _note_sent(self, frames: Sequence[Any], more: bool) -> None:
        """These frames have left by the long way; `more`: the message is not at its end."""
        waits = self._waits
        waits.note_sent(more)
        if self._lockstep is not None:
            self._lockstep.on_sent(self, more)
        if waits.keeps:
            for index, frame in enumerate(frames, 1):
                waits.hosts.on_sent(frame, more or index < len(frames))

    def _transmit_all(
        self, op: str, frames: Sequence[Any], flags: int, copy: bool, track: bool, timeout: Timeout, extra: dict[str, Any]
    ) -> Any:
        """As _transmit, for a whole message: only the first frame can have to wait, as libzmq counts messages."""
        frames = list(frames)
        if not frames:
            raise ValueError("a message has at least one frame; send [b''] for an empty one")
        for index, frame in enumerate(frames):
            if track or not isinstance(frame, bytes):
                _check_frame(index, frame, track)
        if not copy:
            frames = [_kept(frame, self.copy_threshold, track) for frame in frames]
        if len(frames) == 1:
            return self._transmit(op, frames[0], flags, copy, track, timeout, extra)
        flags = int(flags)
        more = bool(flags & _SNDMORE)
        each = FLAGS[len(frames) + 1][:-1] if more else FLAGS[len(frames)]
        send = partial(_sugar_send, **extra) if extra else _send
        waits, lockstep = self._waits, self._lockstep
        left: Any = None

        def attempt() -> Any:
            nonlocal left
            left = iter(frames)
            try:
                return deque(map(send, repeat(self), left, each, repeat(copy), repeat(track)), 1)[-1]
            except zmq.Again as error:
                if type(error) is zmq.Again:
                    left = None
                raise

        straight = waits.straight_out
        try:
            if straight > 0 and not flags and not extra:
                waits.straight_out = straight - 1
                with contextlib.suppress(zmq.Again):
                    return attempt()
            if lockstep is not None:
                if waits.is_inherited:
                    waits.check_owner()
                self._before_send(lockstep)
            result = self._try_or_wait(op, POLLOUT, attempt, flags, timeout)
            if result is EXPIRED:
                return result
            self._note_sent(frames, more)
        except BaseException as error:
            if left is not None and finish(self, frames, left, error, each):
                self._note_sent(frames, more)
            raise
        self._recheck()
        return result

    def _try_or_wait(self, op: str, mask: int, attempt: Callable[[], Any], flags: int, timeout: Timeout) -> Any:
        """Do `attempt` at once or, unless NOBLOCK was given, when the socket is ready; EXPIRED if the limit ran out first."""
        waits = self._waits
        if waits.queue or waits.is_inherited:
            waits.check_owner()
        if int(flags) & _NOBLOCK:
            return self._attempt(attempt, mask) if self._lockstep is None else self._attempt_or_lose(attempt, mask)
        is_spent = waits.is_spent(mask)
        is_free = not waits.queue or not waits.is_anyone_first(mask)
        if is_spent or not is_free:
            if self._is_inside(mask):
                is_free = True
            elif is_spent:
                waits.give_way()
                is_free = not waits.queue or not waits.is_anyone_first(mask)
        if is_free and (mask == POLLOUT or waits.queue or not waits.looks_first or waits.has_input(self)):
            try:
                return self._attempt(attempt, mask)
            except zmq.Again:
                pass
        return self._wait(op, mask, attempt, timeout)

    def _wait(self, op: str, mask: int, attempt: Callable[[], Any], timeout: Timeout) -> Any:
        """Do `attempt` when the socket is ready, which it is not now (or others are ahead); EXPIRED if the limit ran out first.

        A REQ or REP whose wait ends without its message is marked: whoever sends next starts afresh.
        """
        if self._lockstep is None:
            return self._wait_for(op, mask, attempt, timeout)
        done = False
        try:
            result = self._wait_for(op, mask, attempt, timeout)
            done = result is not EXPIRED
            self._lockstep.waited_at = monotonic()
        finally:
            if not done:
                self._lockstep.is_interrupted = True
        return result

    def _attempt_or_lose(self, attempt: Callable[[], Any], mask: int) -> Any:
        """One non-blocking try; EXPIRED if a REQ's request is lost, and nothing else came of it."""
        try:
            return self._attempt(attempt, mask)
        except zmq.Again:
            carrier = None if self._lockstep is None or mask != POLLIN else self._lockstep.carrier
            if carrier is None:
                raise
            carrier.drain()
            if not self._is_lost():
                raise
        return self._lose(attempt)

    def _is_lost(self) -> bool:
        lockstep = self._lockstep
        if lockstep is None or lockstep.carrier is None:
            return False
        return lockstep.is_reset or lockstep.carrier.look(self) is not None

    def _lose(self, attempt: Callable[[], Any]) -> Any:
        """A REQ's request is lost: unless its reply is there all the same, put the socket back; EXPIRED."""
        try:
            return self._attempt(attempt, POLLIN)
        except zmq.Again:
            lockstep = self._lockstep
            assert lockstep is not None
            self._lost = lockstep.take_loss(self)
            if self._lost is None:
                raise zmq.ZMQError(zmq.EFSM, "this REQ was reset: send a request before you receive") from None
            self._waits.announce(POLLIN)
            return EXPIRED

    def _has_no_address(self) -> bool:
        """Whether a REQ waits for names that have no address: it is told so, as when its request is lost."""
        hosts = self._waits.hosts
        if hosts is None or self._lockstep is None or not self._lockstep.is_req:
            return False
        self._lost = hosts.unreachable(self)
        return self._lost is not None

    def _is_inside(self, mask: int) -> bool:
        """Whether the next frame belongs to a message that was begun: nobody else may come in between."""
        return self._waits.is_half_sent if mask == POLLOUT else bool(_get(self, _RCVMORE))

    def _attempt(self, attempt: Callable[[], Any], mask: int) -> Any:
        """One non-blocking try; whoever else waits gets the edge back that it may have consumed.

        libzmq throttles its commands, so a send fails with EAGAIN now and then although there is room: reading EVENTS
        processes them, then the second try tells the truth.
        """
        waits = self._waits
        if waits.reader is not None and mask == POLLIN and waits.reader is not getcurrent():
            raise zmq.Again  # it is inside a message
        try:
            return attempt()
        except zmq.Again:
            if mask == POLLOUT and events_of(self) & mask:
                return attempt()
            raise
        finally:
            if waits.queue:
                waits.recheck(self)

    def _wait_for(self, op: str, mask: int, attempt: Callable[[], Any], timeout: Timeout) -> Any:
        """Sleep and try until it succeeds. The socket was found not ready, or others are ahead in the queue."""
        limit = self._limit(mask, timeout)
        at = None if limit is None else monotonic() + limit
        stubborn = False
        while True:
            if mask == POLLIN and self._is_lost():
                return self._lose(attempt)
            if at is not None and monotonic() >= at:
                return self._last_try(op, cast(float, limit), mask, attempt)
            if mask == POLLOUT and self._lockstep is not None and self._lockstep.before_send(self):
                with contextlib.suppress(zmq.Again):  # libzmq had given up connecting meanwhile
                    return self._attempt(attempt, mask)
            if mask == POLLOUT and self._has_no_address():
                return EXPIRED
            try:
                check(at is not None)
                self._waits.wait(self, mask, at, stubborn)
            except DeadlineSignal as signal:
                return self._last_try_before(signal, mask, attempt)
            try:
                return self._attempt(attempt, mask)
            except zmq.Again:
                stubborn = bool(events_of(self) & mask)

    def _limit(self, mask: int, timeout: Timeout) -> float | None:
        """Seconds of this call, by precedence: timeout=, default_timeout, the option."""
        if timeout is not UNSET:
            return to_seconds(timeout)
        if self._default_timeout is not None:
            return self._default_timeout
        if mask not in self._limits:
            milliseconds = _get(self, _RCVTIMEO if mask == POLLIN else _SNDTIMEO)
            self._limits[mask] = None if milliseconds < 0 else milliseconds / 1000
        return self._limits[mask]

    def _last_try(self, op: str, limit: float, mask: int, attempt: Callable[[], Any]) -> Any:
        try:
            return self._attempt(attempt, mask)
        except zmq.Again:
            self._last_limit = (op, limit)
            return EXPIRED

    def _last_try_before(self, signal: DeadlineSignal, mask: int, attempt: Callable[[], Any]) -> Any:
        try:
            result = self._attempt(attempt, mask)
            signal.put_back()
            return result
        except zmq.Again:
            raise signal from None
        finally:
            del signal  # its traceback holds this frame


def _kept(data: Any, threshold: int | None, track: bool) -> Any:
    """What is sent instead of a buffer so large that pyzmq does not copy it: a Frame, made before the first frame leaves.

    Making one hands the buffer to pyzmq's garbage collector. Where gevent.monkey has made that a greenlet it switches: asking
    whether a thread is alive does.
    """
    is_copied = isinstance(data, zmq.Frame) or (threshold and memoryview(data).nbytes < threshold)
    return data if is_copied else zmq.Frame(data, track=track, copy_threshold=threshold)


def _check_frame(index: int, frame: object, track: bool) -> None:
    """Find what libzmq would refuse, before the frames in front of it are on their way."""
    if isinstance(frame, bytes):
        return
    if isinstance(frame, zmq.Frame):
        if track and not frame.tracker:
            raise ValueError(f"frame {index} was made without track=True, so it cannot be tracked")
    else:
        try:
            view = memoryview(cast(Any, frame))
        except TypeError:
            shown = repr(frame)
            shown = shown if len(shown) <= 32 else shown[:32] + "..."
            raise TypeError(f"Frame {index} ({shown}) does not support the buffer interface.") from None
        if not view.contiguous:
            raise BufferError(f"frame {index} is a buffer with gaps: send bytes(...) of it")
