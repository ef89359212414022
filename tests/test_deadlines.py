"""Tests of greensafe.deadlines.scope. They know no socket: `check` and `put_back` play its part."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from time import monotonic
from typing import Any

import gevent
import gevent.event
import gevent.queue
import gevent.socket
import pytest
from helpers import LONG, MS, wait_until

from greensafe import Cancelled, DeadlineExceeded, OperationTimeout, deadline, move_on, shield
from greensafe.deadlines import DeadlineSignal, HandlerScope, allowed_until, check, to_seconds

pytestmark = pytest.mark.usefixtures("limit")


def _has_no_scope() -> bool:
    return deadline.current() is None and "_greensafe_scope" not in vars(gevent.getcurrent())


# What a limit may be.


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (math.inf, None),
        (5, 5.0),
        (0, 0.0),
        (-3, 0.0),
        (-math.inf, 0.0),
        (0.25, 0.25),
        (timedelta(milliseconds=250), 0.25),
        (Decimal("0.5"), 0.5),
        (1.7e308, None),
        (10**400, None),
        (-(10**400), 0.0),
    ],
)
def test_limits(given: Any, seconds: float | None) -> None:
    """None and infinity are no limit, 0 and less have passed, timedelta and Decimal are numbers."""
    assert to_seconds(given) == seconds
    assert deadline(given).seconds == seconds


@pytest.mark.parametrize("given", [True, False, "5", b"5", [], object(), 1j])
def test_limits_of_a_wrong_type(given: Any) -> None:
    """What is not a number of seconds is a TypeError that shows it."""
    with pytest.raises(TypeError, match="seconds"):
        deadline(given)


def test_nan_is_refused() -> None:
    """NaN, which gevent.Timeout takes for never, is a ValueError."""
    for make in (lambda: deadline(math.nan), lambda: deadline(Decimal("nan")), lambda: deadline(at=math.nan)):
        with pytest.raises(ValueError, match="NaN"):
            make()


def test_seconds_or_at() -> None:
    """Either seconds or at= is given, and at= is a number."""
    with pytest.raises(TypeError):
        deadline(1, at=2.0)
    with pytest.raises(TypeError):
        deadline(at="soon")  # type: ignore[arg-type]
    assert deadline(at=math.inf).at is None


# Expiry.


def test_it_raises_outside_and_signals_inside() -> None:
    """Inside a BaseException is thrown, outside a TimeoutError is raised."""
    with pytest.raises(DeadlineExceeded) as caught, deadline(5 * MS) as scope:
        try:
            gevent.sleep(LONG)
        except Exception:
            pytest.fail("`except Exception` must not see the signal")
        except BaseException as signal:
            assert isinstance(signal, DeadlineSignal)
            assert signal.scope is scope
            raise
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.seconds == 5 * MS
    assert scope.expired
    assert scope.delivered
    assert _has_no_scope()


def test_never_early() -> None:
    """The signal never comes before its time, whatever the loop rounds."""
    for _ in range(20):
        start = monotonic()
        with move_on(2.3 * MS) as scope:
            gevent.sleep(LONG)
        assert scope.expired
        assert monotonic() - start >= 2.3 * MS


@pytest.mark.parametrize("seconds", [0, -1])
def test_zero_and_negative_have_passed(seconds: float) -> None:
    """A limit of 0 ends the first wait."""
    with pytest.raises(DeadlineExceeded), deadline(seconds):
        gevent.sleep(LONG)


def test_a_block_that_finishes_is_no_error() -> None:
    """A block that finishes late, without waiting, is no error, and the scope has not expired."""
    with deadline(1 * MS) as scope:
        time.sleep(3 * MS)
    assert not scope.expired
    gevent.sleep(2 * MS)  # nothing comes afterwards


@pytest.mark.parametrize("seconds", [3e9, 2**63, 1e300])
def test_limits_beyond_every_clock(seconds: float) -> None:
    """A limit of centuries is one that never comes, whatever the loop counts in; and it is left like any other."""
    with deadline(seconds):
        gevent.sleep(1 * MS)
    assert _has_no_scope()


@pytest.mark.parametrize("at", [1.7e308, 10**400])
def test_times_beyond_all_measure(at: float) -> None:
    """An absolute time that no clock reaches is no limit, and one before every clock has passed; no scope stays."""
    with deadline(at=at) as scope:
        gevent.sleep(1 * MS)
    assert scope.at is None
    with pytest.raises(DeadlineExceeded), deadline(at=-at):
        gevent.sleep(1 * MS)
    assert _has_no_scope()


def test_no_limit() -> None:
    """None and infinity never end a block."""
    with deadline(None) as scope, deadline(math.inf):
        gevent.sleep(1 * MS)
        assert scope.at is None
        assert scope.remaining() == math.inf


def test_at_is_absolute() -> None:
    """deadline(at=) ends at that time, and a child can be given its parent's."""
    with deadline(LONG) as parent:
        seen = []

        def child() -> None:
            seen.append(deadline.current())
            with deadline(at=parent.at) as own:
                seen.append(own.at)

        gevent.spawn(child).join()
    assert seen == [None, parent.at]
    with pytest.raises(DeadlineExceeded), deadline(at=monotonic() + 2 * MS):
        gevent.sleep(LONG)


# Nesting.


def test_nested_the_earliest_counts() -> None:
    """The inner scope is reported if it is earlier, the outer one if that is."""
    with deadline(LONG) as outer:
        with pytest.raises(DeadlineExceeded), deadline(2 * MS) as inner:
            gevent.sleep(LONG)
        assert inner.expired
        assert not outer.expired
    with pytest.raises(DeadlineExceeded), deadline(2 * MS) as outer:
        with deadline(LONG) as inner:
            assert inner.remaining() <= 2 * MS
            assert inner.effective_at == outer.at
            gevent.sleep(LONG)
    assert outer.expired
    assert not inner.expired


def test_the_outermost_due_scope_wins() -> None:
    """After the hub was blocked past both, the outer one ends its block: the inner one has nothing more to do."""
    with pytest.raises(DeadlineExceeded) as caught, deadline(2 * MS) as outer:
        with move_on(1 * MS) as inner:
            time.sleep(6 * MS)
            gevent.sleep(LONG)
        pytest.fail("the inner one took it")
    assert caught.value.seconds == 2 * MS
    assert outer.expired
    assert not inner.expired


@pytest.mark.parametrize("inner_kind", [deadline, move_on])
@pytest.mark.parametrize("swallows", [False, True])
def test_an_inner_scope_does_not_eat_the_signal_of_an_outer_one(inner_kind: type[deadline], swallows: bool) -> None:
    """The inner scope comes due while the outer one's signal is on its way through it: the outer block ends all the same."""
    with pytest.raises(DeadlineExceeded) as caught, deadline(1 * MS) as outer:
        with inner_kind(4 * MS) as inner:
            try:
                gevent.sleep(LONG)
            except DeadlineSignal as signal:
                assert signal.scope is outer
                if not swallows:
                    gevent.sleep(LONG)
            gevent.sleep(LONG)
        pytest.fail("the inner one ate it")
    assert caught.value.seconds == 1 * MS
    assert outer.expired
    assert not inner.expired


def test_a_scope_inside_the_cleanup_of_an_outer_one_ends_by_itself() -> None:
    """One that was entered after the outer signal came limits the cleanup, which then goes on."""
    steps = []
    with pytest.raises(DeadlineExceeded), deadline(1 * MS):
        try:
            gevent.sleep(LONG)
        finally:
            with move_on(1 * MS) as inner:
                gevent.sleep(LONG)
            steps.append(inner.expired)
            gevent.sleep(1 * MS)
            steps.append(True)
    assert steps == [True, True]


def test_gevent_timeouts_around_and_inside() -> None:
    """A plain gevent.Timeout works inside and outside, and each ends its own block only."""
    with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(2 * MS) as foreign, deadline(LONG) as scope:
        gevent.sleep(LONG)
    assert caught.value is foreign
    assert not scope.expired
    with pytest.raises(DeadlineExceeded), gevent.Timeout(LONG), deadline(2 * MS), gevent.Timeout(LONG):
        gevent.sleep(LONG)


def test_out_of_order_exit_is_tolerated() -> None:
    """Scopes that are left in another order than they were entered are unlinked wherever they stand."""
    first, second = deadline(LONG), deadline(LONG)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert deadline.current() is second
    second.__exit__(None, None, None)
    assert _has_no_scope()


# shield and move_on.


def test_move_on_ends_quietly() -> None:
    """move_on ends its block without an error, and `.expired` tells."""
    with move_on(1 * MS) as scope:
        gevent.sleep(LONG)
    assert scope.expired
    with move_on(LONG) as scope:
        pass
    assert not scope.expired


def test_move_on_lets_other_errors_through() -> None:
    """Only its own end is quiet."""
    with pytest.raises(ZeroDivisionError), move_on(LONG):
        _ = 1 / 0


def test_shield_holds_back_and_hands_on() -> None:
    """Inside a shield outer limits do not interrupt; after it they do at the next wait."""
    done = []
    with pytest.raises(DeadlineExceeded), deadline(2 * MS):
        with shield() as inner:
            assert inner.remaining() == math.inf
            gevent.sleep(6 * MS)
            check(False)
            done.append(1)
        gevent.sleep(LONG)
    assert done == [1]


def test_shield_in_cleanup() -> None:
    """Cleanup after a delivered signal can wait inside a shield, with a limit of its own."""
    done = []
    with pytest.raises(DeadlineExceeded), deadline(2 * MS):
        try:
            gevent.sleep(LONG)
        finally:
            with pytest.raises(DeadlineExceeded), shield(3 * MS):
                gevent.sleep(LONG)
            done.append(1)
    assert done == [1]


# Delivery.


def test_a_swallowed_signal_comes_again_from_check() -> None:
    """After delivery an operation without a limit of its own meets the signal again; one with a limit does not."""
    with pytest.raises(DeadlineExceeded), deadline(1 * MS) as scope:
        with contextlib.suppress(BaseException):
            gevent.sleep(LONG)
        assert scope.delivered
        gevent.sleep(2 * MS)  # other people's waits are not limited again
        check(True)
        check(False)
        pytest.fail("check(False) raises")


def test_check_finds_what_is_due_before_the_timer_ran() -> None:
    """A scope whose time has come while the hub was blocked ends an operation of ours before it waits."""
    for limited in (True, False):
        with pytest.raises(DeadlineExceeded), deadline(1 * MS):
            time.sleep(3 * MS)
            check(limited)
            pytest.fail("it is due")


def test_allowed_until() -> None:
    """The earliest end of the scopes around up to a shield, None without any; what is over is raised as `check` does."""
    assert allowed_until(False) is None
    with deadline(LONG) as outer:
        assert allowed_until(False) == outer.at
        with deadline(LONG / 2) as inner:
            assert allowed_until(True) == inner.at
        with deadline(2 * LONG):
            assert allowed_until(True) == outer.at
        with shield():
            assert allowed_until(False) is None
    with pytest.raises(DeadlineExceeded), deadline(1 * MS):
        time.sleep(3 * MS)
        allowed_until(True)
        pytest.fail("it is due")


def test_put_back_delivers_again() -> None:
    """An operation that completed although it was interrupted puts the signal back: the next wait meets it."""
    steps = []
    with pytest.raises(DeadlineExceeded), deadline(1 * MS):
        try:
            gevent.sleep(LONG)
        except DeadlineSignal as signal:
            signal.put_back()
        steps.append("completed")
        gevent.sleep(LONG)
    assert steps == ["completed"]


def test_put_back_after_the_scope_was_left() -> None:
    """Outside of the scope nothing is delivered any more."""
    with move_on(1 * MS):
        try:
            gevent.sleep(LONG)
        except DeadlineSignal as caught:
            signal = caught
            raise
    signal.put_back()
    gevent.sleep(3 * MS)


def test_not_into_a_greenlet_that_has_left() -> None:
    """After the block its limit interrupts nothing."""
    for _ in range(50):
        with contextlib.suppress(DeadlineExceeded), deadline(0):
            pass
    with deadline(1 * MS):
        pass
    gevent.sleep(4 * MS)


def test_readiness_beats_the_limit() -> None:
    """What became ready while the hub was blocked past the limit is delivered, not the limit."""
    left, right = gevent.socket.socketpair()
    event, queue, result = gevent.event.Event(), gevent.queue.Queue(), gevent.event.AsyncResult()
    try:
        for wait, make_ready in (
            (lambda: left.recv(1), lambda: right.send(b"x")),
            (event.wait, event.set),
            (queue.get, lambda: queue.put(1)),
            (result.get, lambda: result.set(1)),
        ):

            def block(make_ready: Any = make_ready) -> None:
                make_ready()
                time.sleep(6 * MS)

            blocker = gevent.spawn(block)
            with deadline(3 * MS):
                assert wait()
            blocker.join()
    finally:
        left.close()
        right.close()


def test_kill_passes_and_wins() -> None:
    """A kill goes through a scope untouched, and beats a limit of the same turn."""

    def run() -> None:
        with deadline(3 * MS):
            gevent.sleep(LONG)

    greenlet = gevent.spawn(run)
    gevent.sleep(0)
    greenlet.kill(block=False)
    time.sleep(6 * MS)
    greenlet.join()
    assert isinstance(greenlet.value, gevent.GreenletExit)


def test_error_in_the_cleanup_wins() -> None:
    """What the cleanup raises instead of the signal is what the block raises."""
    with pytest.raises(ZeroDivisionError), deadline(1 * MS):
        try:
            gevent.sleep(LONG)
        finally:
            _ = 1 / 0
    assert _has_no_scope()


def test_operation_timeout_inside_can_be_caught() -> None:
    """An error of one operation is an Exception inside the block."""
    with deadline(LONG), pytest.raises(OperationTimeout):
        raise OperationTimeout(1, "recv")


# Misuse.


def test_single_use() -> None:
    """A scope limits one block."""
    scope = deadline(LONG)
    with scope, pytest.raises(RuntimeError, match="new one"), scope:
        pass
    with pytest.raises(RuntimeError), scope:
        pass
    assert _has_no_scope()


def test_left_in_another_greenlet() -> None:
    """Leaving it in another greenlet is a RuntimeError, and limits nobody afterwards."""
    scope = deadline(5 * MS)
    scope.__enter__()
    other = gevent.spawn(scope.__exit__, None, None, None)
    with pytest.raises(RuntimeError, match="another greenlet"):
        other.get()
    assert _has_no_scope()
    gevent.sleep(8 * MS)


@pytest.mark.parametrize("spawn", [gevent.spawn, gevent.spawn_raw])
def test_never_left(spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope that a greenlet entered and never left dies with it: nothing is raised in main or reported to the hub."""
    seen: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: seen.append(args))
    scopes = [deadline(1 * MS), deadline(2 * MS)]

    def run() -> None:
        for scope in scopes:
            scope.__enter__()

    spawn(run)
    gevent.sleep(5 * MS)
    assert seen == []
    assert not any(scope.delivered for scope in scopes)


def test_in_the_hub() -> None:
    """In a callback of the loop there is nothing to limit."""
    seen: list[BaseException] = []

    def callback() -> None:
        try:
            with deadline(1):
                pass
        except RuntimeError as error:
            seen.append(error)

    gevent.get_hub().loop.run_callback(callback)
    gevent.sleep(0)
    gevent.sleep(0)
    assert "hub" in str(seen[0])


# Decorator.


def test_decorator_makes_a_scope_per_call() -> None:
    """Each call of a decorated function has the whole time, and passes arguments and result through."""

    scopes: list[deadline | None] = []

    @deadline(LONG)
    def limited(seconds: float, *, answer: int = 0) -> int:
        scopes.append(deadline.current())
        gevent.sleep(seconds)
        return answer

    for number in range(3):
        start = monotonic()
        assert limited(2 * MS, answer=42) == 42
        scope = scopes[number]
        assert scope is not None
        assert scope not in scopes[:number]
        assert scope.at is not None
        assert scope.at >= start + LONG
    assert limited.__name__ == "limited"
    with pytest.raises(DeadlineExceeded):
        deadline(2 * MS)(limited)(LONG)

    @move_on(1 * MS)
    def quiet() -> None:
        gevent.sleep(LONG)

    quiet()


def test_decorator_refuses_what_does_not_run_when_called() -> None:
    """A generator or a coroutine runs later, outside of the scope: a TypeError."""

    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    async def asynchronous() -> Any:
        yield 1

    for function in (generator, coroutine, asynchronous):
        with pytest.raises(TypeError, match="iterated"):
            deadline(1)(function)


# Generators.


def test_consumer_of_a_suspended_generator_is_not_hit() -> None:
    """A generator suspended inside its scope limits itself only: its consumer is not interrupted, not by check either."""

    def numbers() -> Iterator[int]:
        with deadline(2 * MS):
            yield 1
            gevent.sleep(LONG)
            yield 2

    generator = numbers()
    assert next(generator) == 1
    gevent.sleep(6 * MS)
    check(False)
    with pytest.raises(DeadlineExceeded):
        next(generator)
    assert _has_no_scope()


def test_a_generator_that_is_dropped() -> None:
    """A generator closed inside its scope leaves it."""

    def numbers() -> Iterator[int]:
        with deadline(2 * MS):
            yield 1

    for drop in (lambda generator: generator.close(), lambda generator: None):
        generator = numbers()
        next(generator)
        drop(generator)
        del generator
        assert _has_no_scope()


def test_contextmanager() -> None:
    """In a @contextmanager the consumer's block is what is limited."""

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        with deadline(2 * MS):
            yield

    with pytest.raises(DeadlineExceeded), limited():
        gevent.sleep(LONG)


# cancel and extend.


def test_cancel_with_a_text() -> None:
    """cancel(text) from another greenlet ends the block with Cancelled."""
    with pytest.raises(Cancelled, match="enough") as caught, deadline() as scope:
        gevent.spawn(scope.cancel, "enough")
        gevent.sleep(LONG)
    assert caught.value.cause == "enough"


def test_cancel_with_an_exception() -> None:
    """cancel(exception) raises that one."""
    with pytest.raises(ZeroDivisionError), deadline(LONG) as scope:
        scope.cancel(ZeroDivisionError())
        gevent.sleep(LONG)


def test_cancel_before_the_block() -> None:
    """What is cancelled before it begins ends at its first wait."""
    scope = deadline()
    scope.cancel("enough")
    with pytest.raises(Cancelled, match="enough"), scope:
        gevent.sleep(LONG)
    scope.cancel("again")
    gevent.sleep(2 * MS)  # nothing comes afterwards


def test_the_last_cancel_counts() -> None:
    """Cancelled twice it ends once, with the last cause."""
    with pytest.raises(Cancelled, match="second"), deadline() as scope:
        scope.cancel("first")
        scope.cancel("second")
        gevent.sleep(LONG)


def test_cancel_inside_a_shield() -> None:
    """A shield holds a cancel back as it does a limit."""
    done = []
    with pytest.raises(Cancelled), deadline() as scope:
        with shield():
            scope.cancel()
            gevent.sleep(3 * MS)
            done.append(1)
        gevent.sleep(LONG)
    assert done == [1]


def test_cancel_quiet_scope() -> None:
    """A move_on that is cancelled just ends."""
    with move_on(LONG) as scope:
        gevent.spawn(scope.cancel, "enough")
        gevent.sleep(LONG)
    assert scope.expired


def test_extend() -> None:
    """extend gives time from now on, also after expiry; None lifts the limit."""
    with deadline(3 * MS) as scope:
        scope.extend(LONG)
        gevent.sleep(6 * MS)
        assert scope.remaining() > 10 * MS
        scope.extend(None)
        assert scope.remaining() == math.inf
    with pytest.raises(DeadlineExceeded), deadline(1 * MS) as scope:
        with contextlib.suppress(BaseException):
            gevent.sleep(LONG)
        scope.extend(4 * MS)
        check(False)
        gevent.sleep(LONG)


def test_extend_counts_from_now() -> None:
    """Each extend gives the whole time: gevent's stopped timers go on with what they had left (gevent#1890)."""
    with deadline(LONG) as scope:
        for _ in range(5):
            scope.extend(LONG / 2)
            time.sleep(2 * MS)
            scope.extend(LONG / 2)
            assert scope.at is not None
            assert scope.at >= monotonic() + LONG / 2 - MS
    start = monotonic()
    with move_on(20 * MS) as scope:
        for _ in range(3):
            gevent.sleep(1 * MS)
            start = monotonic()
            scope.extend(20 * MS)
        gevent.sleep(LONG)
    assert monotonic() - start >= 20 * MS


def test_extend_before_and_after_the_block() -> None:
    """Before it changes what the block will have; after it nothing changes."""
    scope = deadline(at=monotonic())
    scope.extend(None)
    with scope:
        gevent.sleep(2 * MS)
    with move_on(1 * MS) as scope:
        gevent.sleep(LONG)
    scope.extend(LONG)
    assert (scope.delivered, scope.expired, scope.seconds) == (True, True, 1 * MS)


# Inheritance, leaks, servers.


def test_not_inherited() -> None:
    """A spawned greenlet has no limit unless it is given one."""
    with deadline(2 * MS):
        child = gevent.spawn(gevent.sleep, 6 * MS)
    child.get()


def test_no_reference_cycle() -> None:
    """What the block held is freed when the error is dropped, without the garbage collector."""

    class Thing:
        pass

    def run() -> weakref.ref[Thing]:
        thing = Thing()
        with contextlib.suppress(DeadlineExceeded), deadline(1 * MS):
            gevent.sleep(LONG)
        return weakref.ref(thing)

    gc.collect()
    gc.disable()
    try:
        reference = run()
        assert reference() is None
    finally:
        gc.enable()


def test_raw_greenlet_is_reported_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a raw greenlet lets out goes to the hub's error handler and not into main."""
    seen: list[Any] = []
    hub = gevent.get_hub()
    monkeypatch.setattr(hub, "handle_error", lambda context, kind, value, tb: seen.append(kind))

    def run() -> None:
        with deadline(1 * MS):
            gevent.sleep(LONG)

    gevent.spawn_raw(run)
    wait_until(lambda: seen)
    assert seen == [DeadlineExceeded]


def test_attached_by_a_server() -> None:
    """A server attaches a scope without a timer, expires it from the hub, and detaches it."""
    seen = []
    scope = HandlerScope(at=monotonic() + LONG)

    def run() -> None:
        scope.attach(gevent.getcurrent())
        try:
            assert deadline.current() is scope
            with deadline(2 * LONG) as inner:
                assert inner.effective_at == scope.at
            gevent.sleep(LONG)
        except DeadlineSignal as signal:
            seen.append(signal.scope)
        finally:
            scope.detach()
        assert _has_no_scope()

    greenlet = gevent.spawn(run)
    gevent.sleep(0)
    gevent.get_hub().loop.run_callback(scope.expire)
    greenlet.get()
    assert seen == [scope]
    scope.expire()


def test_a_servers_scope_is_not_extended() -> None:
    """It is a RuntimeError, and changes nothing."""
    scope = HandlerScope(at=monotonic() + LONG)
    scope.attach(gevent.getcurrent())
    try:
        scope.delivered = True
        with pytest.raises(RuntimeError, match="server"):
            scope.extend(1)
        assert (scope.delivered, scope.seconds) == (True, None)
    finally:
        scope.detach()


def test_repr_and_remaining() -> None:
    """repr shows the state, remaining the seconds that are left."""
    scope = deadline(LONG)
    assert "not entered" in repr(scope)
    with scope:
        assert 0 < scope.remaining() <= LONG
        assert "running" in repr(scope)
    assert "left" in repr(scope)
    with move_on(0) as scope:
        gevent.sleep(LONG)
    assert "expired" in repr(scope)
    assert scope.remaining() == 0
