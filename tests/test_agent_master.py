"""The agents' master of the examples is killed at every point of its story, really; the agent is told nothing."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gevent
import pytest
from helpers import HANG, LONG, MS, ROOT, kept_port, run_python, wait_until

EXAMPLE = ROOT / "examples" / "agent_master"
DOOMED = ROOT / "tests" / "doomed_master.py"

pytestmark = [pytest.mark.check, pytest.mark.timeout(300)]

#: What each request writes between its Begin and its Finish. Those with a star are effects.
_STORY = {
    "exchange keys": ["*exchange"],
    "authorise": ["*look 1", "nonce", "*session"],
    "accept": ["*accept"],
}


def _write(request: str, what: str) -> list[str]:
    name = f"{request}: {what.removeprefix('*')}"
    return [f"{name} waits", *([f"{name} is done"] if what[0] == "*" else []), f"{name} is stored", f"{name} is told"]


def _points(request: str, *writes: str) -> list[str]:
    answer = [f"{request}: answer leaves", f"{request}: answer left"]
    return [point for each in ("Begin", *writes, "Finish") for point in _write(request, each)] + answer


#: All that a master which is left alone comes through until all have their answers.
POINTS = [point for request, writes in _STORY.items() for point in _points(request, *writes)]

#: The acks come after: those of the last requests perhaps not at all, for their clients end.
ACKS = [point for request in _STORY for point in _write(request, "Ack")]

#: In the middle of the wait.
WAITS = "authorise: look 1 is told"

#: What only one comes through that goes on with a request.
AGAIN = [*_write("authorise", "Rerun"), *_write("authorise", "*look 2")]


@dataclass
class Story:
    """An agent, an operator and as many masters as it takes.

    Attributes:
        ends: The point at which each master kills itself, in turn; the one after the last lives.
        is_eager: The operator accepts as soon as the fingerprint is known, not when the agent's request waits for it.
        killed: How many masters did.
    """

    folder: Path
    endpoint: str
    ends: Sequence[str] = ()
    is_eager: bool = False
    killed: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, program: Path, *args: str | Path) -> subprocess.Popen[bytes]:
        """A process, its output in a file of its name."""
        with open(self.folder / name, "ab") as out:
            process = subprocess.Popen([sys.executable, program, *args], stdout=out, stderr=out, env=self.env)
        self.processes.append(process)
        return process

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE}"}

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def trace(self) -> list[str]:
        """What all masters came through, up to the last whole line."""
        return self.text("trace").split("\n")[:-1]

    def start_master(self) -> None:
        point = self.ends[self.killed : self.killed + 1]
        self.master = self.start("masters", DOOMED, self.endpoint, self.folder, self.folder / "trace", *point)

    def keep_master(self) -> None:
        """What a service manager does: start it again."""
        code = self.master.poll()
        if code is not None:
            assert code == -signal.SIGKILL, self.text("masters")
            self.killed += 1
            self.start_master()

    def replace_master(self) -> None:
        """What an update does."""
        self.stop_master()
        self.start_master()

    def run(self, meanwhile: Callable[[], None] | None = None) -> None:
        """From the start of the agent, when there is no master yet, until the agent and the operator have ended.

        Args:
            meanwhile: Called when the agent's request waits and the operator has not begun.
        """
        agent = self.agent = self.start("agent", EXAMPLE / "agent.py", self.endpoint, "web1")
        self.start_master()
        wait_until(lambda: self.turn(self.fingerprint() and (self.is_eager or self.is_waiting())))
        if meanwhile is not None:
            meanwhile()
        operator = self.start("operator", EXAMPLE / "accept.py", self.endpoint, self.folder, self.fingerprint())
        wait_until(lambda: self.turn(None not in (agent.poll(), operator.poll())))
        assert operator.returncode == 0, self.text("operator")

    def turn(self, is_so: object) -> object:
        """Keep the master, and return this; files are read each time, so not all the time."""
        self.keep_master()
        assert self.agent.poll() in (None, 0), self.text("agent")
        gevent.sleep(10 * MS)
        return is_so

    def fingerprint(self) -> str:
        found = re.search(r"accepts ([0-9a-f]{32})\n", self.text("agent"))
        return found[1] if found else ""

    def is_waiting(self) -> bool:
        return any(re.fullmatch(r"authorise: look \d+ is told", point) for point in self.trace)

    def stop_master(self) -> None:
        self.master.terminate()
        assert self.master.wait(LONG) == 0, self.text("masters")

    def check(self) -> None:
        """The agent has its session, all happened once and in its order, and no finished step was run again."""
        self.master.kill()
        with closing(sqlite3.connect(self.folder / "master.db")) as db:
            history = db.execute("SELECT fingerprint, what FROM history ORDER BY rowid").fetchall()
            keys = db.execute("SELECT key FROM sessions").fetchall()
        assert history == [(self.fingerprint(), what) for what in ("asked", "accepted", "session")]
        assert [hashlib.sha256(key).hexdigest()[:16] for (key,) in keys] == re.findall(
            r"session key (\w+)\n", self.text("agent")
        )
        assert self.text("operator") == "web1 is accepted\n"
        stored = set()
        for point in self.trace:
            step = re.fullmatch(r"(.*: [a-z 0-9]+) (waits|is stored)", point)  # what is not a step begins with a capital letter
            if step and step[2] == "is stored":
                stored.add(step[1])
            elif step:
                assert step[1] not in stored, self.trace


@contextmanager
def _story(folder: Path, *ends: str, is_tcp: bool = False, is_eager: bool = False) -> Iterator[Story]:
    with kept_port() as port:
        story = Story(folder, f"tcp://127.0.0.1:{port}" if is_tcp else f"ipc://{folder}/m", ends, is_eager)
        try:
            yield story
        finally:
            for process in story.processes:
                process.kill()
                process.wait()


def _check_killed(folder: Path, *ends: str, is_eager: bool = False) -> None:
    with _story(folder, *ends, is_tcp=sum(map(len, ends)) % 2 == 0, is_eager=is_eager) as story:
        story.run()
        wait_until(lambda: story.turn(story.killed == len(ends)))  # the last points are reached when all have their answers
        story.check()


def _slow_but(points: Sequence[str], every: int) -> list[object]:
    """All of them; those that `make check` leaves to `make slow` are marked."""
    return [pytest.param(point, marks=() if n % every == 0 else pytest.mark.slow) for n, point in enumerate(points)]


def test_story() -> None:
    """`python examples/agent_master` shows an agent that is authorised while its master is killed, and nobody touches it."""
    result = run_python(EXAMPLE / "__main__.py", limit=3 * HANG)
    assert result.code == 0, result.out + result.err
    assert result.out.count("KILLED") == 7
    assert "asked, accepted, session; sessions: 1\nAs promised" in result.out


def test_points_are_all(tmp_path: Path) -> None:
    """What the tests below kill at is all that a request consists of: a master that is left alone comes through just that."""
    with _story(tmp_path) as story:
        story.run()
        story.check()
        assert set(POINTS) <= set(story.trace) <= {*POINTS, *ACKS}


@pytest.mark.parametrize("point", _slow_but([*POINTS, *ACKS[:3]], 11))
def test_killed_at_each_point(tmp_path: Path, point: str) -> None:
    """A master killed there and started again: the agent is authorised, once, and the operator has accepted it once."""
    _check_killed(tmp_path, point)


@pytest.mark.parametrize(
    "point", _slow_but([*AGAIN, *_points("authorise", "nonce", "*session"), *_points("accept", "*accept")], 14)
)
def test_killed_again(tmp_path: Path, point: str) -> None:
    """The same if the first was killed in the middle of the wait, and the next one, which goes on with it, there."""
    _check_killed(tmp_path, WAITS, point)


@pytest.mark.parametrize("point", _slow_but(_points("accept", "*accept"), 20))
def test_killed_while_an_eager_operator_accepts(tmp_path: Path, point: str) -> None:
    """The same if the operator accepts while the agent's second request is on its way."""
    _check_killed(tmp_path, point, is_eager=True)


@pytest.mark.parametrize("times", [pytest.param(5), pytest.param(15, marks=pytest.mark.slow)])
def test_killed_often_in_the_wait(tmp_path: Path, times: int) -> None:
    """A wait outlives more masters than a request has attempts that come no further, or a client has retries in reserve."""
    _check_killed(tmp_path, *(f"authorise: look {number + 1} is told" for number in range(times)))


def test_stopped_in_the_wait(tmp_path: Path) -> None:
    """A master that is stopped, as for an update, leaves the agent's request to the next one just so."""
    with _story(tmp_path) as story:
        story.run(meanwhile=story.replace_master)
        assert not story.killed
        story.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere(tmp_path: Path, seed: int) -> None:
    """The same for three masters killed at any points, reached or not."""
    chance = random.Random(seed)
    ends = [chance.choice([*POINTS, *ACKS, *AGAIN]) for _ in range(3)]
    with _story(tmp_path, *ends, is_tcp=chance.random() < 0.5, is_eager=chance.random() < 0.5) as story:
        story.run()
        story.check()
