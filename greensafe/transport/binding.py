"""The addresses that a socket listens at: how it gets them, and how it gives them back.

A `Binding` does both for one socket, green or plain. Rules:

* LINGER is 0 while libzmq binds, and what it was afterwards. libzmq's listener keeps the value that it is made with, for
  connections that are gone: what is queued for them can never leave, and with -1 the context would never terminate. What is for
  connections that live has the socket's own LINGER, whenever that was set.
* The name of an inproc endpoint and the path of an ipc one are free before the socket is closed. A port, and the name of an
  abstract ipc endpoint, are free when libzmq's I/O thread has closed the descriptor, some time later: `wait` waits for that.
  The number of the descriptor is gone first, the port a moment later, at the end of the system call; a thread can be
  interrupted in between.
* Until then this process remembers them. So bind fails with EADDRINUSE only because of somebody else: it waits for what this
  process is giving back. (Not in the hub, which cannot wait.)
* A forked child neither deletes its parent's paths nor waits for its ports.
* What becomes of the paths meanwhile is looked at each second; see `_paths`.

How a listening socket is made is in `_listening`. This does not know what a socket is for.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..hub.every import Every
from ..hub.forks import generation
from ..hub.threads import pause
from .endpoints import explained
from .ipc_paths import BoundPath, path_of
from .listening import PAUSE, Identity, Made, is_in_hub, is_taken, listen, remove, require_descriptor

__all__ = ["Binding", "listeners"]

#: Seconds that libzmq may take to close a listener; more only if something stops its I/O thread.
LET_GO = 5.0

#: Seconds for which the system may still have a port or a name whose descriptor is closed already.
SETTLE = 0.5

#: Seconds between two looks at the paths, each of which asks the system about one file.
LOOK = 1.0

_LINGER = int(zmq.LINGER)
_USE_FD = int(zmq.USE_FD)
_LAST_ENDPOINT = int(zmq.LAST_ENDPOINT)

_get: Callable[[Any, int], Any] = Backend.get
_set: Callable[[Any, int, Any], None] = Backend.set


class _Listener:
    """One address that a socket has.

    Attributes:
        asked: The endpoint as it was given to bind.
        endpoint: As libzmq calls it.
        descriptor: Of the listening socket; -1 if there is none, or nobody knows it.
        path: The file of an ipc endpoint, or None.
    """

    __slots__ = ("_generation", "_last_open", "_socket", "asked", "descriptor", "endpoint", "path")

    def __init__(self, asked: str, endpoint: str, descriptor: int, file: Identity | None) -> None:
        self.asked = asked
        self.endpoint = endpoint
        self.descriptor = descriptor
        self._last_open = -math.inf  # when it was seen open for the last time since it was given back
        path = path_of(endpoint)
        self.path = None if path is None else BoundPath(endpoint, path, file)
        self._socket = _identity_of(descriptor)
        self._generation = generation()

    @property
    def is_open(self) -> bool:
        """Return whether the descriptor is open, and has not become somebody else's."""
        return self._socket is not None and _identity_of(self.descriptor) == self._socket

    @property
    def is_going(self) -> bool:
        """Return whether it was given back by this process, and the system may not have freed it yet."""
        if self._last_open == -math.inf or self.is_inherited:
            return False
        if self.is_open:
            self._last_open = monotonic()
            return True
        return monotonic() < self._last_open + SETTLE

    def note(self) -> None:
        """Remember it, and forget those that have ended."""
        for key, each in list(_known.items()):
            if not each.is_open and not each.is_going:
                _known.pop(key, None)
        if self._socket is not None:
            _known[self._socket] = self

    @property
    def place(self) -> str:
        """The port or the name, which only one listener can have."""
        return _place(self.endpoint)

    @property
    def is_inherited(self) -> bool:
        """Return whether a forked child has it from its parent."""
        return self._generation != generation()

    def leave(self) -> None:
        """Note that the socket has unbound from it, or is about to be closed."""
        if self.is_inherited:
            return
        if self.path is not None:
            self.path.remove()
        self._last_open = monotonic()


#: The listeners of this process, and of those that it was forked from, that may be open or going; by what they are known.
_known: dict[Identity, _Listener] = {}


def listeners() -> list[int]:
    """The descriptors by which this process listens for libzmq; in a forked child, those that it has inherited as well."""
    return [each.descriptor for each in list(_known.values()) if each.is_open]


class Binding:
    """The addresses of one socket, which is `sock` everywhere. `act` is its own bind or unbind: what is done in the end."""

    __slots__ = ("__weakref__", "_gone", "_listeners", "_look_out")

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._gone: list[_Listener] = []
        self._look_out: Every | None = None

    def __repr__(self) -> str:
        return f"<Binding {' '.join(each.endpoint for each in self._listeners) or 'unbound'}>"

    def bind(self, sock: Any, address: str, act: Callable[[str], Any], *, takes_over: bool = False) -> Any:
        """Bind; return what `act` does. Waits, except in the hub, for what this process is giving back there.

        Args:
            takes_over: See `Socket.bind`.

        Raises:
            zmq.ZMQError: It cannot be bound; a note says what to try. Nothing has changed.
        """
        at = monotonic() + LET_GO
        while True:
            is_going = _is_going(address)  # before the try: it may be closed between that and a look
            try:
                with explained(address):
                    return self._bind(sock, address, act, takes_over)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or not is_going or monotonic() >= at or is_in_hub():
                    raise
            gevent.sleep(PAUSE)

    def unbind(self, address: str, act: Callable[[str], Any]) -> None:
        """Unbind from an endpoint, by the name that it was bound with or by libzmq's."""
        found = [each for each in self._listeners if each.endpoint == address]
        found = found or [each for each in self._listeners if each.asked == address][:1]
        if found:
            act(found[0].endpoint)
        else:
            # Another name of the same, perhaps, which libzmq resolves; and for that it asks for the interfaces.
            try:
                require_descriptor()
            except OSError as error:
                raise _as_zmq(error, address) from None
            act(address)
            found = [each for each in self._listeners if each.place == _place(address) != ""]
        self._leave(found)

    def close(self, sock: Any) -> None:
        """Give all back; the socket is to be closed right behind it."""
        if not self._listeners:
            return
        for each in self._listeners:
            if each.endpoint.startswith("inproc:") and not each.is_inherited:
                with contextlib.suppress(zmq.ZMQError):  # closed already, or its context is terminated
                    Backend.unbind(sock, each.endpoint)
        self._leave(list(self._listeners))

    def wait(self) -> bool:
        """Wait until all that was given back is free for any process; False if libzmq takes too long. Not in the hub."""
        at = monotonic() + LET_GO
        while going := [each for each in self._gone if each.is_going and (each.is_open or is_taken(each.endpoint))]:
            if monotonic() >= at:
                return False
            pause(PAUSE)
            self._gone = going
        self._gone = []
        return True

    @property
    def trouble(self) -> str:
        """The fault that the last check of its ipc paths has found; "" if there was none."""
        return ", ".join(path.trouble for path in self._paths if path.trouble)

    @property
    def _paths(self) -> list[BoundPath]:
        return [each.path for each in self._listeners if each.path is not None]

    def _look(self) -> None:
        for path in self._paths:
            path.look()

    def _bind(self, sock: Any, address: str, act: Callable[[str], Any], takes_over: bool) -> Any:
        try:
            made = listen(sock, address, takes_over=takes_over)
            if made is None and not address.startswith(("inproc:", "ipc:")):
                require_descriptor()
        except OSError as error:
            raise _as_zmq(error, address) from None
        if made is None:
            with _without_linger(sock):
                result, descriptor = act(address), _get(sock, _USE_FD)
        else:
            result, descriptor = _hand_over(made, sock, address, act)
        endpoint = os.fsdecode(_get(sock, _LAST_ENDPOINT).rstrip(b"\0"))
        listener = _Listener(address, endpoint, descriptor, None if made is None else made.file)
        self._listeners.append(listener)
        listener.note()
        if listener.path is not None and self._look_out is None:
            self._look_out = Every(LOOK, self, Binding._look)
        return result

    def _leave(self, going: list[_Listener]) -> None:
        for each in going:
            each.leave()
        self._listeners = [each for each in self._listeners if each not in going]
        self._gone = [each for each in (*self._gone, *going) if each.is_going]
        if self._look_out is not None and not self._paths:
            self._look_out.close()
            self._look_out = None


def _is_going(address: str) -> bool:
    """Return whether this process is giving an address back."""
    place = _place(address)
    return place != "" and any(each.place == place and each.is_going for each in list(_known.values()))


def _place(endpoint: str) -> str:
    """The port of a tcp endpoint, or an ipc endpoint; "" for what is free at once, or chosen by the system."""
    if endpoint.startswith("tcp:"):
        port = endpoint.rpartition(":")[2]
        return "" if port in ("0", "*") else port
    return endpoint if endpoint.startswith("ipc:") else ""


def _identity_of(descriptor: int) -> Identity | None:
    if descriptor < 0:
        return None
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _hand_over(made: Made, sock: Any, address: str, act: Callable[[str], Any]) -> tuple[Any, int]:
    """Have libzmq listen by a socket that was made for it; closes that if it does not."""
    try:
        with _without_linger(sock):
            _set(sock, _USE_FD, made.socket.fileno())
            try:
                result = act(address)
                return result, made.socket.detach()
            finally:
                with contextlib.suppress(zmq.ContextTerminated):
                    _set(sock, _USE_FD, -1)
    except BaseException:
        path = path_of(address)
        if path is not None and made.file is not None:
            remove(path, made.file)
        made.socket.close()
        raise


@contextlib.contextmanager
def _without_linger(sock: Any) -> Iterator[None]:
    linger = _get(sock, _LINGER)
    _set(sock, _LINGER, 0)
    try:
        yield
    finally:
        with contextlib.suppress(zmq.ContextTerminated):
            _set(sock, _LINGER, linger)


def _as_zmq(error: OSError, address: str) -> zmq.ZMQError:
    """Make the error of the system one of pyzmq's."""
    found = zmq.ZMQError(error.errno)
    found.strerror = f"{found.strerror} (addr={address!r})"
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found
