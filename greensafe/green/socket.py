"""What is a ZeroMQ socket whose every wait is cooperative and ends?

The public operations on frames and messages, and every call that may consume an edge of ZMQ_FD and so has to look who waits.
How an operation waits is in `_waiting`, objects as messages are in `_objects`. Nothing here knows servers, clients or headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Literal, overload

import zmq
from zmq.backend import Socket as Backend

from ..deadlines import check
from ..hub.turns import let_others_run
from ..transport.byname import has_proxy
from ..transport.endpoints import explained
from ..transport.names import host_in
from ._monitors import MonitoredSocket
from ._waiting import DEFAULT_LINGER, EXPIRED, UNSET, Timeout
from ._waits import POLLIN, poll_until

__all__ = ["DEFAULT_LINGER", "UNSET", "Socket", "Timeout"]

_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_REQ_RELAXED = int(zmq.REQ_RELAXED)

_get: Callable[[Any, int], Any] = Backend.get
_recv: Callable[..., Any] = Backend.recv
_send: Callable[..., Any] = Backend.send

Buffer = bytes | bytearray | memoryview | zmq.Frame


class Socket(MonitoredSocket):
    """A cooperative zmq.Socket: every send*, recv* and poll lets other greenlets run while it waits, and can be limited.

    Every send* and recv* takes `timeout=` in seconds: None waits without limit, 0 takes only what is ready now. Without it
    `default_timeout` holds, and without that one the RCVTIMEO or SNDTIMEO option. When it runs out `on_timeout` decides.
    An enclosing `deadline` scope, `gevent.Timeout` or kill ends the wait as well; no message is lost by any of them.

    Args:
        ctx_or_socket: The Context, or a socket to shadow.
        socket_type: zmq.REQ, zmq.ROUTER, ...
        default_timeout: Seconds that each send and recv waits unless it says otherwise; by default the Context's.
    """

    # Receiving.

    @overload
    def recv(self, flags: int = 0, copy: Literal[True] = True, track: bool = False, *, timeout: Timeout = UNSET) -> bytes: ...
    @overload
    def recv(self, flags: int = 0, *, copy: Literal[False], track: bool = False, timeout: Timeout = UNSET) -> zmq.Frame: ...
    @overload
    def recv(self, flags: int, copy: Literal[False], track: bool = False, *, timeout: Timeout = UNSET) -> zmq.Frame: ...
    @overload
    def recv(
        self, flags: int = 0, copy: bool = True, track: bool = False, *, timeout: Timeout = UNSET
    ) -> bytes | zmq.Frame: ...
    def recv(self, flags: int = 0, copy: bool = True, track: bool = False, *, timeout: Timeout = UNSET) -> Any:
        """Receive one frame: bytes, or a Frame with copy=False.

        Args:
            flags: NOBLOCK, or 0.
            copy: False for a Frame.
            track: As in pyzmq.
            timeout: Seconds to wait at most; see the class.

        Raises:
            OperationTimeout: The limit ran out. Nothing was received; a REQ may send again or go on waiting.
            zmq.Again: NOBLOCK and nothing is there.
            zmq.ZMQError: As in pyzmq; ENOTSOCK if the socket is closed while this waits.
        """
        waits = self._waits
        left = waits.straight_in
        if left > 0 and not flags:
            # What `_receive` would do, without the call: this is what a busy reader's time goes into.
            waits.straight_in = left - 1
            try:
                return _recv(self, _NOBLOCK, copy, track)
            except zmq.Again:
                waits.look_first()
        frame = self._receive("recv", flags, copy, track, timeout)
        return self._ended() if frame is EXPIRED else frame

    @overload
    def recv_multipart(
        self, flags: int = 0, copy: Literal[True] = True, track: bool = False, *, timeout: Timeout = UNSET
    ) -> list[bytes]: ...
    @overload
    def recv_multipart(
        self, flags: int = 0, *, copy: Literal[False], track: bool = False, timeout: Timeout = UNSET
    ) -> list[zmq.Frame]: ...
    @overload
    def recv_multipart(
        self, flags: int, copy: Literal[False], track: bool = False, *, timeout: Timeout = UNSET
    ) -> list[zmq.Frame]: ...
    @overload
    def recv_multipart(
        self, flags: int = 0, copy: bool = True, track: bool = False, *, timeout: Timeout = UNSET
    ) -> list[bytes] | list[zmq.Frame]: ...
    def recv_multipart(self, flags: int = 0, copy: bool = True, track: bool = False, *, timeout: Timeout = UNSET) -> Any:
        """Receive a whole message: a list of bytes, or of Frames with copy=False. See `recv` for the rest."""
        frames = self._receive_all("recv_multipart", flags, copy, track, timeout)
        return self._ended() if frames is EXPIRED else frames

    def recv_into(self, buffer: Any, /, *, nbytes: int = 0, flags: int = 0, timeout: Timeout = UNSET) -> int:
        """Receive one frame into a writable buffer; returns its size in bytes. See `recv` for the rest."""

        if self._waits.held and (kept := self._take_kept(1)):
            room = memoryview(buffer).cast("B")
            filled: int = min(len(kept[0]), nbytes or room.nbytes)
            room[:filled] = kept[0].buffer[:filled]
            return filled

        def attempt() -> int:
            return Backend.recv_into(self, buffer, nbytes=nbytes, flags=int(flags) | _NOBLOCK)

        size: Any = self._try_or_wait("recv_into", POLLIN, attempt, flags, timeout)
        if size is EXPIRED:
            return self._ended()  # type: ignore[no-any-return]  # whatever a subclass decides
        if self._lockstep is not None:
            self._lockstep.on_received(self)
        return int(size)

    # Sending.

    @overload  # type: ignore[override]  # keywords of ours
    def send(
        self,
        data: Buffer,
        flags: int = 0,
        copy: Literal[True] = True,
        track: bool = False,
        routing_id: int | None = None,
        group: str | None = None,
        *,
        timeout: Timeout = UNSET,
    ) -> None: ...
    @overload
    def send(
        self,
        data: Buffer,
        flags: int = 0,
        *,
        copy: Literal[False],
        track: bool = False,
        routing_id: int | None = None,
        group: str | None = None,
        timeout: Timeout = UNSET,
    ) -> zmq.MessageTracker: ...
    @overload
    def send(
        self,
        data: Buffer,
        flags: int = 0,
        copy: bool = True,
        track: bool = False,
        routing_id: int | None = None,
        group: str | None = None,
        *,
        timeout: Timeout = UNSET,
    ) -> zmq.MessageTracker | None: ...
    def send(
        self,
        data: Any,
        flags: int = 0,
        copy: bool = True,
        track: bool = False,
        routing_id: int | None = None,
        group: str | None = None,
        *,
        timeout: Timeout = UNSET,
    ) -> Any:
        """Queue one frame for sending; waits only while the queue is full. Returns a MessageTracker or None, as in pyzmq.

        Args:
            data: bytes or any buffer, or a Frame.
            flags: NOBLOCK, SNDMORE, or 0.
            copy, track, routing_id, group: As in pyzmq.
            timeout: Seconds to wait at most; see the class.

        Raises:
            OperationTimeout: The limit ran out. The frame was not queued.
            zmq.Again: NOBLOCK and the queue is full.
            zmq.ZMQError: As in pyzmq; EFSM if a REQ has its reply still to read.
        """
        waits = self._waits
        left = waits.straight_out
        if left > 0 and not flags and routing_id is None and group is None:
            # What `_transmit` would do, without the call.
            waits.straight_out = left - 1
            try:
                return _send(self, data, _NOBLOCK, copy, track)
            except zmq.Again:
                pass
        extra = None if routing_id is None and group is None else {"routing_id": routing_id, "group": group}
        result = self._transmit("send", data, flags, copy, track, timeout, extra)
        return self._ended() if result is EXPIRED else result

    def send_multipart(
        self,
        msg_parts: Sequence[Any],
        flags: int = 0,
        copy: bool = True,
        track: bool = False,
        *,
        timeout: Timeout = UNSET,
        **kwargs: Any,
    ) -> zmq.MessageTracker | None:
        """Queue a whole message, all of it or nothing. See `send` for the rest."""
        result = self._transmit_all("send_multipart", msg_parts, flags, copy, track, timeout, kwargs)
        return self._ended() if result is EXPIRED else result  # type: ignore[no-any-return]

    # Waiting for events.

    def poll(self, timeout: float | None = None, flags: int = POLLIN) -> int:
        """Wait until the socket is ready; returns the mask of POLLIN and POLLOUT that holds, 0 if the limit ran out.

        Args:
            timeout: MILLISECONDS, as in pyzmq; None or negative: no limit of its own (a deadline scope still holds).
            flags: POLLIN, POLLOUT or both.
        """
        if self.closed:
            raise zmq.ZMQError(zmq.ENOTSUP)
        at = poll_until(timeout)
        flags = int(flags)
        waits = self._waits
        waits.check_owner()
        if waits.is_spent(flags):
            waits.give_way()
        elif timeout == 0:
            let_others_run()
        while True:
            events = (int(_get(self, _EVENTS)) | waits.lost(self)) & flags
            waits.recheck(self)
            if events or (at is not None and monotonic() >= at):
                return events
            check(at is not None)
            waits.wait(self, flags, at)

    # The ends of a socket's life, and what else makes libzmq process commands.

    def reset(self) -> None:
        """Put a REQ or REP back into the state in which it starts, by hand.

        A REQ forgets its request and will never receive that request's reply; it can send at once. A REP answers the pending
        request with an error reply (closing and re-binding would lose the requests of other clients that are queued). On a
        socket that has nothing pending nothing happens.

        Raises:
            zmq.ZMQError: ENOTSUP on another type of socket; EFSM on a REQ that has bound, which cannot be reset in place.
        """
        if self._lockstep is None:
            raise zmq.ZMQError(zmq.ENOTSUP, f"only REQ and REP have a state to reset, not {self._type_name}")
        self._waits.check_owner()
        if self._waits.kept:  # of a message whose receiver was interrupted
            self._lockstep.is_open = True
            self._waits.hold(None, [])
        try:
            self._lockstep.reset(self)
        finally:
            self._recheck()

    def close(self, linger: int | None = None) -> None:
        """Close the socket. Greenlets that wait on it get ENOTSOCK. Unsent messages are kept for LINGER milliseconds."""
        waits = self.__dict__.get("_waits")
        # First: libuv aborts the process if it finds a descriptor closed that it watches.
        wake = None if waits is None else waits.abort()
        try:
            if waits is not None and waits.hosts is not None:
                waits.hosts.close()
            self._end_monitors()
            if waits is not None:
                self._binding.close(self)
            super().close(linger)
        finally:
            if wake is not None:
                wake()

    def get(self, option: int) -> Any:
        """Get a socket option, as in pyzmq."""
        waits = self._waits
        if option == _EVENTS and waits.is_inherited:
            waits.check_owner()
        if waits.kept and option == _RCVMORE:
            return 1
        try:
            return super().get(option)
        finally:
            self._recheck()

    def set(self, option: int, optval: Any) -> None:
        """Set a socket option, as in pyzmq."""
        try:
            super().set(option, optval)
            if option == _REQ_RELAXED and self._lockstep is not None:
                self._lockstep.relaxed = bool(optval)
        finally:
            self._limits.clear()
            self._recheck()

    getsockopt = get
    setsockopt = set  # noqa: A003

    def connect(self, addr: str | bytes) -> Any:
        """Connect to an endpoint, as in pyzmq; an error's note says what to try.

        A host name in a tcp endpoint is resolved by gevent's resolver. This waits for it up to a second (not in the hub, which
        cannot wait). A name that has no address then is no error: it is resolved in the background, again and again, and logged
        once as a WARNING. Until it has an address nothing can be sent: a send waits, within its limit, or raises Again with
        NOBLOCK; a REQ's raises Unreachable with what the resolver says. A name is resolved anew after each attempt to connect
        that fails and each connection that is lost, and the socket follows it to another address. LAST_ENDPOINT has the number.
        (Where SOCKS_PROXY is set the proxy resolves the name.)

        A deadline, a Timeout or a kill that ends the wait leaves the socket as it was.
        """
        try:
            if isinstance(addr, bytes):
                addr = addr.decode()
            host = host_in(addr) if isinstance(addr, str) else None
            self._before_connect(addr)
            if host is not None and not has_proxy(self):
                self._connect_to(host)
                return self._connect_cm(addr)
            with explained(addr):
                result = super().connect(addr)
            self._count_ways(1)
            if self._lockstep is not None:
                self._lockstep.on_connect(self, addr)
            return result
        finally:
            self._recheck()

    def disconnect(self, addr: str | bytes) -> None:
        """Disconnect from an endpoint, as it was connected to, or with the number that its name has.

        What is queued for it is kept for the LINGER that holds now, by default 30 s: so long libzmq tries to connect and to
        send it, and a context that is terminated waits for that. A LINGER that is set later, that of `close(linger)` or of
        `destroy(linger)` too, does not reach it. To drop it at once set LINGER 0 first.
        """
        try:
            if self._disconnect_from(addr.decode() if isinstance(addr, bytes) else addr):
                return
            super().disconnect(addr)
            self._count_ways(-1)
            if self._lockstep is not None:
                self._lockstep.on_disconnect(self, addr.decode() if isinstance(addr, bytes) else addr)
        finally:
            self._recheck()

    def bind(self, addr: str | bytes, *, takeover: bool = False) -> Any:
        """Bind to an endpoint, as in pyzmq.

        What this process has just given back there, by `unbind` or by closing a socket, is waited for, except in the hub.

        Args:
            addr: The endpoint, such as "tcp://127.0.0.1:5555". Over ipc a path that nobody listens at any more is taken, and
                deleted when this socket is closed or unbound.
            takeover: Take an ipc path also from a server that listens there: who connects from now on comes here, and the
                other server keeps the connections that it has.

        Raises:
            zmq.ZMQError: It cannot be bound; a note says what to try. EADDRINUSE also for an ipc path at which a server
                listens or which is no socket, EMFILE if no descriptor is left. Nothing has changed.
        """
        try:
            if isinstance(addr, bytes):
                addr = addr.decode()
            result = self._binding.bind(self, addr, super().bind, takes_over=takeover)
            self._count_ways(1)
            if self._lockstep is not None:
                self._lockstep.on_bind()
            return result
        finally:
            self._recheck()

    def unbind(self, addr: str | bytes) -> None:
        """Unbind from an endpoint, by the name that it was bound with or by `last_endpoint`; its connections end.

        What is queued for them is kept for the LINGER that holds now, and no longer for one that is set later, nor for that of
        `close(linger)` or `destroy(linger)`: a context waits for that long when it is terminated.
        """
        try:
            if isinstance(addr, bytes):
                addr = addr.decode()
            self._binding.unbind(addr, super().unbind)
            self._count_ways(-1)
            if self._lockstep is not None:
                self._lockstep.on_unbind()
        finally:
            self._recheck()
