"""Tests of greensafe.hub.timers."""

from __future__ import annotations

import math
from time import monotonic

import gevent
import pytest
from helpers import LONG, MS, wait_until

from greensafe.hub.timers import Alarm, Timer

pytestmark = pytest.mark.usefixtures("limit")


def test_a_timer_is_set_for_one_thing() -> None:
    """What it was set for before is forgotten; it counts as set until it is stopped, and stopping twice does nothing."""
    timer, called = Timer(), []
    timer.set(gevent.get_hub(), MS, lambda: called.append("first"))
    timer.set(gevent.get_hub(), MS, lambda: called.append("second"))
    wait_until(lambda: called)
    gevent.sleep(5 * MS)
    assert called == ["second"]
    assert timer.is_set
    timer.stop()
    timer.stop()
    assert not timer.is_set


def test_a_stopped_timer_calls_nothing() -> None:
    """Stopped in the callback or before: no further call comes, though it was to come again."""
    timer, called = Timer(), []
    timer.set(gevent.get_hub(), 0, lambda: called.append(1), again=True)
    timer.stop()
    gevent.sleep(5 * MS)
    assert called == []


def test_an_alarm_is_set_for_the_earliest_time() -> None:
    """A later time changes nothing, an earlier one does; it is set for nothing once stopped."""
    alarm, called = Alarm(gevent.get_hub(), lambda: called.append(monotonic())), []
    far, near = monotonic() + LONG, monotonic() + MS
    alarm.no_later_than(far)
    alarm.no_later_than(far + 1)
    assert alarm.at == far
    alarm.no_later_than(near)
    assert alarm.at == near
    wait_until(lambda: called)
    alarm.stop()
    assert alarm.at == math.inf


def test_a_held_alarm_is_not_set() -> None:
    """While its callback is at work nobody sets it; after `stop` it can be set again."""
    alarm = Alarm(gevent.get_hub(), lambda: None)
    alarm.hold()
    alarm.no_later_than(monotonic())
    assert alarm.at == -math.inf
    alarm.stop()
    alarm.no_later_than(monotonic() + LONG)
    assert alarm.at < math.inf
    alarm.stop()
