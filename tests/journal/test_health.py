"""Tests of greensafe.journal._health."""

from __future__ import annotations

import logging

import gevent
import pytest
from helpers import LONG, MS, wait_until

from greensafe.errors import JournalError
from greensafe.journal._health import Health

pytestmark = pytest.mark.usefixtures("limit")


def test_said_once_and_asked_more_often(caplog: pytest.LogCaptureFixture) -> None:
    """Ill and well again are a line each; the timer runs in its short period as long as it is ill, and not after the end."""
    turns: list[None] = []
    health = Health(gevent.get_hub(), lambda: turns.append(None))
    health.start(LONG, MS)
    first, second = JournalError("full"), JournalError("still full")
    for error in (None, first, second):
        health.note(error)
    wait_until(lambda: len(turns) > 1)
    assert health.error is second
    assert "still full" in repr(health)
    health.note(None)
    assert "well" in repr(health)
    health.note(first)
    health.stop()
    count = len(turns)
    health.note(None)
    gevent.sleep(5 * MS)
    assert len(turns) == count
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.ERROR, logging.WARNING] * 2
