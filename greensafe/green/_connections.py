"""Which connections does a REQ have, and is the one that carries its request gone?

Fed with the events of its monitor, with what it sends and receives, and with the time. Rules:

* A connection may carry the request if it was there when the request was sent, or is its endpoint's first one since. The
  request is lost when one of them that had finished its handshake is gone and none of them is left. One that waits in a queue
  while nobody is there is not.
* DISCONNECTED comes *before* the last reply that was read is handed to the socket; what comes next from the same I/O thread
  comes after. So the loss counts (`loss`) only from the next event on, or by `settle` where none follows.
* With one endpoint, a new CONNECTED stands for the connection before it as well: disconnect + connect emits no DISCONNECTED,
  and an old CONNECTED may be read late. DISCONNECTED of an unknown descriptor means nothing.
* CONNECT_RETRIED that follows neither CLOSED nor DISCONNECTED is all that libzmq says of an endpoint that it cannot begin to
  connect to (a name without an address, IPv6 without IPV6, an unknown source). What waits for such endpoints only is lost.
* Failed authentication, another mechanism and the wrong socket type end a session for good; libzmq tries no more.
* A ZMTP 2 peer never finishes a handshake, as libzmq reports it, and its end looks like a failed one. So does a peer that
  accepts and hangs up, such as a load balancer with nobody behind it, but that does so at once: hence `YOUNG`.

It does not know sockets, nor how the caller is told.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import zmq

from ..transport.monitor import ConnectionEvent

__all__ = ["YOUNG", "Connections", "Loss"]

#: Seconds that a connection has to last for its failed handshake to be taken for the end of a ZMTP 2 peer.
YOUNG = 0.25

_CONNECTED = zmq.Event.CONNECTED
_DISCONNECTED = zmq.Event.DISCONNECTED
_RETRIED = zmq.Event.CONNECT_RETRIED
_SUCCEEDED = zmq.Event.HANDSHAKE_SUCCEEDED
_NO_DETAIL = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_TRIED = frozenset({zmq.Event.CLOSED, _DISCONNECTED})
_FINAL = frozenset({zmq.Event.HANDSHAKE_FAILED_AUTH, zmq.Event.HANDSHAKE_FAILED_PROTOCOL})
_FAILED = _FINAL | {_NO_DETAIL}


@dataclass(frozen=True, slots=True)
class Loss:
    """What became of the request.

    Attributes:
        endpoint: The one whose end settled it.
        was_delivered: It may have reached the peer; if not, the peer refused the connection.
        age: Seconds that the connection had lasted.
        has_begun: libzmq has tried to connect; if not, it could not even begin to.
    """

    endpoint: str
    was_delivered: bool
    age: float
    has_begun: bool = True


class _Connection:
    __slots__ = ("carries", "endpoint", "failure", "is_up", "since")

    def __init__(self, endpoint: str, since: float, carries: bool, is_up: bool) -> None:
        self.endpoint = endpoint
        self.since = since
        self.carries = carries
        self.is_up = is_up
        self.failure: ConnectionEvent | None = None

    def had_been_up(self, now: float) -> bool:
        failure = self.failure
        if self.is_up or failure is None:
            return self.is_up
        # EAGAIN: the peer accepted and said nothing until HANDSHAKE_IVL ended it.
        return failure.kind == _NO_DETAIL and failure.value != errno.EAGAIN and now - self.since >= YOUNG


class Connections:
    """The connections of one REQ.

    Args:
        in_order: The context has one I/O thread, so events come in the order in which things happened.

    Attributes:
        total: How often the socket is connected to an endpoint that has events.
        loss: The request that is open is lost, and no reply to it can be on its way any more.
        is_unsettled: A connection was lost, and whether replies are on their way is told by the next event, or by nothing.
    """

    __slots__ = (
        "_early", "_ended", "_in_order", "_is_open", "_live", "_pending", "_spent", "_stuck", "_tried", "_unsettled",
        "loss", "total",
    )  # fmt: skip

    def __init__(self, in_order: bool) -> None:
        self._in_order = in_order
        self._is_open = False
        self.total = 0
        self.loss: Loss | None = None
        self._pending: Loss | None = None
        self._live: dict[int, _Connection] = {}
        self._early: set[str] = set()  # a handshake was reported before its connection, by another I/O thread
        self._ended: set[str] = set()
        self._spent: set[str] = set()
        self._unsettled: dict[str, bool] = {}  # endpoint: it had been up
        self._tried: set[str] = set()  # CLOSED or DISCONNECTED, so the next CONNECT_RETRIED tells nothing
        self._stuck: set[str] = set()  # libzmq could not begin to connect

    def __repr__(self) -> str:
        up = sum(connection.is_up for connection in self._live.values())
        return f"<Connections {up} up of {len(self._live)}, {self.total} wanted, {len(self._ended)} ended, {self.loss}>"

    @property
    def is_unsettled(self) -> bool:
        return bool(self._unsettled)

    @property
    def is_carried(self) -> bool:
        """Whether a request is open that a connection which stands may carry."""
        return self._is_open and any(each.carries for each in self._live.values())

    @property
    def is_stopped(self) -> bool:
        """Whether libzmq has given up connecting: without disconnect and connect nobody will ever be there."""
        return 0 < self.total <= len(self._ended)

    def on_request(self) -> None:
        """A request was sent whole."""
        self._is_open = True
        self.loss = self._pending = None
        self._spent.clear()
        for connection in self._live.values():
            connection.carries = True

    def on_reply(self) -> None:
        """A reply was read whole: whoever sent it has finished its handshake, reported or not."""
        self._is_open = False
        self.loss = self._pending = None
        if self.total == 1:
            for connection in self._live.values():
                connection.is_up = True

    def forget(self, endpoint: str) -> None:
        """The program has disconnected from an endpoint, of which libzmq emits no event."""
        self._live = {fd: each for fd, each in self._live.items() if self.total and each.endpoint != endpoint}

    def on_reset(self) -> None:
        """All endpoints are disconnected, and the request that was open is given up."""
        self._is_open = False
        self.loss = self._pending = None
        for known in (self._live, self._early, self._ended, self._spent, self._unsettled, self._stuck):
            known.clear()  # not what was tried: what follows that may still come

    def on_event(self, event: ConnectionEvent, now: float) -> None:
        """Something happened to a connection at the monotonic time `now`."""
        kind, endpoint = event.kind, event.endpoint
        if self._unsettled and (self._in_order or (self.total == 1 and kind == _RETRIED)):
            self.settle(will_retry=True)
        if kind in _TRIED:
            self._tried.add(endpoint)
            self._remove(self._stuck, endpoint)
        if kind == _CONNECTED:
            self._remove(self._ended, endpoint)
            self._remove(self._stuck, endpoint)
            carries = not self._is_open or not self._has(self._spent, endpoint)
            self._live[event.value] = _Connection(endpoint, now, carries, self._has(self._early, endpoint))
            self._remove(self._early, endpoint)
        elif kind == _SUCCEEDED:
            self._on_succeeded(endpoint)
        elif kind in _FAILED:
            connection = self._newest(endpoint)
            if connection is not None:
                connection.failure = event
        elif kind == _DISCONNECTED:
            self._on_disconnected(event, now)
        elif kind == _RETRIED:
            self._on_retried(endpoint)

    def settle(self, will_retry: bool = False) -> None:
        """No reply is on its way any more from the connections that were lost; `will_retry`: libzmq connects again."""
        settled, self._unsettled = self._unsettled, {}
        if not will_retry:
            self._ended |= set(settled)
        if self._is_open and self.loss is None:
            self.loss, self._pending = self._pending, None
        self._look_for_end(min(settled, default=""), any(settled.values()))

    # Endpoints change their name, from a host's to its address, between one try and the next. With one endpoint, any is meant.

    def _has(self, known: set[str], endpoint: str) -> bool:
        return bool(known) if self.total == 1 else endpoint in known

    def _remove(self, known: set[str], endpoint: str) -> None:
        if self.total == 1:
            known.clear()
        else:
            known.discard(endpoint)

    def _newest(self, endpoint: str) -> _Connection | None:
        """The connection that has a handshake before it."""
        found = [each for each in self._live.values() if not each.is_up and (self.total == 1 or each.endpoint == endpoint)]
        return found[-1] if found else None

    def _on_succeeded(self, endpoint: str) -> None:
        connection = self._newest(endpoint)
        if connection is None:
            self._early.add(endpoint)
        else:
            connection.is_up = True

    def _on_disconnected(self, event: ConnectionEvent, now: float) -> None:
        endpoint = event.endpoint
        connection = self._live.pop(event.value, None)
        if connection is None:
            if not self._has(self._early, endpoint):
                return
            connection = _Connection(endpoint, now, True, True)
        self._remove(self._early, endpoint)
        if self.total == 1:
            self._live.clear()
        was_up = connection.had_been_up(now)
        failure = connection.failure
        if not was_up and (self._in_order if failure is None else failure.kind in _FINAL):
            self._ended.add(endpoint)
            self._look_for_end(endpoint, False)
            return
        if was_up and connection.carries:
            self._spent.add(endpoint)
        self._unsettled[endpoint] = was_up
        if self._is_open and self._spent and not any(each.carries for each in self._live.values()):
            self._pending = Loss(endpoint, True, now - connection.since)

    def _on_retried(self, endpoint: str) -> None:
        if self._has(self._tried, endpoint):
            self._remove(self._tried, endpoint)
            return
        self._stuck.add(endpoint)
        if self._is_open and self.loss is None and self._pending is None and self.total <= len(self._stuck | self._ended):
            self.loss = Loss(endpoint, False, 0.0, has_begun=False)

    def _look_for_end(self, endpoint: str, was_up: bool) -> None:
        """A request that is open while nobody will ever be there is lost as well."""
        if self._is_open and self.loss is None and self.is_stopped:
            self.loss = Loss(endpoint, was_up or bool(self._spent), 0.0)
