"""The seed's story on this machine: what a client sees when its server goes wrong, with plain pyzmq and with greensafe.

Every case starts real servers and clients as processes of their own, over TCP, and really kills or stops them. Run `make demo`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

#: Seconds after which a plain client is given up on: it would wait for ever.
PATIENCE = 3.0
#: Seconds of silence after which the greensafe client takes a server for dead.
HEARTBEAT = 0.8
#: The deadline of the greensafe server in the case in which its handler hangs.
DEADLINE = 1.0
#: How long the slow but legitimate reply takes: three times the heartbeat.
SLOW = 2.4
#: Seconds on top of each of these that a busy machine may take.
SPARE = 5.0
#: How many cases are played at the same time: most of each is a plain client's wait.
AT_ONCE = 2


# The servers. Each prints its endpoint, and "got it" when a request has arrived.


def answer(body: bytes, sleep: Callable[[float], None]) -> bytes:
    """What both servers do with a request."""
    print("got it", flush=True)
    if body == b"raise":
        raise ValueError("Unfortunately this failed")
    if body in (b"hang", b"killed", b"journal", b"frozen", b"cut"):
        sleep(3600)
    if body == b"slow":
        sleep(SLOW)
    if body == b"restarted":
        sleep(0.5)
    if body.startswith(b"{"):
        return json.dumps(json.loads(body)).encode()
    return b"this is the answer to " + body


def plain_server(port: str) -> None:
    """The REP loop of the ZeroMQ guide."""
    import zmq

    socket = zmq.Context().socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{port}")
    print(socket.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0"), flush=True)
    while True:
        request = socket.recv()
        socket.send(answer(request, time.sleep))


def greensafe_server(port: str) -> None:
    """The same handler under greensafe's watchdog."""
    import gevent

    import greensafe

    def handler(request: Any) -> bytes:
        if request.body == b"journal":
            first = request.step("first", lambda: request.attempt)
            print("got it", flush=True)
            if request.attempt == 1:
                gevent.sleep(3600)
            second = request.step("second", lambda: request.attempt)
            return b"this is the answer to journal, by run %d and run %d" % (first, second)
        if request.body.startswith(b"{"):
            print("got it", flush=True)
            return json.dumps(request.json()).encode()
        return answer(request.body, gevent.sleep)

    case, folder = sys.argv[4:6]
    deadline = DEADLINE if case == "hang" else 30
    journal = os.path.join(folder, "requests.db") if case == "journal" else None
    server = greensafe.Server(f"tcp://127.0.0.1:{port}", handler, deadline=deadline, journal=journal)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()


def faulty_link(target: str) -> None:
    """A link to a server, for both sides: it prints its endpoint, and swallows everything from the next line it reads on."""
    from gevent.fileobject import FileObject

    from greensafe.testing import FaultyLink

    with FaultyLink(target) as link:
        print(link.endpoint, flush=True)
        commands = FileObject(sys.stdin)
        commands.readline()
        link.cut()
        print("cut", flush=True)
        commands.readline()  # until the demo ends this


# The clients. Each prints one line of JSON: what it saw, after how long, and whether that was as promised.


def report(saw: str, start: float, as_promised: bool) -> None:
    print(json.dumps({"saw": saw, "seconds": time.monotonic() - start, "as_promised": as_promised}), flush=True)


def plain_client(endpoint: str, body: str) -> None:
    """A REQ that waits for its reply; PATIENCE stands in for eternity."""
    import zmq

    socket = zmq.Context().socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    start = time.monotonic()
    socket.send(body.encode())
    if socket.poll((PATIENCE if body != "slow" else PATIENCE + SPARE) * 1000):
        report(f"reply {shown(socket.recv())}", start, True)
    else:
        report("stuck, given up on", start, True)


def greensafe_client(endpoint: str, body: str) -> None:
    """The same question asked by greensafe's Client, without any limit."""
    import greensafe

    with greensafe.Client(endpoint, heartbeat=HEARTBEAT, retries=9) as client:
        start = time.monotonic()
        try:
            reply = client.request(body.encode(), idempotent=body == "restarted")
        except greensafe.RemoteError as error:
            report(f"RemoteError {error.code}", start, is_expected(body, error.code, start))
        except greensafe.PeerSilent as error:
            report(f"PeerSilent: {error.message.partition(': ')[2]}", start, is_expected(body, "PeerSilent", start))
        except greensafe.Disconnected:
            seconds = time.monotonic() - start
            again = client.request(b"again", timeout=PATIENCE)
            as_promised = is_expected(body, "Disconnected", start) and again == b"this is the answer to again"
            saw = f"Disconnected after {seconds:.3f} s; the same client asked the restarted server: answered"
            report(saw, start, as_promised)
        else:
            how = ", by run 1 and run 2" if body == "journal" else ""
            as_promised = reply == f"this is the answer to {body}{how}".encode() and is_expected(body, "reply", start)
            report(f"reply {shown(reply)}", start, as_promised)


#: For each request: what greensafe's client gets, and between how many seconds.
EXPECTED = {
    "raise": ("INTERNAL", 0.0, 0.0),
    "{not json": ("INVALID_ARGUMENT", 0.0, 0.0),
    "killed": ("Disconnected", 0.0, 1.0),
    "restarted": ("reply", 0.5, PATIENCE),
    "journal": ("reply", 0.0, PATIENCE),
    "frozen": ("PeerSilent", 0.0, HEARTBEAT + 0.5),
    "cut": ("PeerSilent", 0.0, HEARTBEAT + 0.5),
    "hang": ("DEADLINE_EXCEEDED", DEADLINE, DEADLINE),
    "slow": ("reply", SLOW, SLOW),
}


def is_expected(body: str, what: str, start: float) -> bool:
    expected, earliest, latest = EXPECTED[body]
    return what == expected and earliest <= time.monotonic() - start <= latest + SPARE


def shown(reply: bytes) -> str:
    return repr(reply.decode())


# The story.


@dataclass
class Case:
    title: str
    body: str


CASES = [
    Case("the handler raises", "raise"),
    Case("the request is invalid JSON", "{not json"),
    Case("the server is killed between send and recv, and restarted", "killed"),
    Case("the same, and the client was told that the request may run twice", "restarted"),
    Case("the same, and the server keeps a journal: it goes on at its first unfinished step", "journal"),
    Case("the server's process is frozen (SIGSTOP)", "frozen"),
    Case("the network is cut off", "cut"),
    Case("the handler hangs", "hang"),
    Case(f"the reply is slow ({SLOW:g} s, three times the heartbeat) but legitimate", "slow"),
]


class Processes:
    """All processes of the demo, and the folder of a journal; none survives it."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []
        self.folder = tempfile.TemporaryDirectory()
        self._is_over = False
        self._starting = threading.Lock()

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *args]
        pipe = subprocess.PIPE
        with self._starting:
            if self._is_over:
                raise RuntimeError("the demo was interrupted")
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
        self.running.remove(process)

    def end_all(self) -> None:
        with self._starting:
            self._is_over = True
        for process in list(self.running):
            with contextlib.suppress(ValueError):
                self.end(process)
        self.folder.cleanup()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints; empty if it dies or says nothing for ten times PATIENCE."""
    assert process.stdout is not None
    overdue = threading.Timer(10 * PATIENCE, process.kill)
    overdue.start()
    try:
        return process.stdout.readline().strip()
    finally:
        overdue.cancel()


def cut(link: subprocess.Popen[str]) -> None:
    """Have a link swallow everything; returns when it does."""
    assert link.stdin is not None
    link.stdin.write("cut\n")
    link.stdin.flush()
    line(link)


def play(processes: Processes, side: str, case: Case) -> dict[str, Any]:
    """One case with one side: a server, a client, and what happens to the server meanwhile."""
    server = processes.start("server", side, "0", case.body, processes.folder.name)
    endpoint = line(server)
    port = endpoint.rpartition(":")[2]
    link = processes.start("link", endpoint) if case.body == "cut" else None
    client = processes.start("client", side, line(link) if link else endpoint, case.body)
    line(server)  # the request has arrived
    if case.body == "frozen":
        os.kill(server.pid, signal.SIGSTOP)
    elif link:
        cut(link)
    elif case.body in ("killed", "restarted", "journal") or (side == "plain" and case.body in ("raise", "{not json")):
        # SIGKILL; or the exception has ended it, and its operator starts it again
        processes.end(server)
        server = processes.start("server", side, port, case.body, processes.folder.name)
        line(server)
    try:
        seen: dict[str, Any] = json.loads(line(client))
    except ValueError:
        seen = {"saw": "nothing: the client died or hung", "seconds": 0.0, "as_promised": False}
    for process in (client, link, server):
        if process:
            processes.end(process)
    return seen


def both(processes: Processes, case: Case) -> dict[str, dict[str, Any]]:
    """One case, both sides at the same time."""
    with ThreadPoolExecutor(2) as sides:
        seen = {side: sides.submit(play, processes, side, case) for side in ("plain", "greensafe")}
    return {side: result.result() for side, result in seen.items()}


def shown_while_it_runs(title: str, running: Future[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Print the title, and a dot for each half second until the case is over; returns what was seen."""
    print(title, end="", flush=True)
    dot = " ."
    while wait([running], 0.5).not_done:
        print(dot, end="", flush=True)
        dot = "."
    print()
    return running.result()


def main() -> int:
    processes = Processes()
    failed = []
    print(f"{len(CASES)} cases, each with plain pyzmq and with greensafe, over TCP, with real processes\n", flush=True)
    cases = ThreadPoolExecutor(AT_ONCE)
    try:
        played = [cases.submit(both, processes, case) for case in CASES]
        for number, (case, running) in enumerate(zip(CASES, played), 1):
            seen = shown_while_it_runs(f"[{number}/{len(CASES)}] {case.title}", running)
            for side, result in seen.items():
                print(f"    {side:<10} after {result['seconds']:5.3f} s: {result['saw']}", flush=True)
            if not seen["greensafe"]["as_promised"]:
                failed.append(case.title)
            stuck = "stuck" in seen["plain"]["saw"]
            if stuck == (case.body == "slow"):
                failed.append(f"{case.title} (plain pyzmq did not behave as described)")
    finally:
        cases.shutdown(wait=False, cancel_futures=True)
        processes.end_all()
    if failed:
        print(f"\nNOT AS PROMISED: {'; '.join(failed)}")
        return 1
    stuck = len(CASES) - 1
    print("\nAs promised: greensafe's client got an answer or an error in every case, without a limit of its own;")
    print(f"plain pyzmq's was stuck in {stuck} of {len(CASES)}.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        {"plain": plain_server, "greensafe": greensafe_server}[sys.argv[2]](sys.argv[3])
    elif sys.argv[1:2] == ["link"]:
        faulty_link(sys.argv[2])
    elif sys.argv[1:2] == ["client"]:
        {"plain": plain_client, "greensafe": greensafe_client}[sys.argv[2]](sys.argv[3], sys.argv[4])
    else:
        sys.exit(main())
