"""Tests of greensafe.client.problems."""

from __future__ import annotations

import zmq

from greensafe.client.problems import LOST, NO_ANSWER, NO_HANDSHAKE, SILENT, WRONG_TYPE, refusal
from greensafe.errors import Disconnected, PeerSilent, Refused
from greensafe.transport.monitor import ConnectionEvent

ID = bytes(range(16))


def test_error() -> None:
    """Each request's error names the endpoint, what happened, the request, and whether it may have run."""
    error = LOST.error("tcp://a:1", ID, True)
    assert type(error) is Disconnected
    assert (error.endpoint, error.request_id, error.maybe_executed) == ("tcp://a:1", ID.hex(), True)
    assert str(error) == f"tcp://a:1: {LOST.message}"
    assert not LOST.error("tcp://a:1", ID, False).maybe_executed


def test_silence() -> None:
    """PeerSilent says what is silent, or that nobody knows."""
    for what in ("link", "process", "hub", None):
        error = SILENT[what or "server"].error("tcp://a:1", ID, True)
        assert isinstance(error, PeerSilent)
        assert error.silent == what


def test_refusal() -> None:
    """Wrong credentials and a broken handshake are told apart; neither gets better by waiting."""
    denied = refusal(ConnectionEvent(zmq.Event.HANDSHAKE_FAILED_AUTH, 400, "tcp://a:1"))
    broken = refusal(ConnectionEvent(zmq.Event.HANDSHAKE_FAILED_PROTOCOL, 0, "tcp://a:1"))
    assert denied.kind is broken.kind is Refused
    assert denied.is_refusal
    assert broken.is_refusal
    assert WRONG_TYPE.is_refusal
    assert not NO_ANSWER.is_refusal
    assert not NO_HANDSHAKE.is_refusal
    assert "400" in denied.message
    assert "security" in broken.message
