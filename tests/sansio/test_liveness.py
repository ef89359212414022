"""Tests of greensafe.sansio.liveness, with what the kernel was seen to count in each case."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from greensafe.sansio.liveness import (
    LONG,
    LOOKS,
    MARGIN,
    SILENT_LOOKS,
    SLOWEST,
    SLOWEST_UNCOUNTED,
    WORDLESS,
    Pulse,
    Sample,
    explains,
    looks_allowed,
)

#: Bytes of a ZMTP PING and of its PONG, on the wire.
PING, PONG = 9, 7


class _Tcp:
    """A connection, looked at once in each interval of a limit of 5 seconds; libzmq sends a PING in each."""

    def __init__(self) -> None:
        self.pulse = Pulse(5.0)
        self.now = 0.0
        self.sample = Sample(received=100, acked=100, waiting=0, unacked=0)

    def look(self, after: float = 1.0, **changes: int) -> str | None:
        """The next look; `changes` are added to received and acked, and put in the place of waiting and unacked."""
        self.now += after
        received, acked, waiting, unacked, _ = self.sample
        self.sample = Sample(
            received + changes.get("received", 0),
            acked + changes.get("acked", 0),
            changes.get("waiting", waiting),
            changes.get("unacked", unacked),
        )
        return self.pulse.look(self.sample, self.pulse.is_late(self.now))


def test_an_idle_peer_that_is_alive() -> None:
    """A PONG a second is enough, for as long as one likes."""
    tcp = _Tcp()
    assert [tcp.look(received=PONG, acked=PING) for _ in range(1000)] == [None] * 1000


def test_a_stopped_process() -> None:
    """SIGSTOP: the kernel acknowledges every PING and nothing comes back: "process" at the third look without a byte."""
    tcp = _Tcp()
    tcp.look(received=PONG, acked=PING)
    assert [tcp.look(acked=PING) for _ in range(3)] == [None, None, "process"]
    assert tcp.now == 4.0  # within the limit of 5


def test_a_cut_link() -> None:
    """Nothing is acknowledged any more: "link"."""
    tcp = _Tcp()
    tcp.look(received=PONG, acked=PING)
    assert [tcp.look(unacked=number) for number in (1, 2, 3)] == [None, None, "link"]


def test_what_nobody_acknowledges() -> None:
    """Three looks in a row show that not even something in between takes what is sent; any acknowledgement disproves it."""
    tcp = _Tcp()
    tcp.look(received=PONG, acked=PING)
    found = []
    for changes in ({"unacked": 1}, {"acked": PING, "unacked": 1}, *({"unacked": 1},) * 3, {"acked": PING}):
        tcp.look(**changes)
        found.append(tcp.pulse.is_cut)
    assert found == [False] * 4 + [True, False]


def test_a_ping_that_was_sent_this_moment() -> None:
    """That it is not acknowledged yet does not make a stopped process a cut link."""
    tcp = _Tcp()
    tcp.look(received=PONG, acked=PING)
    assert [tcp.look(acked=PING, unacked=1) for _ in range(3)] == [None, None, "process"]


def test_a_long_download() -> None:
    """50 MB in one frame at 1 MB/s: no PONG can come between, but bytes do, in each of 50 seconds."""
    tcp = _Tcp()
    assert [tcp.look(received=1_000_000, acked=0, waiting=PING) for _ in range(50)] == [None] * 50


def test_a_long_upload() -> None:
    """50 MB at 1 MB/s the other way: the peer reads and cannot answer a PING that stands behind the frame."""
    tcp = _Tcp()
    tcp.look(waiting=50_000_000, unacked=10)
    left = range(49_000_000, 0, -1_000_000)
    assert [tcp.look(acked=1_000_000, waiting=waiting, unacked=10) for waiting in left] == [None] * 49


@pytest.mark.parametrize(("unacked", "silent"), [(0, "process"), (12, "link")])
def test_an_upload_that_stops(unacked: int, silent: str) -> None:
    """Stopped in the middle of an upload: a kernel whose window is full has nothing to acknowledge any more."""
    tcp = _Tcp()
    tcp.look(waiting=50_000_000, unacked=10)
    tcp.look(acked=4_000_000, waiting=46_000_000, unacked=unacked)
    assert [tcp.look() for _ in range(4)] == [None, None, None, silent]


def test_buffers_on_the_way() -> None:
    """What took long to leave may take as long to arrive: so many looks more, up to one more limit, until a PONG is back."""
    tcp = _Tcp()
    tcp.look(waiting=50_000_000, unacked=10)
    for waiting in range(19_000_000, 0, -1_000_000):
        tcp.look(acked=1_000_000, waiting=waiting, unacked=10)
    assert [tcp.look() for _ in range(8)] == [None] * 7 + ["link"]
    assert tcp.look(received=PONG) is None
    assert [tcp.look() for _ in range(3)] == [None, None, "link"]


def test_the_last_bytes_of_an_upload() -> None:
    """The look at which nothing waits any more still shows life; from there on acknowledged PINGs prove nothing."""
    tcp = _Tcp()
    tcp.look(waiting=500_000, unacked=10)
    assert tcp.look(acked=500_000, waiting=0, unacked=0) is None
    assert [tcp.look(acked=PING) for _ in range(4)] == [None, None, None, "process"]


def test_a_process_that_was_itself_away() -> None:
    """A look that comes late judges nothing and begins anew: the peer gets three more."""
    tcp = _Tcp()
    tcp.look(received=PONG)
    assert [tcp.look(), tcp.look()] == [None, None]
    assert tcp.look(after=60.0) is None
    assert [tcp.look() for _ in range(3)] == [None, None, "process"]


def test_a_timer_that_fires_twice_after_a_pause() -> None:
    """As libev's does: the second look is none, though nothing has come, and the peer gets three in their time."""
    tcp = _Tcp()
    tcp.look(received=PONG)
    assert tcp.look(after=60.0) is None
    assert tcp.pulse.is_early(tcp.now + 0.01)
    assert tcp.look(after=0.01) is None  # who looks all the same
    assert [tcp.look() for _ in range(3)] == [None, None, "process"]


def test_looks_that_come_soon_after_one_another() -> None:
    """However many there are, what counts is how long nothing was heard: three of five looks' time, less a half."""
    tcp = _Tcp()
    tcp.look(received=PONG)
    assert [tcp.look(after=0.125) for _ in range(19)] == [None] * 19
    assert tcp.look(after=0.125) == "process"


@given(st.lists(st.integers(0, 80), max_size=40))
def test_no_verdict_before_its_time(eighths: list[int]) -> None:
    """However late, or how many at once, looks come: a verdict only after 2.5 looks' time in which none was late."""
    tcp = _Tcp()
    tcp.look(received=PONG)
    since = tcp.now
    for gap in eighths:
        silent = tcp.look(after=gap / 8)
        if gap > 16:
            since = tcp.now
        assert silent is None or tcp.now - since >= SILENT_LOOKS - MARGIN


def test_another_connection() -> None:
    """What was counted of the last one is forgotten; when the next look is due is not."""
    tcp = _Tcp()
    tcp.look(received=PONG)
    assert [tcp.look(), tcp.look()] == [None, None]
    tcp.pulse.renew()
    assert [tcp.look() for _ in range(4)] == [None, None, None, "process"]
    tcp.pulse.renew()
    assert tcp.pulse.is_early(tcp.now + 0.1)
    assert tcp.pulse.is_late(tcp.now + 10)


def test_what_is_early() -> None:
    """Less than half an interval after the look before; the first is never early, nor is the first after looks had ended."""
    pulse = Pulse(5.0)
    assert not pulse.is_early(100.0)
    assert not pulse.is_late(100.0)
    assert [pulse.is_early(now) for now in (100.0, 100.49, 100.5, 200.0)] == [True, True, False, False]
    pulse.rest()
    assert not pulse.is_early(100.1)


def test_who_was_away() -> None:
    """As long as a look is overdue, and for an interval after one that was late; not when nobody was to look."""
    pulse = Pulse(5.0)
    assert not pulse.was_away(100.0)
    pulse.rest(100.0)
    assert [pulse.was_away(now) for now in (101.0, 102.0, 102.1)] == [False, False, True]
    assert pulse.is_late(103.0)
    assert [pulse.was_away(now) for now in (103.0, 103.9, 104.0)] == [True, True, False]
    pulse.rest()
    assert not pulse.was_away(1000.0)


def test_what_is_late() -> None:
    """More than two intervals after the look before; the first is never late."""
    pulse = Pulse(5.0)
    assert [pulse.is_late(now) for now in (100.0, 101.0, 103.0, 105.01, 106.0)] == [False, False, False, True, False]


def test_the_first_look_after_a_rest_can_be_late_too() -> None:
    """A process that was stopped before it had looked once is not judged for what it could not hear."""
    pulse = Pulse(5.0)
    pulse.rest(100.0)
    assert not pulse.is_late(101.0)
    pulse.rest(101.0)
    assert pulse.is_late(104.0)


def test_rest() -> None:
    """What happens while nobody waits is not judged: neither the silence nor the pause between the looks."""
    tcp = _Tcp()
    tcp.look()
    assert [tcp.look(), tcp.look()] == [None, None]
    tcp.pulse.rest()
    assert not tcp.pulse.is_late(tcp.now + 3600.0)
    assert [tcp.look(after=3600.0), tcp.look(), tcp.look(), tcp.look()] == [None, None, None, "process"]


def test_nobody_counts() -> None:
    """Of a peer that cannot be counted (of ZMTP 2, which knows no PING) there is no verdict from here."""
    pulse = Pulse(5.0)
    assert [pulse.look(None, pulse.is_late(float(now))) for now in range(100)] == [None] * 100


def test_messages_are_counted() -> None:
    """Where nobody counts bytes (ipc, another system) a message is a sign of life; however many come, none is a long one."""
    pulse = Pulse(5.0)
    found = []
    for now, count in enumerate((0, 1, 1001, 1001, 1001, 1001)):
        found.append(pulse.look(Sample.of_messages(count), pulse.is_late(float(now))))
        assert not pulse.is_busy
    assert found == [None] * 5 + ["process"]


@given(st.lists(st.booleans(), max_size=60))
def test_never_early_never_late(heard: list[bool]) -> None:
    """Whatever is heard and when: a verdict exactly when `SILENT_LOOKS` looks in a row have seen nothing."""
    tcp = _Tcp()
    tcp.look()
    silent = 0
    for is_heard in heard:
        silent = 0 if is_heard else silent + 1
        verdict = tcp.look(received=PONG * is_heard, acked=PING)
        assert (verdict is not None) == (silent >= SILENT_LOOKS)


def test_the_process_is_judged_before_the_hub() -> None:
    """A stopped process has said nothing for at most 4 looks when it is found, and a missing WORKING is judged after 4."""
    assert math.isclose((SILENT_LOOKS + 1) / LOOKS, WORDLESS)
    assert WORDLESS < 1


def test_a_long_message_on_its_way() -> None:
    """It is seen in bytes that are no PONG and of which no message was taken; in an upload, until its PONG is back."""
    tcp = _Tcp()
    tcp.look()
    busy = []
    for changes in ({"received": PONG}, {"received": 100_000}, {"received": 200_000}, {"received": PONG}, {}):
        tcp.look(**changes)
        busy.append(tcp.pulse.is_busy)
    assert busy == [False, True, True, False, False]
    tcp.look(waiting=1_000_000)
    assert not tcp.pulse.is_busy
    for changes in ({"acked": 500_000, "waiting": 500_000}, {"acked": 500_000, "waiting": 0}, {"acked": PING}):
        tcp.look(**changes)
        assert tcp.pulse.is_busy
    tcp.look(received=PONG)
    assert not tcp.pulse.is_busy


def test_messages_that_were_taken_do_not_make_a_connection_busy() -> None:
    """However many small ones arrive, the silence about another request counts."""
    pulse = Pulse(5.0)
    for number in range(20):
        pulse.look(Sample(received=number * 5_000, acked=0, waiting=0, unacked=0, taken=number * 5_000), late=False)
        assert not pulse.is_busy


def test_a_silence_that_is_forgiven() -> None:
    """It begins to count anew, and is known since when it lasts, until a sign of life."""
    tcp = _Tcp()
    tcp.look(received=PONG, acked=PING)
    for _ in range(2):
        assert [tcp.look(acked=PING) for _ in range(3)] == [None, None, "process"]
        tcp.pulse.forgive()
    assert tcp.pulse.quiet_since == 2.0
    tcp.look(received=PONG)
    assert tcp.pulse.quiet_since is None
    tcp.look()
    assert tcp.pulse.quiet_since == tcp.now


@pytest.mark.parametrize("after", [1.0, 60.0])
def test_what_ends_a_silence(after: float) -> None:
    """Besides bytes received: acknowledgements while more waits to be sent, a look that comes late, and a rest."""
    tcp = _Tcp()
    tcp.look(waiting=1_000_000)
    tcp.look()
    assert tcp.pulse.quiet_since is not None
    tcp.look(after=after, acked=500_000)
    assert tcp.pulse.quiet_since is None
    tcp.look()
    tcp.pulse.rest()
    assert tcp.pulse.quiet_since is None


def test_what_is_under_way_explains_a_silence() -> None:
    """For as long as it takes at the least rate, and nothing explains none."""
    assert explains(4_000_000, 4_000_000 / SLOWEST - 1)
    assert not explains(4_000_000, 4_000_000 / SLOWEST)
    assert not explains(0, 0.0)
    assert not explains(4_000_000, 4_000_000 / SLOWEST_UNCOUNTED, SLOWEST_UNCOUNTED)


def test_looks_for_a_second_connection() -> None:
    """One while little is under way: the verdict comes within the limit. Else one limit more, with those given before."""
    assert SILENT_LOOKS + 1 + looks_allowed(LONG - 1, 0) <= LOOKS
    assert [looks_allowed(LONG, owed) for owed in range(LOOKS + 1)] == [5, 4, 3, 2, 1, 1]
    assert SILENT_LOOKS + 1 + LOOKS + looks_allowed(LONG, LOOKS) <= 2 * LOOKS
