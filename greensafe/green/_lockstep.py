"""Where does a REQ or REP socket stand in its send/recv lockstep, and how does it get out of a broken one?

libzmq keeps that state to itself: a REQ that gave up waiting answers every send with EFSM for ever, and there is no call that
puts it back. REQ_RELAXED alone hands out the abandoned request's reply, REQ_CORRELATE changes the bytes on the wire.
What works in place is REQ_RELAXED together with disconnect and connect of every endpoint, and each step below is needed:

1. read on while RCVMORE (or libzmq aborts the process: fq.cpp, `!_more`);
2. finish a half-sent message with an empty frame (or the next request is sent but never arrives);
3. LINGER 0 (or the server runs the abandoned request as well);
4. REQ_RELAXED on, until the next send (then off again, so that misuse still meets EFSM);
5. disconnect and connect each endpoint as often as it was connected: the old pipe, and the old reply with it, is gone.

A REQ that has bound cannot be reset (its pipes are not ours to drop): it stays in EFSM.

This module knows sockets, not greenlets' waits; it never sleeps.
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import zmq
from gevent import getcurrent
from zmq.backend import Socket as Backend

from ..deadlines import deadline
from ..errors import Disconnected, PeerError, RemoteError
from ..hub.turns import TURN, let_others_run
from ..transport.whole import read_rest
from ._carrier import Carrier
from ._waits import POLLOUT

if TYPE_CHECKING:
    from ._hosts import Hosts

__all__ = ["Lockstep"]

#: Seconds since the loop had a turn in which the monitor is not asked again, which costs 2 µs: what happens meanwhile would
#: be missed as well if it happened right after the send.
RECENT = 0.001

#: Frames of the rest of a message that are thrown away between two looks at the clock.
AT_ONCE = 512

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_LINGER = int(zmq.LINGER)
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_REQ_RELAXED = int(zmq.REQ_RELAXED)
_LAST_ENDPOINT = int(zmq.LAST_ENDPOINT)

_get: Callable[[Any, int], Any] = Backend.get
_set: Callable[[Any, int, Any], None] = Backend.set
_recv: Callable[..., Any] = Backend.recv
_send: Callable[..., Any] = Backend.send

Sock = zmq.Socket[Any]


class Lockstep:
    """The state of one REQ or REP socket.

    Attributes:
        is_open: A REQ's request is sent and its reply not read, or a REP's request is read and not replied to.
        is_half_sent: A frame went out with SNDMORE and the last one did not yet.
        is_interrupted: A wait of ours ended without its message: whoever sends next starts afresh.
        relaxed: The program has set REQ_RELAXED, so that is what it is put back to.
        waited_at: The monotonic time at which an operation was last woken, so the loop had a turn.
        carrier: What a REQ that is connected knows of its peers.
        hosts: Told of resets, if the socket is connected to names.
    """

    __slots__ = (
        "__weakref__", "_bound", "_connects", "_relaxed", "_scope", "_sender",
        "carrier", "hosts", "is_half_sent", "is_interrupted", "is_open", "is_req", "relaxed", "waited_at",
    )  # fmt: skip

    def __init__(self, is_req: bool) -> None:
        self.is_req = is_req
        self.is_open = False
        self.is_half_sent = False
        self.is_interrupted = False
        self.relaxed = False
        self.waited_at = 0.0
        self._bound = 0
        self._connects: list[tuple[str, str]] = []
        self._relaxed = False
        self._sender: weakref.ref[Any] | None = None
        self._scope: deadline | None = None
        self.carrier: Carrier | None = None
        self.hosts: Hosts | None = None

    # What happened to the socket.

    def on_connect(self, sock: Sock, address: str) -> None:
        self._connects.append((address, _get(sock, _LAST_ENDPOINT).rstrip(b"\0").decode()))
        if self.carrier is not None:
            self.carrier.on_endpoints(sock, [address for address, _ in self._connects])

    def on_disconnect(self, sock: Sock, address: str) -> None:
        for known in self._connects:
            if address in known:
                self._connects.remove(known)
                if self.carrier is not None:
                    self.carrier.on_endpoints(sock, [address for address, _ in self._connects], known[1])
                return

    def on_bind(self) -> None:
        self._bound += 1
        if self.carrier is not None:
            self.carrier.switch_off()

    def on_unbind(self) -> None:
        self._bound -= 1

    def on_sent(self, sock: Sock, more: bool) -> None:
        """A frame was taken by libzmq; `more`: it had SNDMORE."""
        if self._relaxed:
            _set(sock, _REQ_RELAXED, int(self.relaxed))
            self._relaxed = False
        self.is_half_sent = more
        self.is_interrupted = False
        if self.is_req:
            self.is_open = not more
            self._sender = weakref.ref(getcurrent())
            self._scope = deadline.current()
            if self.carrier is not None and not more:
                self.carrier.on_request()
        elif not more:
            self.is_open = False

    def on_received(self, sock: Sock) -> None:
        """A frame was read."""
        if not _get(sock, _RCVMORE):
            self.is_open = not self.is_req
            self.is_interrupted = False
            if self.carrier is not None:
                self.carrier.on_reply()

    def on_interrupted(self, sock: Sock) -> None:
        """Something has ended a send, and nobody knows whether before or behind it."""
        if self.is_req:
            self.is_open = self.is_interrupted = True
        else:
            self.is_open = bool(_get(sock, _EVENTS) & POLLOUT)  # a REP has room only for an answer that it owes

    # What to do about it.

    def take_loss(self, sock: Sock) -> PeerError | None:
        """Why the request that is open is lost, if it is; the socket is reset and can send at once."""
        error = None if self.carrier is None else self.carrier.error
        if error is not None:
            self.reset_req(sock)
        return error

    @property
    def is_reset(self) -> bool:
        """Whether a REQ was put back and has not sent since: there is nothing to receive."""
        return self._relaxed and not self.is_open

    def before_send(self, sock: Sock) -> bool:
        """Reset a REQ whose exchange was given up: its wait was interrupted, its greenlet has died, its scope ran out or its
        peer is gone; or that libzmq connects to nobody any more. Returns whether it was.

        Otherwise sending twice is a mistake of the program and libzmq says so (EFSM).
        """
        if not self.is_req or self._bound:
            return False
        if self.carrier is not None and monotonic() - self.waited_at > RECENT:
            self.carrier.drain()
        if self.is_open or self.is_half_sent:
            is_over = self._is_given_up()
        else:
            is_over = self.carrier is not None and self.carrier.is_stopped
        if is_over:
            self.reset_req(sock)
        return is_over

    def _is_given_up(self) -> bool:
        if self.is_interrupted or (self.carrier is not None and self.carrier.error is not None):
            return True
        sender = None if self._sender is None else self._sender()
        if sender is None or sender.dead:
            return True
        return self._scope is not None and self._scope.delivered

    def reset(self, sock: Sock) -> None:
        """Put the socket back into the state in which it starts; nothing happens if it is there."""
        if not (self.is_open or self.is_half_sent or _get(sock, _RCVMORE)):
            return
        if not self.is_req:
            self.reset_rep(sock)
        elif self._bound:
            raise zmq.ZMQError(
                zmq.EFSM, "a REQ socket that has bound cannot be reset in place: close it and make another, or connect instead"
            )
        else:
            self.reset_req(sock)

    def reset_req(self, sock: Sock, old: str = "", new: str = "") -> list[list[Any]]:
        """Steps 1 to 5 of the module's head. The socket can send afterwards, and no old reply can reach it.

        Args:
            sock: The REQ.
            old, new: An endpoint that is not connected to again, and the one that is instead of it.

        Returns:
            With `old`: the request that is open, if `hosts` has kept it, and it was not sent. It is sent by `move`.
        """
        _read_rest(sock)
        if self.is_half_sent:
            _send(sock, b"", _NOBLOCK)
        linger = _get(sock, _LINGER)
        _set(sock, _LINGER, 0)
        try:
            _set(sock, _REQ_RELAXED, 1)
            self._relaxed = True
            if self.carrier is not None:
                self.carrier.drain()  # what was before is about connections that are dropped now
                self.carrier.on_reset()
            for address, _ in self._connects:
                _drop(sock, address)
            unsent = self.hosts.take_unsent() if old and self.hosts is not None else []
            self._connects, addresses = [], [address for address, _ in self._connects]
            for each in addresses:
                address = new if each == old else each
                Backend.connect(sock, address)
                self.on_connect(sock, address)
        finally:
            _set(sock, _LINGER, linger)
        self.is_open = self.is_half_sent = self.is_interrupted = False
        if self.hosts is not None:
            self.hosts.on_reset(sock)  # type: ignore[arg-type]  # a green one has them
        return unsent

    def move(self, sock: Sock, old: str, new: str) -> list[list[Any]]:
        """Connect a REQ to `new` instead of `old`; the program does not notice.

        Args:
            sock: The REQ, between two frames.
            old, new: Endpoints.

        Returns:
            What has to be kept for the next time.
        """
        is_open, is_interrupted = self.is_open, self.is_interrupted
        error = None if self.carrier is None else self.carrier.error
        kept = self.reset_req(sock, old, new)[-1:]
        self.is_open, self.is_interrupted = is_open, is_interrupted
        if not is_open or self.carrier is None:
            return []
        if error is not None or not kept:
            self.carrier.lose(error or Disconnected(f"{old} was left for {new}, and the request with it", endpoint=old))
            return []
        for frame in kept[0][:-1]:
            _send(sock, frame, _NOBLOCK | _SNDMORE)
        _send(sock, kept[0][-1], _NOBLOCK)
        if self._relaxed:
            _set(sock, _REQ_RELAXED, int(self.relaxed))
            self._relaxed = False
        self.carrier.on_request()
        return kept

    def reset_rep(self, sock: Sock) -> None:
        """Answer the pending request with an error: that alone frees a REP without losing the requests queued behind it."""
        _read_rest(sock)
        if self.is_half_sent:
            _send(sock, b"", _NOBLOCK)
        else:
            _send(sock, RemoteError("ABORTED", "the server gave this request up").to_reply(), _NOBLOCK)
        self.is_open = self.is_half_sent = self.is_interrupted = False


def _read_rest(sock: Sock) -> None:
    """Throw away what is left of a message. A long one takes turns, except in the hub; nothing is reset before its end."""
    until = monotonic() + TURN
    while read_rest(sock, AT_ONCE):
        if monotonic() > until:
            let_others_run()
            until = monotonic() + TURN


def _drop(sock: Sock, address: str) -> None:
    try:
        Backend.disconnect(sock, address)
    except zmq.ZMQError as error:
        # A connection that libzmq has given up by itself (wrong socket type, failed authentication) is gone already.
        if error.errno != errno.ENOENT:
            raise
