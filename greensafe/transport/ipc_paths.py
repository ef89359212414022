"""The file of an ipc endpoint, as long as a socket is bound to it.

It can be removed (by whatever cleans /tmp), or another server's can be put in its place. Clients that are connected do not
notice, nor does libzmq: the server goes on, and nobody else reaches it. So `look`, called once a second, compares what is at
the path with what was there at first, and logs a change once: what has become of it, and that it is as it should be again.

It does not know which socket it is of.
"""

from __future__ import annotations

import logging
import os

from ..hub.log_limiter import write
from .listening import Identity, identity, remove

__all__ = ["BoundPath", "path_of"]

log = logging.getLogger("greensafe.green._paths")


class BoundPath:
    """The path of one endpoint that was bound just now.

    Args:
        endpoint: What log lines call it.
        path: Absolute.
        file: What was put there; None if libzmq did, or the program, which then remove it themselves.

    Attributes:
        trouble: What had become of it at the last look; "" if it was there as it should be.
    """

    __slots__ = ("_endpoint", "_file", "_is_ours", "_path", "trouble")

    def __init__(self, endpoint: str, path: str, file: Identity | None) -> None:
        self._endpoint = endpoint
        self._path = path
        self._is_ours = file is not None
        self._file = file if file is not None else self._found()
        self.trouble = ""

    def __repr__(self) -> str:
        return f"<BoundPath {self._path} {self.trouble or 'in order'}>"

    def look(self) -> None:
        """Check it, and log what has changed since the last check."""
        before, self.trouble = self.trouble, self._what_is_wrong()
        if self.trouble == before:
            return
        extra = {"endpoint": self._endpoint}
        if self.trouble:
            text = "%s cannot be reached by new clients any more: %s; clients that are connected are served"
            write(log, logging.WARNING, text, self._endpoint, self.trouble, extra=extra)
        else:
            write(log, logging.WARNING, "%s can be reached by new clients again", self._endpoint, extra=extra)

    def remove(self) -> None:
        """Delete it, if it is still the one that was put there."""
        if self._is_ours and self._file is not None:
            remove(self._path, self._file)

    def _what_is_wrong(self) -> str:
        if self._file is None:
            return ""  # never known
        try:
            found = identity(self._path)
        except OSError:
            return ""  # nobody can tell
        if found == self._file:
            return ""
        return f"{self._path} was removed" if found is None else f"{self._path} was taken by somebody else"

    def _found(self) -> Identity | None:
        try:
            return identity(self._path)
        except OSError:
            return None


def path_of(endpoint: str) -> str | None:
    """Return the absolute path of an ipc endpoint that was bound; None if it has none."""
    transport, _, place = endpoint.partition("://")
    return None if transport != "ipc" or place.startswith("@") or os.name != "posix" else os.path.abspath(place)
