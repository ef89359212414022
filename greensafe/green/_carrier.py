"""How does a REQ learn that its request is lost?

From the monitor of its tcp and ipc connections, read by `_connections`, or over inproc, which has no events, from POLLOUT. What
is found is kept as `error` and announced to who waits; the socket looks at it after its own last try, so a reply wins.

Rules:

* The monitor is attached before the first connect to tcp or ipc. Where that fails (too many sockets or descriptors) the socket
  works without: its peer's death then shows by the caller's limit only. It is counted, and logged once.
* A REQ that has bound, or is connected over inproc and something else, is not told: nobody knows who carries the request.
* With ZMTP heartbeats a lost connection may mean a silent peer, and libzmq does not say. If the connection lasted long enough
  for that, the socket connects again at once and looks who answers. Nobody listens, or somebody finishes the handshake: the
  peer was gone (Disconnected). It accepts and says nothing: its process is frozen; nothing comes back: the link is cut
  (PeerSilent).

It does not know how an operation waits.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..errors import Disconnected, PeerError, PeerSilent, Refused, Unreachable
from ..transport.endpoints import not_begun
from ..transport.monitor import ConnectionEvent, Monitor
from ._connections import Connections, Loss
from ._waits import POLLIN, POLLOUT, events_of

if TYPE_CHECKING:
    from ._lockstep import Lockstep
    from ._monitors import MonitoredSocket

__all__ = ["SETTLE", "Carrier"]

log = logging.getLogger("greensafe.green._carrier")

#: Seconds after which no event follows a DISCONNECTED any more: libzmq has ended the session instead of retrying.
SETTLE = 0.02

#: Seconds, at least and at most, in which a peer that may be silent has to finish a new handshake.
PROBE_MIN, PROBE_MAX = 0.05, 1.0

_EVENTS = int(zmq.EVENTS)
_IPV6 = int(zmq.IPV6)
_HEARTBEAT_IVL = int(zmq.HEARTBEAT_IVL)
_HEARTBEAT_TIMEOUT = int(zmq.HEARTBEAT_TIMEOUT)
_REQ_RELAXED = int(zmq.REQ_RELAXED)

_CONNECTED = zmq.Event.CONNECTED
_STOPPED = zmq.Event.MONITOR_STOPPED

#: What a peer that is gone, or back, answers a new connection with.
_ANSWERS = frozenset(
    {
        zmq.Event.CLOSED,
        zmq.Event.CONNECT_RETRIED,
        zmq.Event.HANDSHAKE_SUCCEEDED,
        zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
        zmq.Event.HANDSHAKE_FAILED_AUTH,
        zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
        zmq.Event.DISCONNECTED,
    }
)

Sock = zmq.Socket[Any]

_get: Callable[[Any, int], Any] = Backend.get
_set: Callable[[Any, int, Any], None] = Backend.set


class Carrier:
    """What one REQ knows of its peers.

    Attributes:
        error: The request that is open is lost, and this is why. A reply may still be there to read.
        is_off: Nothing is told: see the module's head.
        unmonitored: Sockets of this process that had to do without.
    """

    __slots__ = (
        "__weakref__", "_connections", "_inproc", "_is_open", "_lockstep", "_monitor", "_probe", "_silence", "_sock", "_timer",
        "_timer_at", "_timer_seconds", "error", "is_off",
    )  # fmt: skip

    unmonitored = 0

    def __init__(self, sock: MonitoredSocket, lockstep: Lockstep) -> None:
        self._lockstep = weakref.proxy(lockstep)
        self._sock = weakref.ref(sock)
        self._connections = Connections(in_order=sock.context.get(zmq.IO_THREADS) == 1)
        self._monitor: Monitor | None = None
        self._inproc = 0
        self._is_open = False
        self._silence: float | None = None
        self._probe: tuple[Loss, bool] | None = None
        self._timer: Any = None
        self._timer_at = self._timer_seconds = 0.0
        self.error: PeerError | None = None
        self.is_off = False

    def __repr__(self) -> str:
        return f"<Carrier {self._connections!r}, {self._inproc} inproc, {self.error!r}>"

    # What the socket does.

    def before_connect(self, sock: MonitoredSocket, address: str) -> None:
        """Attach the monitor if it is time to."""
        if not address.startswith("inproc:") and self._monitor is None:
            try:
                sharing = sock._share_monitor()
            except zmq.ZMQError as error:
                self._do_without(error)
                return
            sharing.add(self)
            self._monitor = sock._waits.monitor = sharing.monitor

    def on_endpoints(self, sock: Sock, addresses: list[str], gone: str | None = None) -> None:
        """The socket is connected to these addresses now; `gone`: the program has disconnected it from this one."""
        self._inproc = sum(address.startswith("inproc:") for address in addresses)
        self._connections.total = len(addresses) - self._inproc
        self._silence = _silence_of(sock)
        if gone is not None:
            self._connections.forget(gone)

    def on_request(self) -> None:
        """A request was sent whole."""
        self._is_open = True
        self.error = None
        if self._probe is not None:
            self._end_probe()
        self._connections.on_request()

    def on_reply(self) -> None:
        """A reply was read whole."""
        self._is_open = False
        self.error = None
        if self._probe is not None:
            self._end_probe()
        self._connections.on_reply()

    def on_reset(self) -> None:
        """The request is given up, and every endpoint is about to be connected anew."""
        self._is_open = False
        self.error = None
        self._end_probe()
        self._connections.on_reset()

    # What became of the request.

    def look(self, sock: Sock) -> PeerError | None:
        """Why the request that is open is lost, as far as the hub was told; None if it is not."""
        if self._inproc and self._is_open and self.error is None and not self._connections.total and not self.is_off:
            self._look_at_inproc(sock)
        return self.error

    def drain(self) -> None:
        """Take in what has happened up to now.

        That includes the timer's time: a loop of NOBLOCK calls leaves the hub no turn in which it would call the timer.
        """
        if self._monitor is not None:
            self._monitor.drain()
        timer = self._timer
        if timer is not None and monotonic() >= self._timer_at and timer.loop is gevent.get_hub().loop:
            self._timer_seconds = 0.0  # late or not: nobody may look again soon
            self.on_timer(timer)

    @property
    def is_stopped(self) -> bool:
        """Whether the socket has to be connected anew before anybody can be there."""
        return not self.is_off and self._connections.is_stopped

    def _look_at_inproc(self, sock: Sock) -> None:
        # A REQ that waits for its reply hides POLLOUT, unless REQ_RELAXED is set: set it for the look, during which nothing is
        # sent. There is room for the one request that a pipe carries, so no POLLOUT means no pipe.
        try:
            _set(sock, _REQ_RELAXED, 1)
            try:
                has_peer = _get(sock, _EVENTS) & POLLOUT
            finally:
                _set(sock, _REQ_RELAXED, int(self._lockstep.relaxed))
        except zmq.ZMQError:
            return  # closed or terminated: the operation itself meets that
        if not has_peer:
            self._fail(Disconnected("the peer closed its socket before it replied", endpoint=_endpoint(sock)))

    def on_event(self, event: ConnectionEvent) -> None:
        """Take an event of the monitor; in the hub, or in the caller of `look`."""
        if event.kind == _STOPPED:
            self._go_off()
        elif not self.is_off:
            if self._probe is not None:
                self._on_answer(event)
            self._connections.on_event(event, monotonic())
            self._react()

    def _react(self) -> None:
        if self._connections.loss is not None and self.error is None and self._probe is None:
            self._on_loss(self._connections.loss)
        if self._connections.is_stopped:
            self._announce(POLLIN | POLLOUT)  # who waits to send has to connect anew
        if self._connections.is_unsettled and self._timer is None:
            self._start_timer(SETTLE)

    @property
    def is_busy(self) -> bool:
        """Whether somebody may have the request, or what became of it is being found out: the socket has to stay as it is."""
        return (
            self._probe is not None or self._connections.is_unsettled or (self.error is None and self._connections.is_carried)
        )

    def lose(self, error: PeerError) -> None:
        """The request that is open is lost, for a reason that no event tells."""
        self._is_open = True
        self._fail(error)

    def _on_loss(self, loss: Loss) -> None:
        if not loss.has_begun:
            sock = self._sock()
            what = not_begun(loss.endpoint, sock is not None and bool(_get(sock, _IPV6)))
            self._fail(Unreachable(f"{loss.endpoint}: {what}", endpoint=loss.endpoint or None))
        elif not loss.was_delivered:
            self._fail(
                Refused(
                    f"{loss.endpoint or 'the peer'} refused the connection: authentication, or not a REP or ROUTER",
                    endpoint=loss.endpoint or None,
                    maybe_executed=False,
                )
            )
        elif self._silence is None or loss.age < self._silence or not self._begin_probe(loss):
            self._fail(_disconnected(loss))

    def _fail(self, error: PeerError) -> None:
        self.error = error
        self._announce(POLLIN)

    def _announce(self, mask: int) -> None:
        sock = self._sock()
        if sock is not None:
            sock._waits.announce(mask)

    # Silent, or gone?

    def _begin_probe(self, loss: Loss) -> bool:
        sock = self._sock()
        if sock is None or events_of(sock) & POLLIN:
            return False  # a reply seems to be there: whoever reads decides
        assert self._silence is not None
        self._lockstep.reset_req(sock)
        self._lockstep.is_open = self._is_open = True
        self._probe = (loss, False)
        self._start_timer(min(max(self._silence / 4, PROBE_MIN), PROBE_MAX))
        return True

    def _on_answer(self, event: ConnectionEvent) -> None:
        assert self._probe is not None
        loss = self._probe[0]
        if event.kind == _CONNECTED:
            self._probe = (loss, True)
        elif event.kind in _ANSWERS:
            self._end_probe()
            self._fail(_disconnected(loss))

    def _end_probe(self) -> None:
        self._probe = None
        if self._timer is not None and not self._connections.is_unsettled:
            self._stop_timer()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        hub = gevent.get_hub()
        self._timer_seconds = seconds
        self._timer_at = monotonic() + seconds
        self._timer = hub.loop.timer(seconds, ref=False)
        self._timer.start(_on_timer, weakref.ref(self), self._timer, update=True)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.loop is gevent.get_hub().loop:
            timer.stop()
            timer.close()

    def on_timer(self, timer: Any) -> None:
        """No answer came, or no event."""
        is_mine = timer is self._timer
        timer.stop()
        timer.close()
        if not is_mine:
            return  # the socket has moved to another thread meanwhile
        self._timer = None
        seconds = self._timer_seconds
        if monotonic() - self._timer_at > seconds > 0:  # this process was stopped, or blocked: once more, not again and again
            self._start_timer(seconds)
            self._timer_seconds = 0.0
            return
        if self._monitor is not None:
            self._monitor.drain()  # a hub that was blocked finds the timer first
        if self._probe is not None:
            (loss, is_connected), self._probe = self._probe, None
            self._fail(_silent(loss, is_connected))
        elif self._connections.is_unsettled:
            self._connections.settle()
        self._react()

    # Without a monitor.

    def _do_without(self, error: zmq.ZMQError) -> None:
        self.is_off = True
        if error.errno == errno.EBUSY:
            return  # the program has its own
        Carrier.unmonitored += 1
        if Carrier.unmonitored == 1:
            log.warning("a REQ socket will not learn of disconnects: its monitor failed: %s (said once)", error)

    def _go_off(self) -> None:
        self.is_off = True
        self._monitor = None
        self._end_probe()
        self._stop_timer()

    def switch_off(self) -> None:
        """The socket has bound."""
        self._go_off()


def _on_timer(carrier: weakref.ref[Carrier], timer: Any) -> None:
    found = carrier()
    if found is None:
        timer.stop()
        timer.close()
    else:
        found.on_timer(timer)


def _endpoint(sock: Sock) -> str | None:
    endpoint: bytes = _get(sock, int(zmq.LAST_ENDPOINT))
    return endpoint.rstrip(b"\0").decode(errors="surrogateescape") or None


def _silence_of(sock: Sock) -> float | None:
    """Seconds without a sign of life after which libzmq's heartbeats end a connection, at least; None without them."""
    interval = _get(sock, _HEARTBEAT_IVL)
    if interval <= 0:
        return None
    timeout = _get(sock, _HEARTBEAT_TIMEOUT)
    return float(interval if timeout < 0 else timeout) / 1000


def _disconnected(loss: Loss) -> Disconnected:
    return Disconnected(f"the connection to {loss.endpoint} was lost before the reply came", endpoint=loss.endpoint)


def _silent(loss: Loss, is_connected: bool) -> PeerSilent:
    how = "accepts connections and says nothing" if is_connected else "does not answer"
    return PeerSilent(
        f"the heartbeats of {loss.endpoint} have stopped: it {how}",
        endpoint=loss.endpoint,
        silent="process" if is_connected else "link",
    )
