"""A server with a journal, killed at each point of its work: does each request get its one answer, and nothing is done twice?

What the points are says `mortal`. A small scenario, in which all that a journal is for comes up once, is played again and
again, and each time the server is killed at the next point, until one is played without a kill. A sample of it is played in
every run of the tests; all of it, and with a second kill some points after the first, by `make slow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import gevent.os
import pytest
from helpers import LONG, ROOT, wait_until

import greensafe as zmq
from greensafe import Client, RemoteError
from greensafe.testing import FaultyLink

#: The parts of the scenario, methods of `Play`: each with servers and a journal of its own.
ACTS = ("steps", "fail", "many", "later", "kill", "drain", "join", "replay")

#: Those that need a link which can fail.
LINKED = ("join", "replay")

#: Points from one kill of the sample to the next: prime, so that it meets all kinds of them.
EVERY = 37

#: Points from the first kill to the second, in the exhaustive run.
APART = (1, 17)


class Forge:
    """The process that has imported everything, and makes servers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mortal.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders = self._process.stdin
        self._said = self._process.stdout
        self._rest = b""
        gevent.os.make_nonblocking(self._said.fileno())

    def order(self, *order: Any) -> None:
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()

    def read(self) -> int:
        """The next number that it says; waits cooperatively."""
        while b"\n" not in self._rest:
            read = gevent.os.nb_read(self._said.fileno(), 100)
            assert read, "it has ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return int(line)

    def close(self) -> None:
        self._orders.close()
        try:
            self._process.wait(timeout=LONG)
        finally:
            self._process.kill()
            self._process.wait()
            self._said.close()


class Site:
    """One server after the other, with one journal: whenever one has ended the next is started, until it is closed."""

    def __init__(self, forge: Forge, folder: Path, deadly: Sequence[int] = (), max_attempts: int = 1_000) -> None:
        folder.mkdir()
        self.folder = folder
        self.endpoint = f"ipc://{folder}/server"
        self.journal = folder / "requests.db"
        self.log = folder / "log"
        self._points = folder / "points"
        self.ends: list[int] = []
        self._forge = forge
        self._order = [self.endpoint, str(self.journal), str(self.log), max_attempts, str(self._points), list(deadly)]
        self._process = 0
        self._is_closing = False
        self._keeper = gevent.spawn(self._keep)

    @property
    def points(self) -> bytes:
        """A letter for each that was passed."""
        return self._points.read_bytes() if self._points.exists() else b""

    def _keep(self) -> None:
        while not self._is_closing:
            self._forge.order(*self._order)
            self._process = self._forge.read()
            end = self._forge.read()
            self._process = 0
            self.ends.append(end)

    def signal(self, number: int) -> None:
        """Whoever serves now gets this signal, and ends."""
        wait_until(lambda: self._process)
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(self._process, number)

    def has_logged(self, line: str) -> bool:
        return self.log.exists() and f"{line}\n" in self.log.read_text()

    def allow(self, name: str) -> None:
        """A handler that waits for this goes on."""
        (self.folder / name.replace(" ", "-")).touch()

    def is_answered(self, request_id: bytes) -> bool:
        """Whether an answer is in the journal."""
        if not self.journal.exists():
            return False
        with contextlib.closing(sqlite3.connect(f"file:{self.journal}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT state FROM greensafe_requests WHERE id = ?", (request_id,)).fetchone()
        return found is not None and found[0] > 0

    def close(self) -> None:
        self._is_closing = True
        while not self._keeper.ready():
            self.signal(signal.SIGTERM)
            self._keeper.join(1)
        self._keeper.get()


class Play:
    """One act, in which something is asked, and what comes must be right."""

    def __init__(self, site: Site, context: zmq.Context) -> None:
        self._site = site
        self._context = context
        self.asked: list[str] = []

    def run(self, act: str) -> None:
        with FaultyLink(self._site.endpoint) as link:
            endpoint = link.endpoint if act in LINKED else self._site.endpoint
            with Client(endpoint, context=self._context, retries=1_000_000) as client:
                # Until a client has heard of a server it cannot know that it may send again.
                client.request(b"hello", idempotent=True)
                getattr(self, act)(client, link)

    def steps(self, client: Client, link: FaultyLink) -> None:
        """Two steps, and one in the journal's transaction."""
        self.ask(client, "plain")

    def fail(self, client: Client, link: FaultyLink) -> None:
        """An error is an answer like any other."""
        with pytest.raises(RemoteError) as caught:
            self.ask(client, "failing")
        assert (caught.value.code, caught.value.message) == ("INTERNAL", "first")

    def many(self, client: Client, link: FaultyLink) -> None:
        """Several at once, in one batch."""
        gevent.joinall([gevent.spawn(self.ask, client, f"plain {number}") for number in range(4)], raise_error=True)

    def later(self, client: Client, link: FaultyLink) -> None:
        """The handler has ended, and the answer comes from elsewhere."""
        with self._asking(client, "later"):
            wait_until(lambda: self._site.has_logged("done first later"))

    def kill(self, client: Client, link: FaultyLink) -> None:
        """Killed by hand between two steps, so that there is a rerun in any case."""
        with self._asking(client, "held by a kill"):
            wait_until(lambda: self._site.has_logged("done first held by a kill"))
            self._site.signal(signal.SIGKILL)

    def drain(self, client: Client, link: FaultyLink) -> None:
        """Stopped in an orderly way, but too early: INTERRUPTED."""
        with self._asking(client, "held by a stop"):
            wait_until(lambda: self._site.has_logged("done first held by a stop"))
            ends = len(self._site.ends)
            self._site.signal(signal.SIGTERM)
            wait_until(lambda: len(self._site.ends) > ends)

    def join(self, client: Client, link: FaultyLink) -> None:
        """Sent again while it runs."""
        with self._asking(client, "held by a reset") as asking:
            wait_until(lambda: asking.ready() or _is_heard(client))
            retries = client.stats.retries
            link.reset()
            wait_until(lambda: asking.ready() or (client.stats.retries > retries and _is_heard(client)))

    def replay(self, client: Client, link: FaultyLink) -> None:
        """Sent again when the answer is stored, and has not arrived."""
        link.stall("to_client")
        asking = gevent.spawn(self.ask, client, "replayed")
        (asked,) = wait_until(client._requester.asked)
        # Nobody behind a link that stands still is told that a server has died, be it right after its first answer; nor can the
        # next one be reached.
        wait_until(lambda: self._site.ends or self._site.is_answered(asked.request_id))
        link.reset()
        link.heal()
        asking.get()

    @contextlib.contextmanager
    def _asking(self, client: Client, name: str) -> Iterator[gevent.Greenlet]:
        """The handler goes on when the block ends; then the answer must come."""
        asking = gevent.spawn(self.ask, client, name)
        yield asking
        self._site.allow(name)
        asking.get()

    def ask(self, client: Client, name: str) -> None:
        self.asked.append(name)
        assert client.request(name.encode()) == f"{name}: first row last".encode()


def _is_heard(client: Client) -> bool:
    """Whether it asks something, and a server has said that it works on that."""
    asked = client._requester.asked()
    # What was lost keeps the mark until it is sent again.
    return bool(asked) and all(each.is_heard and each.connection is not None for each in asked)


def _play(forge: Forge, context: zmq.Context, folder: Path, act: str, *deadly: int) -> bytes:
    """Play it once, with kills at these points, and judge; returns the points that were passed."""
    site = Site(forge, folder, deadly)
    play = Play(site, context)
    try:
        with gevent.Timeout(LONG, AssertionError("it is stuck")):
            play.run(act)
    except BaseException as error:
        error.add_note(f"killed at {deadly} of {site.points!r}; asked {play.asked}, ends {site.ends}")
        raise
    finally:
        with gevent.Timeout(LONG, AssertionError("the server does not end")):
            site.close()
    note = (deadly, site.points[: max(deadly, default=0)][-20:], site.ends, site.log.read_text())
    assert set(site.ends) <= {0, -signal.SIGKILL}, note
    assert not _again(site.log), note
    with contextlib.closing(sqlite3.connect(site.journal)) as connection:
        rows = Counter(name for (name,) in connection.execute("SELECT name FROM effects"))
        assert rows == Counter(["hello", *(name for name in play.asked if name != "failing")]), note
        states = Counter(state for (state,) in connection.execute("SELECT state FROM greensafe_requests"))
    assert set(states) <= {1, 2}, (states, note)  # answered, or acknowledged: nothing is left open
    assert states.total() == len(play.asked) + 1, (states, note)
    return site.points


def _again(log: Path) -> list[str]:
    """The finished steps that were run once more. One process at a time writes to the log, so its order is the real one."""
    done, again = set(), []
    for line in log.read_text().splitlines():
        what, _, step = line.partition(" ")
        if what == "done":
            done.add(step)
        elif step in done:
            again.append(step)
    return again


@pytest.fixture
def forge() -> Iterator[Forge]:
    made = Forge()
    yield made
    made.close()


@pytest.mark.check
@pytest.mark.parametrize("act", ACTS)
def test_some_points(context: zmq.Context, tmp_path: Path, forge: Forge, act: str) -> None:
    """Killed at some points, each client gets its one answer, no finished step runs again, and effects happen exactly once."""
    count = len(_play(forge, context, tmp_path / "0", act))
    assert count > 20
    for number in range(1 + ACTS.index(act), count, EVERY):
        _play(forge, context, tmp_path / str(number), act, number)


@pytest.mark.usefixtures("limit")
def test_a_poisonous_request(context: zmq.Context, tmp_path: Path, forge: Forge) -> None:
    """What kills the process every time does so three times; then it is ABORTED, and the others have had their answers."""
    site = Site(forge, tmp_path / "0", max_attempts=3)
    play = Play(site, context)
    over = False

    def ask(client: Client, number: int) -> None:
        turn = 0
        while not over:
            play.ask(client, f"plain {number}.{turn}")
            turn += 1

    try:
        with Client(site.endpoint, context=context, retries=1_000_000) as client:
            client.request(b"hello", idempotent=True)
            others = [gevent.spawn(ask, client, number) for number in range(4)]
            with pytest.raises(RemoteError) as caught:
                client.request(b"poison")
            assert (caught.value.code, caught.value.type) == ("ABORTED", "TooManyAttempts")
            assert site.ends == [-signal.SIGKILL] * 3
            over = True
            gevent.joinall(others, raise_error=True)
    finally:
        site.close()
    assert not _again(site.log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("apart", [0, *APART])
@pytest.mark.parametrize("act", ACTS)
def test_each_point(context: zmq.Context, tmp_path: Path, forge: Forge, act: str, apart: int) -> None:
    """The same, killed at each point there is; and once more some points later."""
    number, kinds = 0, Counter[str]()
    while True:
        number += 1
        points = _play(forge, context, tmp_path / str(number), act, number, number + apart)
        if len(points) < number:
            break
        kinds[chr(points[number - 1])] += 1
    print(f"\n{act}: killed at each of {number - 1} points{f', and {apart} later' * (apart > 0)}: {dict(kinds)}")
    assert set("oOwWcrRCsSLaA") <= set(kinds)
