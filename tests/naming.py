"""A name service for tests: a resolver for gevent's hub that knows what the test tells it. No question leaves the machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.event import Event
from helpers import wait_until

from greensafe.transport import names

#: What a name service says that knows that there is no such name, and one that cannot tell now.
NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NOT_NOW = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class NameService:
    """Resolves the names in `table`.

    Attributes:
        table: A name's addresses, or the error that is raised for it. A name that is not there has NO_NAME.
        asked: The names that were asked for, in order.
        under_way: Lookups that hang now, and the most that did at once.
    """

    def __init__(self) -> None:
        self.table: dict[str, list[str] | Exception] = {}
        self.asked: list[str] = []
        self.under_way = self.most = 0
        self._holds: dict[str, Event] = {}

    def hang(self, name: str) -> None:
        """Do not answer for this name, until `answer`."""
        self._holds[name] = Event()

    def answer(self, name: str) -> None:
        """Answer all that was asked for this name, and will be."""
        self._holds.pop(name).set()

    def close(self) -> None:
        """Part of gevent's interface. Nothing hangs any more."""
        for name in list(self._holds):
            self.answer(name)

    def getaddrinfo(self, host: str, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> list[Any]:
        """What gevent calls."""
        self.asked.append(host)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if host in self._holds:
                self._holds[host].wait()
        finally:
            self.under_way -= 1
        found = self.table.get(host, NO_NAME)
        if isinstance(found, Exception):
            raise found
        sockaddrs = [(address, 0, 0, 0) if ":" in address else (address, 0) for address in found]
        kinds = [(socket.AF_INET6 if len(each) == 4 else socket.AF_INET, each) for each in sockaddrs]
        return [(kind, socket.SOCK_STREAM, 6, "", each) for kind, each in kinds if family in (kind, socket.AF_UNSPEC)]


@contextmanager
def name_service() -> Iterator[NameService]:
    """A name service in the place of the hub's resolver."""
    hub = gevent.get_hub()
    resolver, hub.resolver = hub.resolver, NameService()
    names._lookups.clear()
    try:
        yield hub.resolver
    finally:
        hub.resolver.close()
        # Those that wait for their turn must not go to the real one.
        wait_until(lambda: not any(each._asked or each._running for each in names._lookups.values()))
        hub.resolver = resolver
        names._lookups.clear()
