"""What does systemd want to know of a service of Type=notify, and how is it told?

Rules:

* Where NOTIFY_SOCKET is not set nothing is needed and nothing is done.
* READY=1 when the server serves, STOPPING=1 when it begins to drain, once each; again as long as systemd's queue is full, as it
  may be while a machine starts: a service whose READY was lost is ended for that.
* WATCHDOG=1 twice within WATCHDOG_USEC, from a timer of the hub: none comes while the hub is blocked, nor from an unhealthy
  server, so systemd restarts the service. Only if WATCHDOG_PID is not set or names this process.
* An error is logged once and hurts nobody.

See sd_notify(3) and sd_watchdog_enabled(3). It does not know servers: who is told about says whether it is healthy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from gevent.monkey import get_original

__all__ = ["Notifier", "notifier"]

log = logging.getLogger("greensafe.systemd")

#: Seconds between two pings, at least: what both loops can tell from none.
_SHORTEST = 0.001

#: Seconds until what did not fit into systemd's queue is said again.
_AGAIN = 0.05

Run = Callable[[str, Callable[[], object]], object]


class Notifier:
    """The connection to systemd.

    Args:
        address: As in NOTIFY_SOCKET: a path, or @ and the name of an abstract socket.
        is_healthy: Asked before each ping.
        run: Called with a loop's name and a turn of it to do; looks after its failures.
        period: Seconds between two pings, None for none.
    """

    def __init__(self, address: str, is_healthy: Callable[[], bool], run: Run, period: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_healthy = is_healthy
        self._run = run
        self._has_failed = False
        self._is_stopping = False
        self._pid = os.getpid()
        self._timer: Any = None
        self._unsaid: list[bytes] = []
        self._again: Any = None
        # Not gevent's: a datagram never waits here.
        self._socket = get_original("socket", "socket")(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        if period is not None:
            self._timer = gevent.get_hub().loop.timer(period, period, ref=False)
            self._timer.start(run, "systemd", self._ping, update=True)

    def ready(self) -> None:
        """Say that the service serves."""
        self._say(b"READY=1")

    def stopping(self) -> None:
        """Say that the service is about to end; once."""
        if not self._is_stopping:
            self._is_stopping = True
            self._say(b"STOPPING=1")

    def close(self) -> None:
        """Stop the pings. What could not be said until now is logged."""
        if self._unsaid and self._pid == os.getpid():
            log.warning("systemd was not told %s: its queue is full", b" ".join(self._unsaid).decode())
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.stop()
                timer.close()
        self._timer = self._again = None
        self._socket.close()

    def _say(self, state: bytes) -> None:
        """Say what has to arrive, behind what is not said yet."""
        self._unsaid.append(state)
        self._go_on()

    def _go_on(self) -> None:
        if self._pid != os.getpid():
            self._unsaid.clear()  # a forked child does not speak for its parent
        while self._unsaid and self._send(self._unsaid[0]):
            self._unsaid.pop(0)
        if self._unsaid and self._again is None:
            self._again = gevent.get_hub().loop.timer(_AGAIN, _AGAIN, ref=False)
            self._again.start(self._run, "systemd", self._go_on)
        elif not self._unsaid and self._again is not None:
            self._again.stop()
            self._again.close()
            self._again = None

    def _ping(self) -> None:
        if self._is_healthy() and self._pid == os.getpid():  # a forked child does not speak for its parent
            self._send(b"WATCHDOG=1")

    def _send(self, state: bytes) -> bool:
        """False if systemd's queue is full. What cannot be said at all is logged."""
        try:
            self._socket.sendto(state, self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("systemd cannot be told %s: %s", state.decode(), error)
        return True


@contextlib.contextmanager
def notifier(is_healthy: Callable[[], bool], run: Run) -> Iterator[Notifier | None]:
    """Tell systemd that the service is ready, and ping it until the end; None where there is no systemd that wants that.

    For the arguments see Notifier.
    """
    found = _open(is_healthy, run)
    if found is None:
        yield None
        return
    found.ready()
    try:
        yield found
    finally:
        found.stopping()
        found.close()


def _open(is_healthy: Callable[[], bool], run: Run) -> Notifier | None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return None
    if address[0] not in "@/" or not hasattr(socket, "AF_UNIX"):
        log.warning(
            "NOTIFY_SOCKET is %r, which is neither a path nor an abstract socket: systemd is not told anything", address
        )
        return None
    try:
        return Notifier(address, is_healthy, run, _period())
    except OSError as error:
        log.warning("systemd is not told anything: %s", error)
        return None


def _period() -> float | None:
    """Seconds between two pings, None if none are wanted of this process."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not text.isdecimal() or not int(text):
        log.warning("WATCHDOG_USEC is %r, which is no number of microseconds: systemd is not pinged", text)
        return None
    return max(int(text) / 2_000_000, _SHORTEST)
