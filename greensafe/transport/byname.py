"""One endpoint that holds a name, kept connected to the address that the name has now.

Shared by clients' channels and green sockets, each of which connects its own kind of socket. Rules:

* The name is resolved before the first connection, and anew after each attempt that failed and each connection that was lost.
  Where its address has changed the socket is connected to the new one; the old one is left.
* Of several addresses the resolver's first is taken, after an attempt that failed the next one. When all have failed the one
  that was last is tried again by libzmq, after its own pause, and then the others once more.
* While the name service does not answer, or says that it cannot, the last known address is as good as any: it is connected to.
* Nothing here keeps the loop running, nor its owner alive.

It does not know what is lost with a connection that is left, nor when an owner wants to try again.
"""

from __future__ import annotations

import errno
import logging
import random
import sys
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import gevent
import zmq
from zmq.backend import Socket as Backend

from ..hub.forks import generation
from ..sansio.backoff import delay
from .names import LIMIT, Answer, Host, Question, ask

__all__ = ["ByName", "has_proxy", "leave", "reconnect"]

log = logging.getLogger("greensafe.green._byname")


class ByName:
    """The way from a name to the number that a socket is connected to.

    Args:
        host: The endpoint.
        on_trouble: Called in the hub with what is wrong, for people, when there is no address to connect to. A bound method,
            held weakly.

    Attributes:
        number: The endpoint, with a number, that the socket is connected to; None if it is to none.
        trouble: Why there is no address; "" if there is one, or it is not known yet.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_aliases",
        "_asked_at",
        "_connect",
        "_failures",
        "_former",
        "_generation",
        "_ipv6",
        "_known",
        "_on_trouble",
        "_question",
        "_timer",
        "_tried",
        "host",
        "number",
        "trouble",
    )  # fmt: skip

    def __init__(self, host: Host, on_trouble: Callable[[str], object]) -> None:
        self.host = host
        self._on_trouble: weakref.WeakMethod[Callable[[str], object]] = weakref.WeakMethod(on_trouble)
        self._connect: Callable[[str, str | None], bool] | None = None
        self._generation = generation()
        self._question: Question | None = None
        self._timer: Any = None
        self._known: tuple[str, ...] = ()
        self._failures = 0
        self._forget()

    def __repr__(self) -> str:
        state = "asks" if self._question is not None else "rests" if self._timer is None else "pauses"
        return f"<ByName {state} {self.host.endpoint} is {self.number} {self.trouble!r}>"

    def _forget(self) -> None:
        self.number: str | None = None
        self.trouble = ""
        self._address = ""
        #: What libzmq's events may call it, and those before it.
        self._aliases: frozenset[str] = frozenset()
        self._former: frozenset[str] = frozenset()
        #: Addresses that have failed since one was connected to, or all had failed.
        self._tried: set[str] = set()
        self._ipv6 = False
        self._asked_at = float("-inf")

    def begin(self, ipv6: bool, connect: Callable[[str, str | None], bool]) -> None:
        """Resolve the name for a socket that is not connected to it yet.

        Args:
            ipv6: Whether the socket can connect to IPv6 addresses.
            connect: Called in the hub with the number to connect to and the one to leave, None at first; it returns False if
                that cannot be done now. It must not keep the owner alive.
        """
        self.end()
        self._forget()
        self._ipv6, self._connect = ipv6, connect
        self._ask()

    def end(self) -> None:
        """Resolve no more, until `begin`. The socket stays as it is."""
        self._connect = None
        self._forget_question()

    # What happens to the connection.

    def is_at(self, endpoint: str) -> bool:
        """Return whether an event's endpoint is the number that the socket is connected to."""
        return endpoint in self._aliases

    def was_at(self, endpoint: str) -> bool:
        """Return whether it is one that the socket has left, whose events do not matter any more."""
        return endpoint in self._former

    def on_connected(self) -> None:
        """Note that the address answers: no other one is wanted until the connection is gone."""
        self._tried.clear()
        self._forget_question()

    def on_failed(self) -> bool:
        """Try the next address after a failed attempt; return whether there was one. If not, the name is resolved anew."""
        self._tried.add(self._address)
        fresh = [address for address in self._known if address not in self._tried]
        if fresh and self._connect is not None and self._move(fresh[0]):
            return True
        self._tried.clear()
        self._ask()
        return False

    def on_lost(self) -> None:
        """Resolve the name again, as the connection is gone and libzmq is about to connect anew."""
        self._ask()

    # What the owner wants.

    def wake(self) -> bool:
        """Ask now if there is no address, nobody asks and the last answer is not quite new; return whether that was so."""
        is_due = monotonic() - self._asked_at >= delay(max(self._failures, 1), 0.0)
        if self.number is not None or self._connect is None or self._question is not None or not is_due:
            return False
        self._ask()
        return True

    def rest(self) -> None:
        """Stop to resolve by itself, as nothing needs the connection."""
        if self._question is None:
            self._stop_timer()

    def ask_later(self) -> None:
        """Ask again after a pause that grows with each failure."""
        if self._question is None and self._connect is not None:
            self._start_timer(delay(max(self._failures, 1), random.random()), ByName._ask)

    # Inside.

    def _forget_question(self) -> None:
        if self._question is not None:
            self._question.cancel()
            self._question = None
        self._stop_timer()

    def _ask(self) -> None:
        if self._question is not None or self._connect is None:
            return
        self._asked_at = monotonic()
        self._question = ask(self.host, self._ipv6, partial(_on_answer, weakref.ref(self)))
        self._start_timer(LIMIT, ByName._on_late)

    def on_answer(self, answer: Answer) -> None:
        """Take what became of the lookup."""
        self._question = None
        self._stop_timer()
        if self._generation != generation():
            return
        if answer.addresses:
            self._failures = 0
            self._known = answer.addresses
            self._take(answer.addresses)
        else:
            self._failures += 1
            self._do_without(answer.trouble, answer.is_definite)

    def _on_late(self) -> None:
        now = monotonic()
        if now - self._asked_at > 2 * LIMIT:  # this process was stopped, or blocked: so was the resolver
            self._asked_at = now
            self._start_timer(LIMIT, ByName._on_late)
            return
        self._do_without(f"the name service does not answer: {self.host.name} is not resolved after {LIMIT:g} s", False)

    def _do_without(self, trouble: str, is_definite: bool) -> None:
        if self.number is not None:
            return  # it is tried again and again
        if self._known and not is_definite:
            self._take(self._known)
            return
        self._report(trouble)

    def _report(self, trouble: str) -> None:
        self.trouble = trouble
        on_trouble = self._on_trouble()
        if on_trouble is not None:
            on_trouble(trouble)

    def _take(self, addresses: tuple[str, ...]) -> None:
        if self._address not in addresses:
            self._tried.clear()
            self._move(addresses[0])

    def _move(self, address: str) -> bool:
        assert self._connect is not None
        number = self.host.at(address)
        try:
            if not self._connect(number, self.number):
                return False
        except zmq.ZMQError as error:
            if error.errno not in (zmq.ETERM, zmq.ENOTSOCK):
                self._report(f"{number}: {error}")
            return False
        if self.number is not None:
            log.info("%s: connects to %s now, no longer to %s", self.host.endpoint, number, self.number)
        self.number, self._address, self.trouble = number, address, ""
        aliases = self.host.aliases(address)
        self._former, self._aliases = (self._former | self._aliases) - aliases, aliases
        return True

    def _start_timer(self, seconds: float, act: Callable[[ByName], object]) -> None:
        self._stop_timer()
        self._timer = gevent.get_hub().loop.timer(seconds, ref=False)
        self._timer.start(_on_timer, weakref.ref(self), self._timer, act, update=True)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.loop is gevent.get_hub().loop:
            timer.stop()
            timer.close()

    def on_timer(self, timer: Any, act: Callable[[ByName], object]) -> None:
        """Do what is due, unless it was put off meanwhile, or this is a forked child."""
        if timer is self._timer:
            self._timer = None
            if self._generation == generation():
                act(self)


def has_proxy(sock: zmq.Socket[Any]) -> bool:
    """Return whether a SOCKS proxy resolves the names that this socket connects to: it may know names that nobody here does."""
    return bool(sock.getsockopt(zmq.SOCKS_PROXY))


def reconnect(sock: zmq.Socket[Any], number: str, old: str | None) -> bool:
    """Connect a socket to `number` instead of `old`; what is queued for that is dropped, as LINGER has it."""
    if old is not None:
        leave(sock, old)
    sock.connect(number)
    return True


def leave(sock: zmq.Socket[Any], number: str) -> None:
    """Disconnect, unless libzmq has given the connection up by itself (wrong socket type, failed authentication)."""
    try:
        Backend.disconnect(sock, number)
    except zmq.ZMQError as error:
        if error.errno != errno.ENOENT:
            raise


def _on_answer(by_name: weakref.ref[ByName], answer: Answer) -> None:
    found = by_name()
    if found is not None:
        found.on_answer(answer)


def _on_timer(by_name: weakref.ref[ByName], timer: Any, act: Callable[[ByName], object]) -> None:
    found = by_name()
    timer.stop()
    timer.close()
    if found is not None:
        try:
            found.on_timer(timer, act)
        except BaseException:  # noqa: BLE001 - what leaves a callback is lost
            gevent.get_hub().handle_error(found, *sys.exc_info())
