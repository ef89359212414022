"""Tests of greensafe.green._every: a check that is made again and again."""

from __future__ import annotations

import threading

import gevent
import pytest
from helpers import MS, wait_until

from greensafe.hub import every as _every
from greensafe.hub.every import Every

pytestmark = pytest.mark.usefixtures("limit")


class Owner:
    """Counts its checks; the first ones fail."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.count = 0

    def check(self) -> None:
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)


def test_a_check_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one is made."""
    owner = Owner(ValueError("broken"))
    every = Every(MS, owner, Owner.check)
    wait_until(lambda: owner.count >= 3)
    every.close()
    (record,) = [each for each in caplog.records if each.name == "greensafe.green._every"]
    assert "broken" in caplog.text
    assert record.exc_info


def test_an_interrupt() -> None:
    """KeyboardInterrupt goes to the main greenlet, and the next check is made all the same."""
    owner = Owner(KeyboardInterrupt())
    every = Every(MS, owner, Owner.check)
    with pytest.raises(KeyboardInterrupt):
        wait_until(lambda: owner.count >= 3)
    wait_until(lambda: owner.count >= 3)
    every.close()


def test_the_end_of_its_owner() -> None:
    """It does not keep its owner alive, and ends with it."""
    owner = Owner()
    every = Every(MS, owner, Owner.check)
    del owner
    wait_until(lambda: every._timer is None)
    assert repr(every) == "<Every closed>"


def test_close() -> None:
    """Closed it checks no more; once more does nothing."""
    owner = Owner()
    every = Every(MS, owner, Owner.check)
    wait_until(lambda: owner.count > 0)
    every.close()
    every.close()
    count = owner.count
    gevent.sleep(10 * MS)
    assert owner.count == count
    assert repr(every) == "<Every closed>"


def test_close_in_another_thread() -> None:
    """Closed in another thread it ends in its own, whose loop alone may touch the timer."""
    owner = Owner()
    every = Every(MS, owner, Owner.check)

    def close() -> None:
        every.close()
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert every._timer is not None
    wait_until(lambda: every._timer is None)


def test_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to check: it ends."""
    owner = Owner()
    every = Every(MS, owner, Owner.check)
    monkeypatch.setattr(_every, "generation", lambda: -1)
    wait_until(lambda: every._timer is None)
    assert not owner.count
