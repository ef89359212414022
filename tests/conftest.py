"""Fixtures for all tests; above all the one that fails a test that leaves something behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
import zmq
from greenlet import greenlet

sys.path.insert(0, str(Path(__file__).parent))

import greensafe
from helpers import LONG, MS

#: Turns of the hub after which what is still there counts as left behind.
RELEASE = 400 * MS


def _greenlets() -> set[int]:
    found = set()
    for thing in gc.get_objects():
        try:
            is_live = isinstance(thing, greenlet) and bool(thing) and not isinstance(thing, gevent.hub.Hub)
        except ReferenceError:
            continue
        if is_live and thing is not gevent.getcurrent() and thing.parent is not None:
            found.add(id(thing))
    return found


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


def _threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def _children() -> set[str]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def _contexts() -> set[int]:
    return {id(thing) for thing in gc.get_objects() if type(thing) in _CONTEXTS and not thing.closed}


class _Keeping(greensafe.Context):
    """Keeps its sockets, so that a test need not close each of them."""

    kept: list[greensafe.Socket]

    def socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super().socket(*args, **kwargs)
        self.__dict__.setdefault("kept", []).append(made)
        return made


_CONTEXTS = (zmq.Context, greensafe.Context, _Keeping)


def _snapshot() -> dict[str, Any]:
    return {
        "greenlets": _greenlets(),
        "descriptors": set(_descriptors().items()),
        "threads": _threads(),
        "child processes": _children(),
        "contexts": _contexts(),
    }


def _left_behind(before: dict[str, Any]) -> dict[str, Any]:
    return {name: now - before[name] for name, now in _snapshot().items() if now - before[name]}


@pytest.fixture(scope="session", autouse=True)
def _made_once() -> None:
    """What gevent makes once and keeps is there before the first test: the hub, its threadpool's threads, its resolver."""
    hub = gevent.get_hub()
    hub.threadpool.maxsize = 2
    # Both of the pool's threads, so that none is born during a test; they block on each other until both run.
    barrier = gevent.monkey.get_original("threading", "Barrier")(2)
    gevent.joinall([hub.threadpool.spawn(barrier.wait) for _ in range(2)])
    gevent.sleep(0)


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Fail the test that leaves a greenlet, a descriptor, a thread, a context or a process behind."""
    gc.collect()
    before = _snapshot()
    yield
    for kind in (greensafe.Context, zmq.Context):
        if kind._instance is not None and not kind._instance.closed:
            kind._instance.destroy(linger=0)
    end = monotonic() + RELEASE
    gevent.sleep(0)
    left = _left_behind(before)
    while left and monotonic() < end:
        gc.collect()
        gevent.sleep(MS)
        left = _left_behind(before)
    assert not left, f"left behind: {left}"


@pytest.fixture
def context() -> Iterator[greensafe.Context]:
    """A green context that is terminated afterwards, with whatever sockets are left in it."""
    made = _Keeping()
    yield made
    made.destroy(linger=0)
    made.__dict__.pop("kept", None)


@pytest.fixture
def limit() -> Iterator[None]:
    """End the test when a wait in it does not end."""
    with gevent.Timeout(LONG, AssertionError("a wait did not end")):
        yield


def pytest_report_header() -> list[str]:
    return [
        f"greensafe: pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}, gevent {gevent.__version__}, "
        f"loop {type(gevent.get_hub().loop).__module__}, {threading.active_count()} thread(s)"
    ]
