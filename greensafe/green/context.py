"""What is a Context whose end never blocks the hub?

`zmq_ctx_term` waits until every socket is closed and every lingering message is gone. Called in the hub's thread it stops the
whole program, so here it runs in the hub's threadpool (waiters meanwhile get ContextTerminated) and the calling greenlet waits.
Servers and clients that live in the context are closed first, or it would wait for them for ever. At interpreter exit what is
pending gets half a second. In a forked child the context begins anew at its first use.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import gevent
import zmq
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub
from gevent.monkey import get_original
from zmq import Context as _Plain
from zmq.backend import Context as Backend

from ..deadlines import to_seconds
from ..hub.forks import generation, own_loop
from ..hub.threads import is_elsewhere
from ..transport.inheritance import noted
from ..transport.routing_ids import draw_ids
from .socket import Socket

__all__ = ["Context", "check_context", "close_first", "own", "plain_socket"]

#: Milliseconds that messages still queued may take to leave when the interpreter exits and nobody closed anything.
EXIT_LINGER = 500

#: Sockets of libzmq that a monitored one takes: itself, and the two ends of its monitor.
SOCKETS_EACH = 3

#: What a context that begins anew keeps.
_OPTIONS = (zmq.IO_THREADS, zmq.MAX_SOCKETS, zmq.IPV6, zmq.BLOCKY, zmq.MAX_MSGSZ)

_open_contexts: weakref.WeakSet[Context] = weakref.WeakSet()


class Context(zmq.Context[Socket]):
    """A zmq.Context whose sockets are green.

    Attributes:
        default_timeout: Seconds that sockets made from now on wait by default in send and recv, or None.
    """

    _socket_class = Socket
    _instance: Any = None
    _default_timeout: float | None = None
    _is_exiting = False
    _max_sockets = 0
    _generation = -1  # until the constructor has succeeded
    _owners: weakref.WeakKeyDictionary[Any, Hub]

    def __init__(self, io_threads: int | zmq.Context[Any] = 1, shadow: zmq.Context[Any] | int = 0) -> None:
        own_loop()
        super().__init__(io_threads, shadow)  # type: ignore[call-overload]
        self._generation = generation()
        self._owners = weakref.WeakKeyDictionary()
        if not self._shadow:
            self.set(zmq.MAX_SOCKETS, Backend.get(self, zmq.MAX_SOCKETS))
        _open_contexts.add(self)

    @property
    def default_timeout(self) -> float | None:
        return self._default_timeout

    @default_timeout.setter
    def default_timeout(self, value: Any) -> None:
        self._default_timeout = to_seconds(value)

    def set(self, option: int, optval: int) -> None:
        """Set a context option, as in pyzmq. MAX_SOCKETS counts the program's sockets, and not what monitors them."""
        if option != zmq.MAX_SOCKETS:
            super().set(option, optval)
            return
        try:
            super().set(option, optval * SOCKETS_EACH)
        except zmq.ZMQError:
            super().set(option, optval)  # more than libzmq can poll here: some REQs may have to do without a monitor
        self._max_sockets = optval

    def get(self, option: int) -> int:
        """Get a context option, as in pyzmq."""
        if option == zmq.MAX_SOCKETS and isinstance(self._shadow_obj, Context):
            return self._shadow_obj.get(option)
        is_known = option == zmq.MAX_SOCKETS and self._max_sockets and not self.closed
        return self._max_sockets if is_known else super().get(option)

    def term(self) -> None:
        """Terminate the context, cooperatively.

        Its servers and clients are closed. Returns when every socket is closed and its lingering messages have left or are
        given up (LINGER). If the wait is interrupted by a deadline, a Timeout or a kill, termination goes on in its own thread.
        """
        if self.closed:
            return
        if self._generation != generation():
            super().term()  # the parent's, which pyzmq leaves alone
            return
        hub = get_hub_if_exists()
        if hub is None or gevent.getcurrent() is hub or self._is_exiting:  # nothing can, or need, go on meanwhile
            self._close_owners()
            super().term()
            return
        try:
            # Not in this greenlet: if it is a server's handler, that server would not be closed when its close() returns.
            gevent.spawn(self._close_owners).join()
        finally:
            ending = hub.threadpool.spawn(super().term)
        ending.get()

    def _close_owners(self) -> None:
        for owner, home in list(self._owners.items()):
            if not is_elsewhere(home):
                owner.close()
            elif home.loop is not None:
                home.loop.run_callback_threadsafe(owner.close)

    def _own(self) -> None:
        """In a forked child, replace libzmq's context, whose threads have stayed in the parent."""
        if self._generation == generation() or self.closed:
            return
        if self._shadow:
            raise RuntimeError("this Context is a shadow of one that was made before a fork: shadow it again in the child")
        own_loop()
        options = {option: self.get(option) for option in _OPTIONS}
        Backend.__init__(self, options[zmq.IO_THREADS])
        for option, value in options.items():
            self.set(option, value)
        self._sockets = weakref.WeakSet()
        self._owners = weakref.WeakKeyDictionary()
        self._generation = generation()

    def __del__(self) -> None:
        # In whichever greenlet the collector runs, hub included: nothing may wait here. All sockets are gone already, as each
        # holds its context. A native thread sees the lingering messages off.
        if not self._shadow and not self.closed and not self._is_exiting and self._generation == generation():
            zmq.sugar.context.warn(f"Unclosed context {self}", ResourceWarning, stacklevel=2, source=self)  # type: ignore[attr-defined]
            get_original("_thread", "start_new_thread")(super().term, ())


def check_context(context: object) -> None:
    """Raise TypeError unless `context` is one of pyzmq's or ours, or None."""
    if context is not None and not isinstance(context, _Plain):
        raise TypeError(f"context is a greensafe.Context, or None for the shared one, not {type(context).__name__}")


def own(context: zmq.Context[Any]) -> zmq.Context[Any]:
    """Return the context, begun anew if it was made before a fork: with its options, and without the parent's sockets.

    Raises:
        RuntimeError: It is a shadow of the parent's context, or not one of ours, and cannot be begun anew.
    """
    own_loop()
    if isinstance(context, Context):
        context._own()
    return context


def plain_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """A socket for a pump, with the options that the context has for its sockets, such as CURVE keys, where they apply.

    A DEALER gets no ROUTING_ID. A ROUTER that has an id still, because it has not noticed the loss of the last connection yet,
    never reads another one that announces the same: a client would wait for ever.
    """
    with noted(own(context)):
        draw_ids(kind)
        sock = zmq.Socket(context, kind)
    for option, value in context.sockopts.items():
        if kind == zmq.DEALER and option == zmq.ROUTING_ID:
            continue
        try:
            sock.setsockopt(option, value)
        except zmq.ZMQError as error:
            if error.errno != zmq.EINVAL:  # an option of other types of socket
                sock.close(0)
                raise
    return sock


def close_first(context: zmq.Context[Any], owner: Any) -> None:
    """Have `owner.close()` called in this thread's hub before `context` is terminated, if it is one of ours."""
    if isinstance(context, Context):
        context._owners[owner] = gevent.get_hub()


def _abandon_at_exit() -> None:
    """Let the process end within a second, whatever is pending and whoever still waits."""
    Context._is_exiting = True
    now = generation()
    contexts = [each for each in _open_contexts if each._generation == now and not each._shadow and not each.closed]
    closing = [sock for context in contexts for sock in list(context._sockets) if not sock.closed]
    for sock in closing:
        linger = sock.getsockopt(zmq.LINGER)
        sock.close(EXIT_LINGER if linger < 0 else min(linger, EXIT_LINGER))
    if closing:
        _term_for(EXIT_LINGER / 1000, contexts)


def _term_for(seconds: float, contexts: list[Context]) -> None:
    """See queued messages off for at most `seconds`, in a native thread, since the loop turns no more."""
    done = get_original("_thread", "allocate_lock")()
    done.acquire()

    def term() -> None:
        for context in contexts:
            zmq.Context.term(context)
        done.release()

    get_original("_thread", "start_new_thread")(term, ())
    done.acquire(True, seconds)


atexit.register(_abandon_at_exit)
