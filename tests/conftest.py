"""Fixtures for all tests; above all the one that fails a test that leaves something behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import pytest
import pytest_timeout
import zmq
from greenlet import greenlet
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from helpers import HANG, MS, Patience, kept_port
from leaks import census, left_behind

import greensafe

# How long an example takes is the machine's business.
settings.register_profile("greensafe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("greensafe")

# A worker that leaves its pool after five idle seconds would be missed, and its successor reported.
gevent.config.threadpool_idle_task_timeout = 86_400.0

#: How long, in seconds of patience, what a test started may take to end.
RELEASE = 10_000 * MS

#: Context.instance() is made at the first use in the process and is nobody's to close: it ends with the test that made it.
_GLOBAL = (zmq.Context, greensafe.Context)


class _Keeping(greensafe.Context):
    """Keeps its sockets, so that a test need not close each of them."""

    kept: list[greensafe.Socket]

    def socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super().socket(*args, **kwargs)
        self.__dict__.setdefault("kept", []).append(made)
        return made


@pytest.fixture(scope="session", autouse=True)
def _made_once() -> None:
    """What gevent makes once and keeps is there before the first test: the hub, its wake-up pipe, its threadpool's threads."""
    # All of the pool's threads, so that none is born during a test; they block on each other until every one runs.
    pool = gevent.get_hub().threadpool
    barrier = gevent.monkey.get_original("threading", "Barrier")(pool.maxsize)
    gevent.joinall([pool.spawn(barrier.wait) for _ in range(pool.maxsize)])


@pytest.fixture(scope="module", autouse=True)
def _forget_the_past() -> None:
    """Take what is older than a module's first test out of the collector's lists: looking through them costs 0.1 ms, not 10."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Fail the test that leaves a greenlet, a descriptor, a thread, a context or a process behind."""
    before = census()
    instances = [kind._instance for kind in _GLOBAL]
    yield
    for kind, instance in zip(_GLOBAL, instances, strict=True):
        if kind._instance is not None and kind._instance is not instance and not kind._instance.closed:
            kind._instance.destroy(linger=0)
    if found := left_behind(before, RELEASE):
        pytest.fail("\n    ".join(["left behind by this test:", *found]), pytrace=False)


@pytest.fixture
def port() -> Iterator[int]:
    """A port for a server that comes and goes."""
    with kept_port() as number:
        yield number


@pytest.fixture
def context() -> Iterator[greensafe.Context]:
    """A green context that is terminated afterwards, with whatever sockets are left in it."""
    made = _Keeping()
    yield made
    made.destroy(linger=0)
    made.__dict__.pop("kept", None)


@pytest.fixture
def resolver() -> Iterator[Any]:
    """What resolves names in this test, a naming.NameService: no question leaves the machine."""
    from naming import name_service

    with name_service() as made:
        yield made


@pytest.fixture
def limit() -> Iterator[None]:
    """End the test when a wait in it does not end: after HANG seconds of patience, which is looked at only then."""
    patience, waiter, loop = Patience(HANG), gevent.getcurrent(), gevent.get_hub().loop
    timers = []

    def look(left: float) -> None:
        if left:
            timers.append(loop.timer(max(left, 10 * MS)))  # libuv warns of less than 1 ms
            timers[-1].start(lambda: look(patience.left()))
        else:
            waiter.throw(AssertionError("a wait did not end"))

    look(HANG)
    yield
    for timer in timers:
        timer.close()


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Have pytest-timeout count patience, natively: where no other guard reaches, show all stacks and end the process."""
    patience, over, runner = Patience(settings.timeout), threading.Event(), gevent.getcurrent()

    def watch() -> None:
        while left := patience.left():
            if over.wait(left):
                return
        if not pytest_timeout.is_debugging():
            _give_up(item, runner)

    def cancel() -> None:
        over.set()
        thread.join()

    thread = threading.Thread(target=watch, name=f"guard of {item.nodeid}", daemon=True)
    thread.start()
    item.cancel_timeout = cancel  # type: ignore[attr-defined]  # pytest-timeout calls it
    return True


def _give_up(item: pytest.Item, runner: greenlet) -> None:
    capture: Any = item.config.pluginmanager.getplugin("capturemanager")
    capture.suspend_global_capture(in_=True)
    print(*capture.read_global_capture(), f"\n{item.nodeid} hangs. Threads and greenlets:", sep="\n", file=sys.stderr)
    greenlets = [runner, *(thing for thing in gc.get_objects() if isinstance(thing, greenlet))]
    for frame in (*sys._current_frames().values(), *(each.gr_frame for each in greenlets)):
        if frame is not None:
            print("", *traceback.format_stack(frame), file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def pytest_report_header() -> list[str]:
    return [
        f"greensafe: pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}, gevent {gevent.__version__}, "
        f"loop {type(gevent.get_hub().loop).__module__}, {threading.active_count()} thread(s)"
    ]


@pytest.fixture(params=["tcp", "ipc", "inproc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An endpoint to bind to."""
    return {"tcp": "tcp://127.0.0.1:*", "ipc": f"ipc://{tmp_path}/s", "inproc": "inproc://s"}[request.param]
