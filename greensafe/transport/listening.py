"""Listening sockets, made without touching a file or an address of another program.

libzmq's own way is not safe. Over ipc it deletes whatever is at the path, the socket of a server that is alive or a plain file,
and nobody is told. Over tcp it aborts the process when no descriptor is left, since it asks for the names of the interfaces
first. So the socket is made here and handed over by ZMQ_USE_FD; then libzmq deletes no path and looks no name up. (In the end
it closes the descriptor.) Rules for the path of an ipc endpoint:

* What is no socket is left alone: EADDRINUSE. So is a socket that answers, unless it is to be taken over. One that refuses
  is stale: the server that has bound it is gone, and nobody can reach it any more.
* Looking and binding is done under a lock on the folder (flock), so that of two servers that start on one path one gets it.
* The socket is bound under its real name. One that is renamed afterwards keeps its first name for all who ask, LAST_ENDPOINT
  and `ss` included. So a path that is taken over is not there for some 25 microseconds; a client that connects just then tries
  again.
* A path is deleted only by the server whose socket is still there.

The options of the sockets are those that libzmq gives them, but that they do not block: an accept by which nothing comes would
otherwise stop libzmq's I/O thread.

What has no path and no port (inproc, `ipc://*`), what is not understood, and all of it on Windows, is libzmq's. It does not
know which sockets have which listeners.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, Final, NamedTuple

import gevent
import zmq
from gevent.monkey import get_original
from zmq.backend import Socket as Backend

__all__ = ["PAUSE", "Identity", "identity", "is_in_hub", "is_taken", "listen", "remove", "require_descriptor"]

#: Seconds between two looks at what somebody else is about to free.
PAUSE = 0.001

#: Seconds that another server may take to bind in the same folder; then it is done without the lock, which somebody else has.
LOCK_LIMIT = 1.0

#: Looks for the lock at the end, where nothing may wait for long; then a stale path stays.
LOCK_TRIES = 5

_IS_OURS: Final = os.name == "posix"

#: The bytes of a path with the zero behind it: sizeof(sockaddr_un.sun_path), where pyzmq knows it.
_PATH_SIZE: Final = zmq.IPC_PATH_MAX_LEN + 1 if zmq.IPC_PATH_MAX_LEN else 108

_make: Callable[..., socket.socket] = get_original("socket", "socket")
_getaddrinfo: Callable[..., list[Any]] = get_original("socket", "getaddrinfo")
_pause: Callable[[float], None] = get_original("time", "sleep")
_get: Callable[[Any, int], Any] = Backend.get

#: The device and the inode of a file, or of a socket.
Identity = tuple[int, int]


class Made(NamedTuple):
    """A socket that listens, and what it has at its path, if it has one."""

    socket: socket.socket
    file: Identity | None = None


def listen(sock: Any, address: str, *, takes_over: bool = False) -> Made | None:
    """Make a listening socket for `address`; None if that is left to libzmq.

    Waits for the lock of an ipc path's folder, except in the hub.

    Args:
        sock: The zmq socket that is going to have it, for its options.
        address: As given to bind.
        takes_over: Take an ipc path over from a server that answers there.

    Raises:
        OSError: As the system's: EADDRINUSE, EADDRNOTAVAIL, EACCES, EMFILE, ENOENT. Notes say more. Nothing has changed.
    """
    transport, _, place = address.partition("://")
    if not _IS_OURS or _get(sock, zmq.USE_FD) != -1:
        return None
    if transport == "tcp":
        made = _listen_tcp(sock, place)
        return None if made is None else Made(made)
    if transport == "ipc" and place not in ("", "@") and not place.startswith("*"):
        return _listen_ipc(sock, place, takes_over)
    return None


def identity(path: str) -> Identity | None:
    """Identify what is at a path; None if nothing is."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def remove(path: str, whose: Identity) -> None:
    """Delete the path of a listener that is about to close, if its socket is still there. Nothing is raised.

    It stays if that cannot be told for certain: the next server finds it stale.
    """
    with contextlib.suppress(OSError):
        descriptor = _open(os.path.dirname(path))
        try:
            for _ in range(LOCK_TRIES):
                if _try_lock(descriptor):
                    break
                _pause(PAUSE)
            else:
                return
            if identity(path) == whose:
                os.unlink(path)
        finally:
            _close(descriptor)


def is_taken(endpoint: str) -> bool:
    """Return whether somebody listens at a port or an abstract name, as LAST_ENDPOINT has it. Binds there for an instant."""
    transport, _, place = endpoint.partition("://")
    host, _, port = place.rpartition(":")
    try:
        if transport == "tcp" and (where := _resolve(host, int(port), host.startswith("["))) is not None:
            family, address = where
        elif transport == "ipc" and place.startswith("@"):
            family, address = socket.AF_UNIX, "\0" + place[1:]
        else:
            return False
        with _make(family, socket.SOCK_STREAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if family != socket.AF_UNIX:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def require_descriptor() -> None:
    """Raise EMFILE (or ENFILE) where libzmq would abort the process for want of a descriptor."""
    _make(socket.AF_INET, socket.SOCK_DGRAM).close()


def is_in_hub() -> bool:
    """Return whether this is the hub, which cannot wait."""
    return gevent.getcurrent() is gevent.get_hub()


# tcp


def _listen_tcp(sock: Any, place: str) -> socket.socket | None:
    host, _, port = place.rpartition(":")
    if port == "*":
        port = "0"
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        return None
    is_ipv6 = bool(_get(sock, zmq.IPV6))
    where = _resolve(host, int(port), is_ipv6) or _resolve(_interface(sock, host), int(port), is_ipv6)
    if where is None:
        return None
    family, address = where
    try:
        made = _make(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT and is_ipv6:
            return None  # a machine without IPv6: libzmq tries IPv4
        raise
    try:
        _set_options(made, sock, is_ipv6)
        made.bind(address)
        made.listen(_backlog(sock))
    except BaseException:
        made.close()
        raise
    return made


def _resolve(host: str, port: int, is_ipv6: bool) -> tuple[int, Any] | None:
    """The family and the address of a number, or of `*`; None if it is a name. Never asks a name service."""
    if host == "*":
        return (socket.AF_INET6, ("::", port)) if is_ipv6 else (socket.AF_INET, ("0.0.0.0", port))
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    family, flags = socket.AF_INET, socket.AI_PASSIVE | socket.AI_NUMERICHOST
    if is_ipv6:
        family, flags = socket.AF_INET6, flags | socket.AI_V4MAPPED
    try:
        return family, _getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, flags)[0][4]
    except (OSError, UnicodeError):
        return None


def _interface(sock: Any, name: str) -> str:
    """The address of a network interface, which libzmq alone can tell; "" if it is none.

    Asks by binding another socket to it, on a port that the system chooses.
    """
    asking: Any = Backend(sock.context, int(zmq.PAIR))
    try:
        require_descriptor()  # one besides its own
        asking.set(int(zmq.LINGER), 0)
        asking.set(int(zmq.IPV6), int(_get(sock, zmq.IPV6)))
        asking.bind(f"tcp://{name}:*")
        endpoint: str = asking.get(int(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
    except zmq.ZMQError:
        return ""
    finally:
        asking.close(0)
    return endpoint.removeprefix("tcp://").rpartition(":")[0]


def _set_options(made: socket.socket, sock: Any, is_ipv6: bool) -> None:
    """Give a tcp listener what libzmq's has. What connections inherit is among it."""
    made.setblocking(False)
    if is_ipv6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if tos := _get(sock, zmq.TOS):
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        if is_ipv6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
    if device := _get(sock, zmq.BINDTODEVICE).rstrip(b"\0"):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    for option, name in ((zmq.SNDBUF, socket.SO_SNDBUF), (zmq.RCVBUF, socket.SO_RCVBUF)):
        if (size := _get(sock, option)) >= 0:
            made.setsockopt(socket.SOL_SOCKET, name, size)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


# ipc


def _listen_ipc(sock: Any, place: str, takes_over: bool) -> Made:
    made = _make(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        if len(place.encode()) >= _PATH_SIZE:
            return Made(made)  # libzmq says so, and deletes nothing meanwhile
        if place.startswith("@"):
            made.bind("\0" + place[1:])
            made.listen(_backlog(sock))
            return Made(made)
        with _alone(os.path.dirname(os.path.abspath(place))):
            _bind_path(made, place, takes_over, _backlog(sock))
            return Made(made, identity(place))
    except BaseException:
        made.close()
        raise


def _backlog(sock: Any) -> int:
    """Return how many connections may wait to be accepted; a negative number is the most that the system allows."""
    backlog: int = _get(sock, zmq.BACKLOG)
    return backlog if backlog >= 0 else socket.SOMAXCONN


def _bind_path(made: socket.socket, path: str, takes_over: bool, backlog: int) -> None:
    aside = _make_room(path, takes_over)
    try:
        made.bind(path)
        made.listen(backlog)
    except BaseException:
        if aside is not None and identity(path) is None:
            os.rename(aside, path)
        raise
    if aside is not None:
        with contextlib.suppress(OSError):  # removed already, by whatever cleans the folder
            os.unlink(aside)


def _make_room(path: str, takes_over: bool) -> str | None:
    """Move what is at the path out of the way; return where it is now, None if nothing was there."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(kind):
        raise _in_use(path, "what is there is no socket, and was left alone: remove it, or take another path")
    if not takes_over and _answers(path):
        raise _in_use(path, "a server answers there: stop it first, or take the path over from it with takeover=True")
    aside = f"{path}.{os.urandom(4).hex()}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return None  # its server has removed it just now
    except PermissionError:
        raise _in_use(path, "a socket is there that this user may not remove: its owner can, or take another path") from None
    return aside


def _answers(path: str) -> bool:
    """Return whether a server listens at a socket's path. One that is stopped, or whose queue is full, does."""
    with _make(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _in_use(path: str, why: str) -> OSError:
    error = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    error.add_note(f"ipc://{path}: {why}")
    return error


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Keep other servers from binding in a folder meanwhile. Without the right to read it, or such locks, it does nothing."""
    descriptor = _open(folder)
    try:
        at = monotonic() + LOCK_LIMIT
        while not _try_lock(descriptor) and monotonic() < at and not is_in_hub():
            gevent.sleep(PAUSE)
        yield
    finally:
        _close(descriptor)


def _open(folder: str) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _try_lock(descriptor: int | None) -> bool:
    """Lock it; return False if another server has the lock. The lock ends with the descriptor."""
    if descriptor is None:
        return True
    import fcntl  # not on Windows, which does not come here

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
