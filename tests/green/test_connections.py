"""Tests of greensafe.green._connections: sequences of events as libzmq emits them, without a socket."""

from __future__ import annotations

import errno

import pytest
from zmq import Event

from greensafe.green._connections import YOUNG, Connections, Loss
from greensafe.transport.monitor import ConnectionEvent

A, B = "tcp://a:1", "tcp://b:2"


class Fed(Connections):
    """Connections that are told what happens in short words, a second apart."""

    def __init__(self, total: int = 1, in_order: bool = True) -> None:
        super().__init__(in_order)
        self.total = total
        self.now = 0.0

    def feed(self, *kinds: str, fd: int = 7, endpoint: str = A, value: int | None = None, step: float = 1.0) -> Fed:
        names = {"up": "HANDSHAKE_SUCCEEDED", "failed": "HANDSHAKE_FAILED_NO_DETAIL", "retried": "CONNECT_RETRIED"}
        for kind in kinds:
            self.now += step
            self.on_event(
                ConnectionEvent(Event[names.get(kind, kind.upper())], fd if value is None else value, endpoint), self.now
            )
        return self


def test_lost_only_after_the_event_that_follows() -> None:
    """DISCONNECTED comes before the last reply is handed over; the next event comes after."""
    fed = Fed().feed("connected", "up")
    fed.on_request()
    fed.feed("disconnected")
    assert (fed.loss, fed.is_unsettled) == (None, True)
    fed.feed("retried")
    assert fed.loss == Loss(A, True, 2.0)
    assert not fed.is_unsettled


def test_a_reply_that_is_read_in_between_wins() -> None:
    """Then nothing is lost, and the next request waits for the next connection."""
    fed = Fed().feed("connected", "up")
    fed.on_request()
    fed.feed("disconnected")
    fed.on_reply()
    fed.on_request()
    fed.feed("retried", "connect_delayed", "connected", "up")
    assert fed.loss is None
    fed.feed("disconnected", "retried")
    assert fed.loss is not None


def test_a_request_that_nobody_has_taken_waits() -> None:
    """Refused connections, and peers that hang up before they speak, are nobody."""
    fed = Fed()
    fed.on_request()
    fed.feed("connect_delayed", "closed", "retried")
    for _ in range(3):
        fed.feed("connect_delayed", "connected", "failed", value=errno.EPIPE, step=0.001)
        fed.feed("disconnected", value=errno.EPIPE, step=0.001)
        fed.feed("retried")
    assert fed.loss is None
    assert not fed.is_stopped


def test_a_connection_known_to_be_dead_does_not_carry_the_next_request() -> None:
    """Sent after DISCONNECTED was seen, it is for the next connection."""
    fed = Fed().feed("connected", "up", "disconnected")
    fed.on_request()
    fed.feed("retried")
    assert fed.loss is None


def test_what_follows_nothing_is_settled_by_the_clock() -> None:
    """A session that a protocol error has ended is not retried: lost, and connected anew only by a reset."""
    fed = Fed().feed("connected", "up")
    fed.on_request()
    fed.feed("disconnected")
    fed.settle()
    assert fed.loss == Loss(A, True, 2.0)
    assert fed.is_stopped
    fed.on_reset()
    assert not fed.is_stopped


@pytest.mark.parametrize("how", [(), ("handshake_failed_auth",), ("handshake_failed_protocol",)])
def test_refused(how: tuple[str, ...]) -> None:
    """Wrong socket type, authentication, mechanism: no try follows, nothing was delivered."""
    fed = Fed()
    fed.on_request()
    fed.feed("connected", *how, "disconnected")
    assert fed.loss == Loss(A, False, 0.0)


def test_refused_before_the_request_was_sent() -> None:
    """Then the socket has to be connected anew before."""
    fed = Fed().feed("connected", "handshake_failed_auth", "disconnected")
    assert (fed.loss, fed.is_stopped) == (None, True)


@pytest.mark.parametrize(
    ("age", "value", "lost"), [(YOUNG, errno.EPIPE, True), (0.01, errno.EPIPE, False), (30, errno.EAGAIN, False)]
)
def test_zmtp_2(age: float, value: int, lost: bool) -> None:
    """A ZMTP 2 peer's end looks like a failed handshake; hanging up at once and saying nothing until HANDSHAKE_IVL do too."""
    fed = Fed().feed("connected")
    fed.on_request()
    fed.feed("failed", value=value, step=age)
    fed.feed("disconnected", step=0)
    fed.feed("retried")
    assert (fed.loss is not None) is lost


def test_a_reply_proves_a_zmtp_2_peer() -> None:
    """Whoever has replied has finished its handshake, however young the connection."""
    fed = Fed().feed("connected")
    fed.on_request()
    fed.on_reply()
    fed.on_request()
    fed.feed("failed", value=errno.EPIPE, step=0.001)
    fed.feed("disconnected", "retried", step=0)
    assert fed.loss is not None


def test_an_old_connection_is_superseded() -> None:
    """A reset emits no DISCONNECTED, and what is read late of the connection before must not hide the end of the new one."""
    fed = Fed().feed("connected", "up")
    fed.on_reset()
    fed.feed("connected")
    fed.feed("connected", "up", fd=8)
    fed.on_request()
    fed.feed("disconnected", "retried", fd=8)
    assert fed.loss is not None


def test_an_unknown_descriptor_means_nothing() -> None:
    """DISCONNECTED of a connection that was reset is ignored."""
    fed = Fed().feed("connected", "up")
    fed.on_reset()
    fed.on_request()
    fed.feed("disconnected", "retried")
    assert fed.loss is None


def test_several_endpoints() -> None:
    """Lost only when none is left that may carry it; one that came back does not, one that came first since does."""
    fed = Fed(2).feed("connected", "up").feed("connected", "up", fd=8, endpoint=B)
    fed.on_request()
    fed.feed("disconnected", "retried", "connected", "up")
    assert fed.loss is None
    fed.feed("disconnected", "retried", fd=8, endpoint=B)
    assert fed.loss is not None
    fed = Fed(2).feed("connected", "up")
    fed.on_request()
    fed.feed("connected", "up", fd=8, endpoint=B)
    fed.feed("disconnected", "retried")
    assert fed.loss is None


def test_several_endpoints_refused() -> None:
    """Refused is the request only when every endpoint refuses."""
    fed = Fed(2)
    fed.on_request()
    fed.feed("connected", "handshake_failed_auth", "disconnected")
    assert fed.loss is None
    fed.feed("connected", "handshake_failed_auth", "disconnected", fd=8, endpoint=B)
    assert fed.loss == Loss(B, False, 0.0)


def test_one_endpoint_by_two_names() -> None:
    """libzmq writes a host's name at the first try and its address at the next."""
    fed = Fed().feed("connected", "up", endpoint="tcp://localhost:1")
    fed.on_request()
    fed.feed("disconnected", endpoint="tcp://localhost:1")
    fed.feed("retried", endpoint="tcp://127.0.0.1:1")
    assert fed.loss is not None


def test_several_io_threads() -> None:
    """Events come out of order: a handshake before its connection, and only a retry settles what was lost."""
    fed = Fed(in_order=False).feed("up", "connected")
    fed.on_request()
    fed.feed("disconnected", "connect_delayed")
    assert fed.loss is None
    fed.feed("retried")
    assert fed.loss is not None
    fed = Fed(in_order=False).feed("up")
    fed.on_request()
    fed.feed("disconnected", "connected", "retried")
    assert fed.loss is not None


def test_disconnected_by_the_program() -> None:
    """libzmq emits nothing of it: the connection is forgotten."""
    fed = Fed(2).feed("connected", "up").feed("connected", "up", fd=8, endpoint=B)
    fed.total = 1
    fed.forget(B)
    fed.on_request()
    fed.feed("disconnected", "retried")
    assert fed.loss is not None
    assert "up of 0" in repr(fed)


# What libzmq cannot begin to connect to.


def test_what_cannot_be_begun_is_lost() -> None:
    """CONNECT_RETRIED without CLOSED or DISCONNECTED before it: nobody will ever get the request that waits."""
    fed = Fed().feed("retried")
    assert fed.loss is None
    fed.on_request()
    fed.feed("retried")
    assert fed.loss == Loss(A, False, 0.0, has_begun=False)
    fed.on_reset()
    fed.on_request()
    assert fed.loss is None
    fed.feed("retried")
    assert fed.loss is not None


def test_what_was_begun_once_may_be_begun_again() -> None:
    """An endpoint that was stuck and is refused, or connected to, is one like any other."""
    fed = Fed(total=2)
    fed.on_request()
    fed.feed("retried").feed("closed", "retried")
    fed.feed("retried", endpoint=B).feed("connected", "up", endpoint=B)
    assert fed.loss is None


def test_only_when_nothing_else_is_left() -> None:
    """With several endpoints, all of them."""
    fed = Fed(total=2)
    fed.on_request()
    fed.feed("retried")
    assert fed.loss is None
    fed.feed("retried", endpoint=B)
    assert fed.loss == Loss(B, False, 0.0, has_begun=False)


def test_what_follows_a_reset_is_about_what_was_before() -> None:
    """CLOSED was read before the reset and its CONNECT_RETRIED comes after: that tells nothing of the new attempt."""
    fed = Fed()
    fed.on_request()
    fed.feed("closed")
    fed.on_reset()
    fed.on_request()
    fed.feed("retried", "connect_delayed", "closed", "retried")
    assert fed.loss is None
