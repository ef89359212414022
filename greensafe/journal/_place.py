"""How files are made beside a journal, where others may write as well.

Rules:

* What is made is its owner's alone (0600), whatever the umask; sqlite gives its own files the mode of the database. What is
  wider, because it was there before or was made so on purpose, is left so and named in the log.
* A link is not followed. What is in the way is looked at before it is removed, and left alone if no journal has made it.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Iterator

from ._descriptors import CAREFULLY

__all__ = ["make_draft", "remove_draft", "warn_of_others"]

log = logging.getLogger("greensafe.journal.sqlite")

#: How each file of a draft begins, behind which name; so does what a crash leaves, or with nothing, or with zeros.
_BEGINNINGS = {
    "": (b"SQLite format 3\0",),
    "-journal": (b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7",),
    "-wal": (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"),
    "-shm": ((3_007_000).to_bytes(4, sys.byteorder),),
}

_LOOKED_AT = 100

#: Bytes that no draft has, nor what sqlite has beside it.
_TOO_LARGE = 2**20

#: Where the application_id stands.
_APPLICATION = slice(68, 72)


def make_draft(path: str, application: bytes) -> str:
    """Make an empty file beside `path`, its owner's alone; returns its name.

    That is `path`.new, unless something is there that no journal with this application_id has left.

    Raises:
        OSError: It cannot be made.
    """
    for draft in _names(path):
        if not all(_clear(draft + suffix, beginnings, application) for suffix, beginnings in _BEGINNINGS.items()):
            log.warning("the journal %s: what is at %s was not left by one; it stays, and another name is used", path, draft)
            continue
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | CAREFULLY, 0o600)
        try:
            os.fchmod(fd, 0o600)  # of 0600 the umask may have taken something away
        finally:
            os.close(fd)
        return draft
    raise AssertionError("unreachable")


def remove_draft(draft: str) -> None:
    """Remove what was made."""
    for suffix in _BEGINNINGS:
        try:
            os.unlink(draft + suffix)
        except FileNotFoundError:
            continue


def warn_of_others(path: str) -> None:
    """Log what other users of the machine may read or write."""
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


def _names(path: str) -> Iterator[str]:
    yield path + ".new"
    while True:
        yield f"{path}.{os.urandom(8).hex()}.new"


def _clear(name: str, beginnings: tuple[bytes, ...], application: bytes) -> bool:
    """Remove what a crash has left; returns whether nothing is there."""
    try:
        fd = os.open(name, os.O_RDONLY | CAREFULLY)
    except FileNotFoundError:
        return True
    except OSError:  # a link among them
        return False
    try:
        found, data = os.fstat(fd), os.pread(fd, _LOOKED_AT, 0)
    except OSError:  # a folder
        return False
    finally:
        os.close(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_size > _TOO_LARGE:
        return False
    if data.strip(b"\0"):
        if not data.startswith(beginnings):
            return False
        if len(beginnings[0]) == len(b"SQLite format 3\0") and data[_APPLICATION] != application:
            return False
    os.unlink(name)
    return True
