"""Host names in endpoints, and the addresses that they have now.

libzmq resolves a name in its I/O thread, at each try to connect, and blocks there until the name service answers: meanwhile no
socket of that context sends, receives or accepts. So libzmq is given numbers only, and names are resolved here. Rules:

* gevent's resolver is asked (`hub.resolver`), the one that the program has chosen, from a greenlet. No number is asked for.
* Of one name one lookup is under way in a hub, however many ask for it. Its answer is given to all of them, and to whoever asks
  within `FRESH` seconds.
* At most `AT_ONCE` lookups are under way in a hub; the next ones wait. gevent's default resolver takes a thread of the hub's
  pool for each, and the pool is the program's too. Of names whose last lookup was not over within `LIMIT`, at most `LATE` are
  under way; and one more may be, of those whose last lookup was. So what is known to work is not held up by what hangs.
* A lookup cannot be broken off: a thread in getaddrinfo cannot be stopped. Whoever asks sets a limit of its own, and cancels.

It does not know sockets, nor what an asker does when the address has changed; see `green._byname`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import gevent
from gevent.hub import Hub

__all__ = ["AT_ONCE", "FRESH", "LATE", "LIMIT", "Answer", "Host", "Question", "ask", "host_in"]

#: Seconds after which a name service that has not answered is taken for one that does not. Its answer is used when it comes.
LIMIT = 2.0

#: Seconds for which an answer is used again.
FRESH = 0.4

#: Lookups under way in one hub, and those among them of names that were late before.
AT_ONCE, LATE = 4, 2

#: What libzmq allows in the address of a tcp endpoint that it connects to; anything else it refuses itself.
_LEGAL = re.compile(r"(?:[0-9A-Za-z\[:][0-9A-Za-z.\-:%;\[\]_*]*)?:[0-9][0-9A-Za-z.\-%\[\]_*]*")

#: What a resolver says that knows: there is no such name, or it has no address of this kind.
_DEFINITE = frozenset(getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name))


class Host(NamedTuple):
    """An endpoint to connect to that holds a name.

    Attributes:
        endpoint: As it was given.
        source: What stands before the name: "", or a source address with its semicolon.
        name: To be resolved.
        zone: Of a link-local IPv6 address; "" for none.
        port: The number.

    Zone and port are written as libzmq does it in events, though not in those of a first connection: 05555 is 5555, and an
    interface has its name.
    """

    endpoint: str
    source: str
    name: str
    zone: str
    port: str

    def at(self, address: str) -> str:
        """The endpoint with a number instead of the name."""
        return f"tcp://{self.source}{self._bracketed(address)}:{self.port}"

    def aliases(self, address: str) -> frozenset[str]:
        """All that libzmq's events may call this endpoint with a number: it leaves the source out, and maps IPv4 to IPv6."""
        mapped = () if ":" in address else (f"tcp://[::ffff:{address}]:{self.port}",)
        return frozenset((self.at(address), f"tcp://{self._bracketed(address)}:{self.port}", *mapped))

    def _bracketed(self, address: str) -> str:
        if ":" not in address:
            return address
        return f"[{address}%{self.zone}]" if self.zone and "%" not in address else f"[{address}]"


def host_in(endpoint: str) -> Host | None:
    """The host in an endpoint that holds a name; None if it holds a number, is not tcp, or is one that libzmq refuses."""
    if not endpoint.startswith("tcp://") or not _LEGAL.fullmatch(endpoint, 6):
        return None
    source, separator, target = endpoint[6:].rpartition(";")
    host, _, port = target.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    name, _, zone = host.partition("%")
    if _is_number(name):
        return None
    digits = port[: len(port) - len(port.lstrip("0123456789"))]
    return Host(endpoint, source + separator, name, _interface(zone), digits.lstrip("0") or "0")


def _interface(zone: str) -> str:
    """The name of the interface that a zone means, which may be given as its number."""
    try:
        return socket.if_indextoname(int(zone))
    except (ValueError, OSError, OverflowError):
        return zone


def _is_number(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host) if ":" in host else socket.inet_aton(host)
    except OSError:
        return ":" in host  # never a name
    return True


class Answer(NamedTuple):
    """The outcome of a lookup.

    Attributes:
        addresses: In the resolver's order; none if there is a `trouble`.
        trouble: What the resolver says instead, for people.
        is_definite: The resolver knows: waiting for a better answer does not help.
        at: The monotonic time of the answer.
    """

    addresses: tuple[str, ...]
    trouble: str
    is_definite: bool
    at: float


class Question:
    """One question, whose answer is waited for."""

    __slots__ = ("_on_answer",)

    def __init__(self, on_answer: Callable[[Answer], object]) -> None:
        self._on_answer: Callable[[Answer], object] | None = on_answer

    def cancel(self) -> None:
        """Wait no more; the lookup goes on for others."""
        self._on_answer = None

    def answer(self, answer: Answer) -> None:
        """Hand the answer over, in the hub."""
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is not None:
            try:
                on_answer(answer)
            except BaseException:  # noqa: BLE001 - the others get it all the same
                gevent.get_hub().handle_error(on_answer, *sys.exc_info())


#: A name, and whether IPv6 addresses are of use.
_Key = tuple[str, bool]


class _Lookups:
    """The lookups of one hub."""

    def __init__(self) -> None:
        self._asked: dict[_Key, list[Question]] = {}
        self._running: set[_Key] = set()
        #: Whether a name's last lookup was over within `LIMIT`.
        self._in_time: dict[_Key, bool] = {}
        self._answers: dict[_Key, Answer] = {}

    def ask(self, key: _Key, question: Question) -> None:
        now = monotonic()
        self._answers = {each: answer for each, answer in self._answers.items() if now - answer.at < FRESH}
        if key in self._answers:
            gevent.get_hub().loop.run_callback(question.answer, self._answers[key])
            return
        self._asked.setdefault(key, []).append(question)
        self._start()

    def _start(self) -> None:
        """Begin the lookups that there is room for."""
        for key in list(self._asked):
            if key in self._running or not self._has_room(self._in_time.get(key)):
                continue
            self._running.add(key)
            gevent.spawn(_look_up, *key).link(partial(self._on_over, key, monotonic()))

    def _has_room(self, was_in_time: bool | None) -> bool:
        if was_in_time is False and sum(self._in_time.get(each) is False for each in self._running) >= LATE:
            return False
        return len(self._running) < AT_ONCE + bool(was_in_time)

    def _on_over(self, key: _Key, began: float, lookup: gevent.Greenlet) -> None:
        now, answer = monotonic(), lookup.value
        if not isinstance(answer, Answer):
            answer = Answer((), f"the name {key[0]} was not looked up: the lookup was killed", False, now)
        self._running.discard(key)
        self._in_time[key] = now - began <= LIMIT
        self._answers[key] = answer
        for question in self._asked.pop(key, ()):
            question.answer(answer)
        self._start()


def _look_up(name: str, ipv6: bool) -> Answer:
    try:
        addresses = _addresses(name, socket.AF_UNSPEC if ipv6 else socket.AF_INET)
        trouble, is_definite = "" if addresses else f"the name {name} has no address", True
    except Exception as error:  # noqa: BLE001 - whatever a resolver raises is its answer
        addresses, trouble = (), f"the name {name} cannot be resolved: {error}"
        is_definite = getattr(error, "errno", None) in _DEFINITE or isinstance(error, UnicodeError)
    if trouble and is_definite and not ipv6 and _has_ipv6(name):
        trouble = f"the name {name} has IPv6 addresses only: set IPV6, on the Context or on the socket"
    return Answer(addresses, trouble, is_definite, monotonic())


def _addresses(name: str, family: int) -> tuple[str, ...]:
    # Not by gevent.socket, which does the same and is imported only by programs that need it.
    found = gevent.get_hub().resolver.getaddrinfo(name, None, family, socket.SOCK_STREAM)
    texts = (_text(each[4]) for each in found)
    return tuple(dict.fromkeys(texts))


def _text(address: tuple[Any, ...]) -> str:
    """The number in a socket address; a link-local IPv6 one with its zone."""
    has_zone = len(address) == 4 and address[3] and "%" not in address[0]
    return f"{address[0]}%{_interface(str(address[3]))}" if has_zone else str(address[0])


def _has_ipv6(name: str) -> bool:
    try:
        return bool(_addresses(name, socket.AF_INET6))
    except Exception:  # noqa: BLE001 - then what the first lookup said is all there is to say
        return False


_lookups: weakref.WeakKeyDictionary[Hub, _Lookups] = weakref.WeakKeyDictionary()


def ask(host: Host, ipv6: bool, on_answer: Callable[[Answer], object]) -> Question:
    """Have `on_answer` called in this thread's hub, in a later turn of its loop, with what becomes of a lookup.

    Args:
        host: Whose addresses.
        ipv6: Whether IPv6 addresses are of use, and not IPv4 ones only.
        on_answer: Called once, unless the question that is returned is cancelled before.
    """
    question = Question(on_answer)
    hub = gevent.get_hub()
    if hub not in _lookups:
        _lookups[hub] = _Lookups()
    _lookups[hub].ask((host.name.lower(), ipv6), question)
    return question


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lookups.clear)  # they stay under way in the parent
