"""Notice that no file descriptor is left, so that a server cannot accept.

libzmq keeps trying to accept: its I/O thread spins, nothing is logged, and a new client waits in the kernel's queue. libzmq's
monitor reports each try, 100,000 a second, and to replace a monitor by one without that event takes descriptors. So the event
is not asked for. Instead a descriptor is opened and closed once a second, which costs 4 µs. Rules:

* The beginning and the end are logged and told to hooks, once each.
* libzmq tries without a pause, so it gets a free descriptor before anybody else. Once one can be had here, every client that
  had waited is accepted.
* The timer neither keeps the loop running nor does anything in a forked child.

It does not know what the descriptors are used for.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent

from .green._forks import generation
from .hooks import DescriptorsExhausted, Tell

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["DescriptorWatch"]

log = logging.getLogger(__name__)

#: Seconds between two checks.
PERIOD = 1.0

#: What Linux says when the process's limit is reached, or the machine's.
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)

Run = Callable[[str, Callable[[], object]], None]


class DescriptorWatch:
    """Whether this process has descriptors left, for one server in this thread's hub.

    Args:
        endpoint: The server's, for log lines and records.
        run: Does a turn of a loop; see `Restarts.run`.
        tell: Called with a record when it begins and when it is over.

    Attributes:
        is_exhausted: No descriptor could be had at the last check.
    """

    def __init__(self, endpoint: str, run: Run, tell: Tell | None = None) -> None:
        self._endpoint = endpoint
        self._tell = tell
        self._since = 0.0
        self._generation = generation()
        self.is_exhausted = False
        self._timer = gevent.get_hub().loop.timer(PERIOD, PERIOD, ref=False)
        self._timer.start(run, "descriptors", self.check, update=True)

    def __repr__(self) -> str:
        return f"<DescriptorWatch of {self._endpoint} {'exhausted' if self.is_exhausted else 'fine'}>"

    def check(self) -> None:
        """Check whether a descriptor can be had."""
        if self._generation != generation():
            self.close()
            return
        problem = _problem()
        if (problem is not None) == self.is_exhausted:
            return
        self.is_exhausted = problem is not None
        if problem is None:
            seconds = monotonic() - self._since
            text = "%s: descriptors can be had again, after %.1f s: new clients are accepted"
            log.warning(text, self._endpoint, seconds, extra={"endpoint": self._endpoint})
            self._told(seconds)
        else:
            self._since = monotonic()
            log.error(
                "%s: no file descriptor is left (%s; the limit is %s): clients that are connected are served, new ones cannot "
                "connect%s; raise the limit (ulimit -n, LimitNOFILE), or close what leaks (lsof -p %d shows them)",
                self._endpoint,
                problem,
                _limit(),
                ", and libzmq ends this process if one tries" if self._endpoint.startswith("ipc:") else "",
                os.getpid(),
                extra={"endpoint": self._endpoint},
            )
            self._told(None)

    def close(self) -> None:
        """Stop the checks; once more does nothing."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    def _told(self, seconds: float | None) -> None:
        if self._tell is not None:
            self._tell(DescriptorsExhausted(self._endpoint, _limit(), seconds))


def _problem() -> str | None:
    """Why no descriptor can be had; None if one can."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno in _NONE_LEFT:
            return error.strerror
    return None


def _limit() -> int | None:
    """How many descriptors this process may have; None if there is no such limit."""
    if resource is None:
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft
