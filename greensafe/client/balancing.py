"""Which of several servers is a request given to, and is there any hope that one will take it?

Decisions only: who asks does what follows from them. They look at what the channels know, and at the request's own past: whose
servers have rejected it, and for which journal alone it may have run.

It does not know what becomes of a request that nobody takes; see `failover`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PeerSilent, Refused
from ..sansio.envelope import NO_JOURNAL
from .call import Call
from .channel import Channel
from .problems import DRAINING, Trouble

__all__ = ["choose", "hopeless", "keepers"]

#: What waiting does not help against.
_FINAL = frozenset({Refused, PeerSilent})


def choose(channels: Sequence[Channel], call: Call, retries: int) -> Channel | None:
    """The usable channel with the fewest requests in flight.

    With retries, one of which nothing was heard yet gets a single request: the others need no retry if it is dead. One of
    which nobody knows whether it is up (inproc) comes after all that are.
    """
    best: Channel | None = None
    for channel in channels:
        connection = channel.connection
        if not channel.is_up or connection.is_draining or (call.avoids and channel in call.avoids):
            continue
        if retries and connection.sent and not connection.is_heard:
            continue
        if call.asked.journal is not NO_JOURNAL and not channel.keeps(call.asked.journal):
            continue
        if best is None or (channel.is_blind, channel.load) < (best.is_blind, best.load):
            best = channel
    return best


def keepers(channels: Sequence[Channel], call: Call) -> Sequence[Channel]:
    """The channels that may take this request: all, if it is not for one journal alone."""
    asked = call.asked
    return [channel for channel in channels if channel.keeps(asked.journal)] if asked.is_bound else channels


def hopeless(channels: Sequence[Channel], waits_for_servers: bool, is_bound: bool = False) -> tuple[Channel, Trouble] | None:
    """Why nobody can be expected at any of these, None as long as somebody can.

    Args:
        channels: Those to look at.
        waits_for_servers: Whether a server that is not there yet, or stops, can be expected back.
        is_bound: Whether the request is for one journal alone. Its server was there, so whatever accepts connections in its
            place and does not answer as a ZeroMQ server (a load balancer, socket activation) says only that it is away.
    """
    is_expected_back = waits_for_servers and is_bound
    found: tuple[Channel, Trouble] | None = None
    for channel in channels:
        trouble = DRAINING if channel.is_up and channel.connection.is_draining else channel.trouble
        if trouble is None:
            return None
        if waits_for_servers and trouble.kind not in _FINAL:
            return None
        if is_expected_back and not trouble.is_refusal:
            return None
        found = found or (channel, trouble)
    return found
