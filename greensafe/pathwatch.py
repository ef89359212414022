"""Can new clients still find a server that listens at a path?

A socket's file can be removed (by whatever cleans /tmp), or another server's can be put in its place. Clients that are
connected do not notice, nor does libzmq: the server goes on, and nobody else reaches it. A `PathWatch` looks every `LOOK`
seconds and logs what has become of the path, once, and again when it is as it should be.

It does not know what a path is, nor what its owner does about it. It keeps no loop alive.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gevent

from .green._forks import generation

__all__ = ["PathWatch"]

log = logging.getLogger(__name__)

#: Seconds between two looks, each of which asks the system about one path.
LOOK = 1.0

Run = Callable[[str, Callable[[], object]], object]


class PathWatch:
    """The look-out for one server.

    Args:
        endpoint: What log lines call it.
        look: Says what is wrong with its path; "" if nothing is.
        run: Called with a loop's name and a turn of it to do; looks after its failures.

    Attributes:
        trouble: What was wrong at the last look.
    """

    def __init__(self, endpoint: str, look: Callable[[], str], run: Run) -> None:
        self._endpoint = endpoint
        self._look = look
        self._run = run
        self._generation = generation()
        self.trouble = ""
        self._timer: Any = gevent.get_hub().loop.timer(LOOK, LOOK, ref=False)
        self._timer.start(run, "path", self._turn, update=True)

    def __repr__(self) -> str:
        return f"<PathWatch of {self._endpoint} {self.trouble or 'in order'}>"

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _turn(self) -> None:
        if self._generation != generation():
            self.close()  # a forked child does not listen there
            return
        before, self.trouble = self.trouble, self._look()
        if self.trouble == before:
            return
        extra = {"endpoint": self._endpoint}
        if self.trouble:
            text = "%s cannot be reached by new clients any more: %s; who is connected is served"
            log.warning(text, self._endpoint, self.trouble, extra=extra)
        else:
            log.warning("%s can be reached by new clients again", self._endpoint, extra=extra)
