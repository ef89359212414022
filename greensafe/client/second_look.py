"""A second connection to a peer of which the first one hears nothing any more.

Something in between (a proxy, `ssh -L`, a load balancer) may take a long message at once and pass it on slowly. The kernel then
says that all of it has arrived, the PINGs stand behind it, and the server, which has not received the request yet, cannot say
WORKING. That looks like a stopped process. So before that verdict, if a long message may explain the silence, somebody has to
finish a handshake on a connection of its own.

Rules:

* There is none in ordinary operation: it takes a verdict of `sansio.liveness.Pulse`, and enough bytes under way to explain it.
  Where the kernel counts nothing (ipc; tcp elsewhere than on Linux) a plain peer that works on a request gives no sign of life:
  it is looked at in this way as long as that takes.
* One at a time for each channel, for a few looks at the most. It never sends a message. It is closed as soon as it is answered:
  a plain server over ipc has one for each of its clients that waits, and libzmq aborts a process that has no descriptor left.
* Answered: the silence is forgiven, and begins to count anew; again and again, as long as what is under way explains it. Not if
  nothing on the first connection is acknowledged: then a firewall, say, has forgotten that connection, and drops what comes.
* That nobody listens at an ipc path any more, or another process does, proves nothing: the connection to a process that has
  ended is lost. That it reads nothing of what is sent does.
* It goes to the address that the first connection leads to, so no name is resolved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from ..green.context import plain_socket
from ..hub.log_limiter import Seldom
from ..sansio.liveness import MARGIN, SLOWEST, SLOWEST_UNCOUNTED, Pulse, explains, looks_allowed
from ..transport.monitor import ConnectionEvent, Monitor
from ..transport.names import host_in
from ..transport.tcp_info import is_counted, listener, peer
from .problems import FORGOTTEN, SILENT, STUCK, UNANSWERED, UNASKED, Trouble

__all__ = ["SecondLook"]

log = logging.getLogger("greensafe.secondlook")

_CONNECTED = zmq.EVENT_CONNECTED

#: Looks within which a second connection has to get its handshake where nobody counts: nothing else tells of the peer there.
LOOKS_UNCOUNTED = 3

#: What a ZeroMQ process answers a new connection with; that it refuses this client shows just as well that it lives.
_ANSWERS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class SecondLook:
    """The second look at one channel's peer, whenever it takes one.

    Args:
        endpoint: The channel's.
        context: The channel's, whose options (CURVE keys, say) hold here, too.
        limit: Seconds in which a connection and its handshake have to be made.
    """

    __slots__ = (
        "__weakref__",
        "_context",
        "_counts",
        "_endpoint",
        "_has_reason",
        "_is_answered",
        "_is_connected",
        "_is_open",
        "_limit",
        "_listener",
        "_looks",
        "_monitor",
        "_seldom",
        "_sock",
        "_was_answered",
    )

    def __init__(self, endpoint: str, context: zmq.Context[Any], limit: float) -> None:
        self._endpoint = endpoint
        self._counts = is_counted(endpoint)
        self._context = context
        self._limit = max(1, round(limit * 1000))
        self._seldom = Seldom()
        self._sock: zmq.Socket[bytes] | None = None
        self._monitor: Monitor | None = None
        self._looks = 0.0
        self._listener: int | None = None
        self._is_open = False
        self._is_connected = self._is_answered = False
        self._was_answered = self._has_reason = False

    def __repr__(self) -> str:
        state = "closed" if not self._is_open else "answered" if self._is_answered else f"open for {self._looks:.1f} looks"
        return f"<SecondLook {state} {self._endpoint}>"

    @property
    def is_open(self) -> bool:
        """Whether an answer is being waited for, or to be judged at the next look: until then the silence means nothing."""
        return self._is_open

    @property
    def has_reason(self) -> bool:
        """Whether, at the last look, the peer was silent and what is under way explained that: then no WORKING could come."""
        return self._has_reason

    def judge(
        self,
        silent: str | None,
        pulse: Pulse,
        under_way: Callable[[float], int],
        descriptor: int,
        now: float,
        says_working: bool = True,
    ) -> Trouble | None:
        """Decide on a verdict of the pulse; called after each of its looks.

        Args:
            silent: The pulse's verdict, None if there is none.
            pulse: Of the first connection.
            under_way: Returns the bytes that were handed over by a time and may not have arrived.
            descriptor: Of the first connection.
            now: When this look was.
            says_working: Whether a peer that is alive would have said so. Else its silence proves nothing where nobody counts.

        Returns:
            Why the first connection is to be given up; None if it is not, or not yet.
        """
        since = pulse.quiet_since
        if since is None:  # a sign of life
            self.end()
            return None
        if silent is not None and not self._counts:
            silent = "process"
        size = under_way(since)
        self._has_reason = explains(size, now - since, SLOWEST if self._counts else SLOWEST_UNCOUNTED)
        if silent is None:
            return None
        if not self._is_open:
            if self._counts and not self._has_reason:
                return STUCK if self._was_answered else SILENT[silent]
            if says_working and not self._has_reason:
                return None  # that it does not is a verdict of its own
            self._begin(descriptor)
            return UNASKED[silent] if not self._is_open and (self._counts or pulse.is_cut) else None
        self._looks += pulse.step
        if self._has_answer():
            self._close()
            if pulse.is_cut and self._counts:  # by ipc it may read no more before it has room, which shows in the same way
                return FORGOTTEN
            self._was_answered = True
            pulse.forgive()
            return None
        allowed = looks_allowed(size, pulse.owed)
        if self._looks < (allowed if self._counts else max(allowed, LOOKS_UNCOUNTED)) - MARGIN:
            return None
        if not self._is_connected and self._endpoint.startswith("ipc:") and not pulse.is_cut:
            self._close()
            pulse.forgive()
            return None
        return UNANSWERED["process" if self._is_connected else silent]

    def end(self) -> None:
        """Forget all of it: the peer is heard of, nobody waits for it any more, or its connection is gone."""
        self._was_answered = self._has_reason = False
        self._close()

    def _begin(self, descriptor: int) -> None:
        self._looks = 0.0
        self._is_connected = self._is_answered = False
        self._listener = listener(descriptor) if self._endpoint.startswith("ipc:") else None
        try:
            self._sock = plain_socket(self._context, zmq.DEALER)
            self._set_options(self._sock)
            self._monitor = Monitor(self._sock, self._on_event, _CONNECTED | _ANSWERS)
            address = self._address(self._sock, descriptor)
            if address is None:
                self._close()
            else:
                self._sock.connect(address)
                self._is_open = True
        except zmq.ZMQError as error:
            text, extra = "%s: no second look could be taken: %s", {"endpoint": self._endpoint}
            self._seldom.say(log, logging.WARNING, text, self._endpoint, error, extra=extra)
            self._close()

    def _set_options(self, sock: zmq.Socket[bytes]) -> None:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, self._limit)
        sock.setsockopt(zmq.HANDSHAKE_IVL, self._limit)
        sock.setsockopt(zmq.PROBE_ROUTER, 0)

    def _address(self, sock: zmq.Socket[bytes], descriptor: int) -> str | None:
        """Where to connect; None if only libzmq could tell, by resolving a name."""
        if sock.getsockopt(zmq.SOCKS_PROXY):
            return self._endpoint
        found = peer(descriptor)
        if found is None:
            return self._endpoint if host_in(self._endpoint) is None else None
        if found.startswith("["):
            sock.setsockopt(zmq.IPV6, 1)  # no sooner: libzmq might take an IPv6 address of the source's interface then
        source, has_source, _ = self._endpoint.removeprefix("tcp://").rpartition(";")
        if has_source:
            source = source.rpartition(":")[0] + ":0"  # the first connection has the source's port
        return f"tcp://{source}{has_source}{found}"

    def _on_event(self, event: ConnectionEvent) -> None:
        if event.kind == _CONNECTED:
            self._is_connected = self._listener is None or listener(event.value) == self._listener
        elif event.kind & _ANSWERS and self._is_connected:
            self._is_answered = True
            self._disconnect()

    def _has_answer(self) -> bool:
        if self._monitor is not None:
            self._monitor.drain()
        return self._is_answered

    def _close(self) -> None:
        self._is_open = False
        self._disconnect()

    def _disconnect(self) -> None:
        monitor, self._monitor = self._monitor, None
        sock, self._sock = self._sock, None
        if monitor is not None:
            monitor.close()  # before its socket: else libzmq's thread may wait for it
        if sock is not None:
            sock.close(0)
