"""Notice that no file descriptor is left, so that a server cannot accept; by ipc, that hardly any is.

libzmq keeps trying to accept: its I/O thread spins, nothing is logged, and a new client waits in the kernel's queue. libzmq's
monitor reports each try, 100,000 a second, and to replace a monitor by one without that event takes descriptors. So the event
is not asked for. Instead a descriptor is opened and closed once a second, which costs 4 µs. Rules:

* The beginning and the end are logged and told to hooks, once each.
* libzmq tries without a pause, so it gets a free descriptor before anybody else. Once one can be had here, every client that
  had waited is accepted.
* By ipc libzmq aborts the process instead. So there the last `RESERVE` are as good as none: what leaks descriptors slowly is
  told of while something can still be done. (The system gives the lowest number that is free, so the number that the check got
  tells how many are left.)

It does not know what the descriptors are used for.
"""

from __future__ import annotations

import errno
import logging
import os
from time import monotonic
from typing import Any

from ..hooks import DescriptorsExhausted, Tell
from ..hub.every import Every
from ..hub.log_limiter import write

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["DescriptorWatch"]

log = logging.getLogger("greensafe.descriptors")

#: Seconds between two checks.
PERIOD = 1.0

#: How many have to be left by ipc; of a low limit an eighth. It is over when there are twice as many.
RESERVE = 32

#: What Linux says when the process's limit is reached, or the machine's.
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)


class DescriptorWatch:
    """Whether this process has descriptors left, for one server in this thread's hub.

    Args:
        endpoint: The server's, for log lines and records.
        tell: Called with a record when it begins and when it is over.
        is_ipc: Whether it needs a reserve.

    Attributes:
        is_exhausted: No descriptor could be had at the last check, beyond the reserve.
    """

    def __init__(self, endpoint: str, tell: Tell | None = None, *, is_ipc: bool = False) -> None:
        self._endpoint = endpoint
        self._tell = tell
        self._is_ipc = is_ipc
        self._since = 0.0
        self.is_exhausted = False
        self._every = Every(PERIOD, self, DescriptorWatch.check)

    def __repr__(self) -> str:
        return f"<DescriptorWatch of {self._endpoint} {'exhausted' if self.is_exhausted else 'fine'}>"

    def check(self) -> None:
        """Check whether a descriptor can be had."""
        reserve = RESERVE if self._is_ipc else 0
        problem = _problem(2 * reserve if self.is_exhausted else reserve)  # clients come and go at its edge
        if (problem is not None) == self.is_exhausted:
            return
        self.is_exhausted = problem is not None
        if problem is None:
            seconds = monotonic() - self._since
            text = "%s: descriptors can be had again, after %.1f s: new clients are accepted"
            write(log, logging.WARNING, text, self._endpoint, seconds, extra={"endpoint": self._endpoint})
            self._told(seconds)
        else:
            self._since = monotonic()
            write(
                log,
                logging.ERROR,
                "%s: %s, the limit is %s: clients that are connected are served, %s; raise the limit (ulimit -n, LimitNOFILE), "
                "or close what leaks (lsof -p %d shows them)",
                self._endpoint,
                problem,
                _limit(),
                "and libzmq aborts this process at the first one that it cannot accept" if self._is_ipc else "new ones wait",
                os.getpid(),
                extra={"endpoint": self._endpoint},
            )
            self._told(None)

    def close(self) -> None:
        """Stop the checks; once more does nothing."""
        self._every.close()

    def _told(self, seconds: float | None) -> None:
        if self._tell is not None:
            self._tell(DescriptorsExhausted(self._endpoint, _limit(), seconds))


def _problem(reserve: int) -> str | None:
    """What is wrong if no descriptor can be had, or no more than a reserve; else None."""
    try:
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return f"no file descriptor is left ({error.strerror})" if error.errno in _NONE_LEFT else None
    os.close(lowest)
    limit = _limit()
    if limit is not None and limit - lowest <= min(reserve, limit // 8):
        return f"at most {limit - lowest} file descriptors are left"
    return None


def _limit() -> int | None:
    """How many descriptors this process may have; None if there is no such limit."""
    if resource is None:
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft
