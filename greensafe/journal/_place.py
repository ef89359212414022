"""Files made beside a journal, in a folder where other users may write as well.

Rules:

* What is made is its owner's alone (0600), whatever the umask; sqlite gives its own files the mode of the database. What is
  wider, because it was there before or was made so on purpose, is left so and named in the log.
* What is made has a name that nobody else has, and nothing that was there before is opened or removed: not even what a crash
  has left, which may as well be a copy that somebody has put there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat

from ._descriptors import CAREFULLY

__all__ = ["make_draft", "remove_draft", "warn_of_others"]

log = logging.getLogger("greensafe.journal.sqlite")


def make_draft(path: str) -> str:
    """Make an empty file beside `path`, its owner's alone; return its name.

    Raises:
        OSError: It cannot be made.
    """
    draft = f"{path}.{os.urandom(8).hex()}.new"
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | CAREFULLY, 0o600)
    try:
        os.fchmod(fd, 0o600)  # of 0600 the umask may have taken something away
    finally:
        os.close(fd)
    return draft


def remove_draft(draft: str) -> None:
    """Remove the draft, and what sqlite has made beside it; what cannot be removed stays."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            os.unlink(draft + suffix)


def warn_of_others(path: str) -> None:
    """Log which of the files other users of the machine may read or write."""
    wider = []
    for name in (path, path + "-wal", path + "-shm"):
        try:
            mode = stat.S_IMODE(os.stat(name).st_mode)
        except OSError:
            continue
        if mode & 0o077:
            wider.append(f"{name} ({mode:04o})")
    if wider:
        text = (
            "the journal %s: other users of this machine can get at requests and answers, or stop it by a lock: %s; chmod 600"
        )
        log.warning(text, path, ", ".join(wider))
    folder = os.path.dirname(path) or "."
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
    except OSError:
        return
    if mode & stat.S_IWOTH:
        log.warning(
            "the journal %s: every user of this machine may write to its folder (%04o): give it one of its own", path, mode
        )
