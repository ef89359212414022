"""Checks of endpoints, whose errors say what is wrong and what to try.

libzmq takes a port of 99999 for another one and says "Invalid argument" of most mistakes. So servers and clients check what can
be known beforehand, and add to libzmq's errors what to do about them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import zmq

__all__ = ["check_endpoint", "explained", "not_begun"]

_ADVICE = {
    errno.EADDRINUSE: "something else is bound there: stop it, take another port, or let the system choose one with port 0",
    errno.EADDRNOTAVAIL: "this machine has no such address: bind to 127.0.0.1, to 0.0.0.0 for all, or to an interface's name",
    errno.ENODEV: "this machine has no such interface: bind to 127.0.0.1, to 0.0.0.0 for all, or to an interface's name",
    errno.EACCES: "permission denied: take a port from 1024 up, or an ipc path in a folder that this user may write to",
    errno.EMFILE: "this process has no descriptor left: close some, or raise its limit (ulimit -n, LimitNOFILE= of systemd)",
    errno.ENOENT: "the folder of an ipc path has to exist",
    errno.EINVAL: "an endpoint looks like tcp://127.0.0.1:5555, ipc:///tmp/socket or inproc://name",
    errno.EPROTONOSUPPORT: "the transports are tcp, ipc and inproc; others depend on how libzmq was built",
}


def check_endpoint(endpoint: object, *, to_connect: bool = False) -> str:
    """Return `endpoint` if it may be usable: to bind to, or to connect to.

    Raises:
        TypeError: It is not a str.
        ValueError: It has no transport, an impossible port or a NUL; the text says which, and what an endpoint looks like.
    """
    if not isinstance(endpoint, str):
        raise TypeError(f"an endpoint is a str such as 'tcp://127.0.0.1:5555', not {endpoint!r}")
    transport, separator, address = endpoint.partition("://")
    if not separator or not transport or not address:
        raise ValueError(f"{endpoint!r} is no endpoint: {_ADVICE[errno.EINVAL]}")
    if "\0" in endpoint:
        raise ValueError(f"{endpoint!r} is no endpoint: it holds a NUL")
    if transport == "tcp":
        host, _, port = address.rpartition(":")
        if port != "*" and not (port.isascii() and port.isdigit() and int(port) <= 65535):
            raise ValueError(f"{endpoint!r} has no usable port: a number up to 65535 is needed, or 0 to bind to a free one")
        if to_connect and (host in ("", "*") or port == "*" or int(port) == 0):
            raise ValueError(
                f"{endpoint!r} can be bound but not connected to: a host and a port are needed, as in server.endpoint"
            )
    return endpoint


@contextlib.contextmanager
def explained(endpoint: str) -> Iterator[None]:
    """Add to a ZMQError of bind or connect a note: which endpoint it was, and what to try."""
    try:
        yield
    except zmq.ZMQError as error:
        if getattr(error, "__notes__", ()):
            raise  # its own text says more
        advice = _ADVICE.get(error.errno or 0)
        error.add_note(f"{endpoint}: {advice}" if advice else str(endpoint))
        raise


def not_begun(endpoint: str, ipv6: bool) -> str:
    """Explain an endpoint to which libzmq cannot even begin to connect, of which it tells nothing itself."""
    source, _, target = endpoint.partition("://")[2].rpartition(";")
    if target.count(":") > 1 and not ipv6:
        advice = "an IPv6 address needs IPV6 set, on the Context or on the socket"
    elif source:
        advice = f"the source, {source.rpartition(':')[0] or source}, has to be an address or an interface of this machine"
    else:
        advice = "the process may have no descriptor left, or the machine no such network"
    return f"libzmq cannot begin to connect: {advice}"
