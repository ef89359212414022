"""What has happened to a connection, and which error do those who asked by it get?

A `Trouble` is what is said of all requests alike, a `Loss` what the end of a connection has cost. It does not know how either
is found out; see `channel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import zmq

from ..errors import Disconnected, PeerError, PeerSilent, Refused, Unreachable
from ..sansio.requester import Asked, Connection
from ..transport.monitor import ConnectionEvent

__all__ = [
    "DRAINING",
    "FORGOTTEN",
    "LOST",
    "NOBODY",
    "NO_ANSWER",
    "NO_HANDSHAKE",
    "SILENT",
    "STUCK",
    "TORN",
    "UNANSWERED",
    "UNASKED",
    "WRONG_TYPE",
    "Loss",
    "Trouble",
    "refusal",
]


class Trouble(NamedTuple):
    """Why requests cannot be handed over, or were lost; the error for each is made of it.

    Attributes:
        kind: The error's class.
        message: What happened.
        silent: As in PeerSilent.
        is_refusal: A ZeroMQ server was there and said no. False: nobody has answered as one, so the server may only be away.
    """

    kind: type[PeerError]
    message: str
    silent: str | None = None
    is_refusal: bool = False

    def error(self, endpoint: str, request_id: bytes, maybe_executed: bool) -> PeerError:
        details: dict[str, Any] = {"silent": self.silent} if self.kind is PeerSilent else {}
        return self.kind(
            f"{endpoint}: {self.message}",
            endpoint=endpoint,
            maybe_executed=maybe_executed,
            request_id=request_id.hex(),
            **details,
        )


class Loss(NamedTuple):
    """What the end of a connection, or of a server behind it, has cost.

    Attributes:
        trouble: What happened.
        lost: The requests that may have been run: open, and off any connection.
        unsent: Those that were provably not run: not handed over, or not received by a server that has said when it closed.
        connection: What was known of it.
    """

    trouble: Trouble
    lost: list[Asked]
    unsent: list[Asked]
    connection: Connection


LOST = Trouble(Disconnected, "the connection that carried the request is gone")
TORN = Trouble(Disconnected, "a message was not received whole, here or at the server: this request, or its answer")
NOBODY = Trouble(Unreachable, "nobody can be reached there")
NO_HANDSHAKE = Trouble(
    Unreachable, "somebody is there, but the handshake fails: is it a ZeroMQ server, and are the CURVE keys right?"
)
NO_ANSWER = Trouble(
    PeerSilent,
    "the connection stands, but nobody answers the handshake: the process is stopped, or not a ZeroMQ server",
    "process",
)
WRONG_TYPE = Trouble(
    Refused, "the socket there is of a type that does not answer requests: it has to be a REP or ROUTER", is_refusal=True
)
SILENT = {
    "link": Trouble(PeerSilent, "nothing comes through: the network is cut, or the machine is down", "link"),
    "process": Trouble(
        PeerSilent,
        "what is sent arrives, but the process there gives no sign of life: it is stopped, or cut off behind a proxy",
        "process",
    ),
    "hub": Trouble(
        PeerSilent,
        "the server no longer says that it works on the request: its event loop is blocked, or it is gone behind a proxy",
        "hub",
    ),
    "server": Trouble(
        PeerSilent,
        "the server does not say that it works on the request: its event loop is blocked, its process does not run, or a long"
        " message takes longer than the heartbeat limit (then set a higher one)",
    ),
}
#: The first two, if a long message was under way: then what takes it need not be the server's own machine.
UNANSWERED = {
    "link": SILENT["link"],
    "process": Trouble(
        PeerSilent,
        "what is sent is taken, but no sign of life comes back, nor did a second connection get a handshake in time:"
        " the process there does not answer, or something in between does not reach it",
        "process",
    ),
}
#: The same, if this process had no descriptor or socket to spare for a second connection.
UNASKED = {
    "link": SILENT["link"],
    "process": Trouble(
        PeerSilent,
        "what is sent is taken, but no sign of life comes back, and no second connection could be made here to see whether the"
        " server is there",
        "process",
    ),
}
STUCK = Trouble(
    PeerSilent,
    "no sign of life comes back for longer than what is under way explains, though a second connection got its handshake:"
    " something in between does not pass this connection's messages on",
    "process",
)
FORGOTTEN = Trouble(
    PeerSilent,
    "nothing that is sent is acknowledged, though a second connection got its handshake: something in between (a firewall, a"
    " load balancer) has forgotten this connection",
    "link",
)
DRAINING = Trouble(Unreachable, "the server there is stopping")


def refusal(event: ConnectionEvent) -> Trouble:
    """What a handshake that failed for good says."""
    if event.kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Trouble(Refused, f"the server refuses this client's credentials (ZAP status {event.value})", is_refusal=True)
    return Trouble(
        Refused,
        "the handshake breaks the protocol: the two sides use different security mechanisms, or other types",
        is_refusal=True,
    )
