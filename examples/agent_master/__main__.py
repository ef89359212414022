"""The story on this machine: an agent has itself authorised while its master is killed again and again.

    python examples/agent_master

The article that this library answers tells of agents that got stuck because their master was restarted in the wrong moment of
their authorisation, until somebody logged in to restart them. Here the agent is started once, and nobody touches it. All are
processes of their own, over TCP, and the master is really killed (SIGKILL): as soon as it is there, while the agent waits, and
while the operator accepts.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic, sleep

HERE = Path(__file__).parent

#: Seconds after which something is wrong.
PATIENCE = 60.0

#: Seconds for which the operator has something else to do, with a master killed in each of them.
SLOW = 4


class Cast:
    """All processes of the story; none survives it."""

    def __init__(self) -> None:
        self._start = monotonic()
        self._running: list[subprocess.Popen[str]] = []
        #: Who has printed what; an empty line is the end.
        self._lines: queue.Queue[tuple[subprocess.Popen[str], str]] = queue.Queue()
        self._kept: dict[subprocess.Popen[str], list[str]] = {}

    def say(self, who: str, what: str) -> None:
        print(f"{monotonic() - self._start:7.3f} s  {who:<8}  {what}", flush=True)

    def start(self, who: str, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / args[0]), *args[1:]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._running.append(process)
        threading.Thread(target=self._listen, args=(who, process), daemon=True).start()
        return process

    def _listen(self, who: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(who, line.strip())
            self._lines.put((process, line.strip()))
        self._lines.put((process, ""))

    def line(self, process: subprocess.Popen[str]) -> str:
        """The next line that this one prints; empty if it has ended. queue.Empty after PATIENCE."""
        kept = self._kept.setdefault(process, [])
        while not kept:
            whose, line = self._lines.get(timeout=PATIENCE)
            self._kept.setdefault(whose, []).append(line)
        return kept.pop(0)

    def end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()

    def end_all(self) -> None:
        for process in self._running:
            self.end(process)


def free_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def play(cast: Cast, folder: str) -> bool:
    endpoint = free_endpoint()

    def start_master() -> subprocess.Popen[str]:
        master = cast.start("master", "master.py", endpoint, folder)
        cast.line(master)
        return master

    def kill(master: subprocess.Popen[str], why: str) -> None:
        cast.end(master)
        cast.say("master", f"KILLED {why}")

    agent = cast.start("agent", "agent.py", endpoint, "web1")
    cast.say("agent", "started, before there is any master")
    kill(start_master(), "as soon as it is there")
    master = start_master()
    agents_fingerprint = cast.line(agent).rpartition(" ")[2]
    for _ in range(SLOW):
        sleep(1)
        kill(master, "while the agent waits")
        master = start_master()
    cast.line(cast.start("operator", "accept.py", endpoint, folder))
    kill(master, "while the operator reads that")
    operator = cast.start("operator", "accept.py", endpoint, folder, agents_fingerprint)
    cast.say("operator", "accepts, while there is no master")
    kill(start_master(), "as soon as it is there")
    master = start_master()
    is_accepted, is_authorised = cast.line(operator), cast.line(agent)
    cast.end(master)
    return "is accepted" in is_accepted and is_authorised.startswith("authorised")


def show_history(folder: str) -> None:
    with contextlib.closing(sqlite3.connect(Path(folder) / "master.db")) as db:
        whats = [what for (what,) in db.execute("SELECT what FROM history ORDER BY rowid")]
        (count,) = db.execute("SELECT count(*) FROM sessions").fetchone()
    print(f"\nThe master's tables: {', '.join(whats)}; sessions: {count}")


def main() -> int:
    cast = Cast()
    with tempfile.TemporaryDirectory() as folder:
        try:
            is_well = play(cast, folder)
        finally:
            cast.end_all()
        show_history(folder)
    print("As promised: the agent is authorised, and nobody has touched it." if is_well else "NOT AS PROMISED")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
