"""A link between a program and its peer that fails in exactly this way, now.

A FaultyLink stands between clients and a target, as a proxy, and does what it is told:

    command      connections there are    new connections    bytes            undone by
    cut          stay open, hear nothing  lead nowhere       lost             heal()
    stall        stay open, hear nothing  lead nowhere       kept             heal()
    delay        hear everything later    the same           kept, in order   heal(), delay(0)
    throttle     share so many bytes/s    the same           kept, in order   heal(), throttle(None)
    refuse       go on                    are refused        pass             heal()
    reset        lost (RST)               as ever            lost
    hang_up      ended (FIN)              as ever            those before it pass
    half_close   ended in one direction   as ever            those before it pass
    corrupt      go on                    go on              one is inverted  heal() if it has not happened

Rules:

* A command acts at once and does not yield. When cut() or stall() returns, nothing more is handed to the receiver's kernel.
* It counts for all connections, those underway and later ones; most can be given a direction, "to_server" or "to_client".
* What TCP never does does not happen either: bytes do not change places, and a connection that has lost some by a cut is never
  continued with a hole in its stream: heal() resets it.

What a proxy cannot do: keep back the kernel's own answers. A client's connect() succeeds although its target cannot be reached
(the connection is closed then), and what it sends is acknowledged by the link's kernel, cut or not: TCP_USER_TIMEOUT sees
nothing, heartbeats do. Unix sockets have no RST: there its place is taken by an ordinary end.

The link runs in greenlets of the thread that made it, and takes commands there only. A program in the same thread has to wait
cooperatively, or nothing moves.
"""

from __future__ import annotations

import logging
import math
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import gevent
from gevent.hub import Hub

from ...hub.log_limiter import Seldom
from ...hub.threads import check_here
from .connection import Connection, Mark, Pipe
from .faults import Faults
from .sockets import Entrance, check_target, dial, send_at_once

__all__ = ["Direction", "FaultyLink"]

log = logging.getLogger("greensafe.testing.link")

#: Which way bytes go: from clients to the target, from the target to clients, or either.
Direction = Literal["to_server", "to_client", "both"]

_WHICH: dict[Direction, tuple[int, ...]] = {"to_server": (0,), "to_client": (1,), "both": (0, 1)}

#: Seconds until accepting is tried again after it failed, for instance for want of descriptors.
ACCEPT_AGAIN = 0.05


class FaultyLink:
    """A link to a server that fails on command, for tests; ready when it is made, until close() or the end of its block.

        with FaultyLink("tcp://127.0.0.1:5555") as link, Client(link.endpoint) as client:
            link.cut()
            client.request(b"Hello", timeout=1)

    Args:
        target: Where connections lead: "tcp://host:port" or "ipc://path". Nobody has to be there: then a client's connection
            is lost as soon as it was made.
        listen: Where clients connect, tcp or ipc; by default a free port of this machine's own.

    Attributes:
        endpoint: Where clients connect, with the port in it.
        target: As given.
        accepted: Connections that clients have made so far.

    Raises:
        TypeError, ValueError: An endpoint cannot be used; the text says why.
        OSError: `listen` cannot be bound to.
    """

    def __init__(self, target: str, listen: str = "tcp://127.0.0.1:0") -> None:
        self.target = check_target(target)
        self._entrance = Entrance(listen)
        self.endpoint = self._entrance.endpoint
        self.accepted = 0
        self._faults = (Faults(), Faults())
        self._connections: set[Connection] = set()
        self._closed = False
        self._seldom = Seldom()
        self._hub: Hub = gevent.get_hub()
        self._acceptor = gevent.spawn(self._accept, self._entrance.listener)

    # What lasts.

    def cut(self, direction: Direction = "both") -> None:
        """Pull the cable: whatever is underway or comes is lost, and nobody is told, not even of an end.

        Connections stay open. New ones are accepted and lead nowhere until the link is healed.
        """
        for faults in self._at(direction):
            faults.is_cut = True
        self._tell()

    def stall(self, direction: Direction = "both") -> None:
        """Stop, as a frozen process does: nothing passes and nothing is lost, and senders are held up when buffers are full."""
        for faults in self._at(direction):
            faults.is_stalled = True
        self._tell()

    def delay(self, seconds: float, direction: Direction = "both") -> None:
        """Pass everything on `seconds` after it came, in order; 0 for at once. Also what is underway.

        Up to 8 MiB of a connection may be underway; a sender that is ahead by more is held up.
        """
        _check_number(seconds, "a delay is 0 or more seconds", minimum=0)
        for faults in self._at(direction):
            faults.delay = float(seconds)
        self._tell()

    def throttle(self, bytes_per_second: float | None, direction: Direction = "both") -> None:
        """Let so many bytes pass in a second, of all connections together, in each direction; None for no limit."""
        if bytes_per_second is not None:
            _check_number(bytes_per_second, "a rate is more than 0 bytes per second (stall() lets none pass)", above=0)
        for faults in self._at(direction):
            faults.throttle(bytes_per_second, monotonic())
        self._tell()

    def refuse(self) -> None:
        """Have new connections refused; those there are go on. The port stays the link's."""
        self._check_open()
        self._acceptor.kill(block=False)
        self._entrance.refuse()

    def heal(self, direction: Direction = "both") -> None:
        """Undo all of the above and what corrupt() has not done yet; in both directions, accept connections again.

        Connections that lost something by a cut are reset.
        """
        for faults in self._at(direction):
            faults.heal()
        if direction == "both" and self._entrance.listener is None:
            self._entrance.open()
            self._acceptor = gevent.spawn(self._accept, self._entrance.listener)
        for pipe in self._pipes(direction):
            pipe.mend()
        self._tell()

    # What happens once.

    def reset(self) -> None:
        """Lose all connections: both sides get RST at once, whatever else holds; what is underway is lost."""
        self._check_open()
        for connection in list(self._connections):
            connection.close(is_reset=True)

    def hang_up(self) -> None:
        """End all connections as if both sides had closed them now: FIN, behind what is underway, if the faults let it."""
        for pipe in self._pipes("both"):
            pipe.put(Mark.FIN)

    def half_close(self, direction: Literal["to_server", "to_client"]) -> None:
        """End one direction of all connections: FIN, behind what is underway. What its sender sends later is lost.

        The other direction goes on.
        """
        if _which(direction) == _which("both"):
            raise ValueError("half a close is 'to_server' or 'to_client', not 'both': that is hang_up()")
        for pipe in self._pipes(direction):
            pipe.put(Mark.FIN)

    def corrupt(self, direction: Direction = "both", *, skip: int = 0) -> None:
        """Invert the bits of one byte: the next that passes, whichever connection's it is, or the one `skip` bytes after it."""
        if isinstance(skip, bool) or not isinstance(skip, int):
            raise TypeError(f"skip is a number of bytes, not {skip!r}")
        if skip < 0:
            raise ValueError(f"skip is 0 or more bytes, not {skip}: what has passed has passed")
        for faults in self._at(direction):
            faults.corrupt(skip)

    # What to assert.

    @property
    def connections(self) -> int:
        """The count of open connections."""
        return len(self._connections)

    @property
    def bytes_to_server(self) -> int:
        """Bytes passed on to the target so far, over all connections."""
        return self._faults[0].passed

    @property
    def bytes_to_client(self) -> int:
        """Bytes passed on to clients so far, over all connections."""
        return self._faults[1].passed

    @property
    def bytes_lost(self) -> int:
        """Bytes swallowed so far, by cuts and behind ends; not those that were underway in a connection that was reset."""
        return sum(faults.lost for faults in self._faults)

    # The end.

    def close(self) -> None:
        """Reset all connections and end the link; nothing of it is left afterwards. Once more does nothing."""
        if self._closed:
            return
        greenlets = [self._acceptor, *(each for connection in self._connections for each in connection.greenlets)]
        self.refuse()
        self.reset()
        self._entrance.close()
        self._closed = True
        gevent.killall(greenlets)

    @property
    def closed(self) -> bool:
        """Return whether close() was called."""
        return self._closed

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "refusing" if self._entrance.listener is None else "open"
        to_server, to_client = self._faults
        return (
            f"<FaultyLink {state} {self.endpoint} -> {self.target} connections={self.connections} accepted={self.accepted}"
            f" to_server={to_server} ({to_server.passed} B) to_client={to_client} ({to_client.passed} B)"
            f" lost={self.bytes_lost} B>"
        )

    # Inside.

    def _accept(self, listener: Any) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError as error:
                self._seldom.say(log, logging.WARNING, "%s could not accept a connection: %s", self.endpoint, error)
                gevent.sleep(ACCEPT_AGAIN)
                continue
            send_at_once(client)
            self.accepted += 1
            self._connections.add(Connection(client, self._dial, self._faults, self._connections.discard))

    def _dial(self) -> Any:
        return dial(self.target)

    def _at(self, direction: Direction) -> tuple[Faults, ...]:
        self._check_open()
        return tuple(self._faults[each] for each in _which(direction))

    def _pipes(self, direction: Direction) -> list[Pipe]:
        self._check_open()
        which = _which(direction)
        return [connection.pipes[each] for connection in self._connections for each in which]

    def _tell(self) -> None:
        for pipe in self._pipes("both"):
            pipe.look_again()

    def _check_open(self) -> None:
        check_here(self._hub, "a command of a FaultyLink", "call it in the thread that made the link")
        if self._closed:
            raise RuntimeError(f"this link was closed: {self!r}")


def _which(direction: Direction) -> tuple[int, ...]:
    """Return the places of a direction's faults and pipes in the pairs of both."""
    if direction not in _WHICH:
        raise ValueError(f"a direction is one of {', '.join(map(repr, _WHICH))}, not {direction!r}")
    return _WHICH[direction]


def _check_number(value: float, rule: str, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{rule}, not {value!r}")
    if not (math.isfinite(value) and value >= minimum and value > above):
        raise ValueError(f"{rule}, not {value!r}")
