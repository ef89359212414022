"""SIGTERM and SIGINT as a server takes them: the first one stops it, the second one closes it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import gevent

__all__ = ["signals"]


@contextlib.contextmanager
def signals(on_first: Callable[[], object], on_second: Callable[[], object]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT while inside, in the main thread only; what was installed before comes back."""
    if not gevent.get_hub().main_hub:  # to a patched threading each greenlet is a thread of its own
        yield
        return
    seen = 0

    def on_signal() -> None:
        nonlocal seen
        seen += 1
        gevent.spawn(on_first if seen == 1 else on_second)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    watchers = [gevent.signal_handler(number, on_signal) for number in before]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        # The loop leaves the system's default behind, whatever Python believes is installed.
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
