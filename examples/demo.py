"""The seed's story on this machine: what a client sees when its server goes wrong, with plain pyzmq and with greensafe.

Every case starts real servers and clients as processes of their own, over TCP, and really kills them. Run `make demo`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

#: Seconds after which a plain client is given up on: it would wait for ever.
PATIENCE = 3.0
#: The limit of the greensafe client in the case in which its server is killed.
LIMIT = 1.0
#: The deadline of the greensafe server in the case in which its handler hangs.
DEADLINE = 1.0
#: How long the slow but legitimate reply takes.
SLOW = 2.0


# The servers. Each prints its endpoint, and "got it" when a request has arrived.


def answer(body: bytes, sleep: Callable[[float], None]) -> bytes:
    """What both servers do with a request."""
    print("got it", flush=True)
    if body == b"raise":
        raise ValueError("Unfortunately this failed")
    if body in (b"hang", b"killed"):
        sleep(3600)
    if body == b"slow":
        sleep(SLOW)
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
        if request.body.startswith(b"{"):
            print("got it", flush=True)
            return json.dumps(request.json()).encode()
        return answer(request.body, gevent.sleep)

    deadline = {"hang": DEADLINE}.get(sys.argv[4], 30)
    server = greensafe.Server(f"tcp://127.0.0.1:{port}", handler, deadline=deadline)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()


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
    if socket.poll(PATIENCE * 1000):
        report(f"reply {shown(socket.recv())}", start, True)
    else:
        report("stuck, given up on", start, True)


def greensafe_client(endpoint: str, body: str) -> None:
    """The same question asked by greensafe's Client."""
    import greensafe

    with greensafe.Client(endpoint) as client:
        start = time.monotonic()
        try:
            reply = client.request(body.encode(), timeout=LIMIT if body == "killed" else PATIENCE)
        except greensafe.RemoteError as error:
            seconds = time.monotonic() - start
            expected = {"raise": "INTERNAL", "{not json": "INVALID_ARGUMENT", "hang": "DEADLINE_EXCEEDED"}.get(body)
            in_time = seconds < 0.5 or (body == "hang" and seconds < DEADLINE + 0.5)
            report(f"RemoteError {error.code}", start, error.code == expected and in_time)
        except greensafe.OperationTimeout:
            start_again = time.monotonic()
            again = client.request(b"again", timeout=PATIENCE)
            seconds = time.monotonic() - start_again
            saw = f"OperationTimeout; the same client asked again: answered in {seconds:.1f} s"
            in_time = start_again - start < LIMIT + 0.5
            report(saw, start, body == "killed" and again == b"this is the answer to again" and in_time)
        else:
            in_time = SLOW <= time.monotonic() - start < SLOW + 0.5
            report(f"reply {shown(reply)}", start, reply == b"this is the answer to slow" and body == "slow" and in_time)


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
    Case("the handler hangs", "hang"),
    Case(f"the reply is slow ({SLOW:g} s) but legitimate", "slow"),
]

LATER = [
    "told of the disconnect within milliseconds of the kill, instead of by the caller's limit",
    "the killed server's request answered by the restarted server, from its journal",
    "a frozen server, and one behind a cut cable, told apart from a slow one",
]


class Processes:
    """All processes of the demo; none survives it."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        self.running.remove(process)

    def end_all(self) -> None:
        for process in list(self.running):
            with contextlib.suppress(ValueError):
                self.end(process)


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints; empty if it dies or says nothing for twice PATIENCE."""
    assert process.stdout is not None
    overdue = threading.Timer(2 * PATIENCE, process.kill)
    overdue.start()
    try:
        return process.stdout.readline().strip()
    finally:
        overdue.cancel()


def play(processes: Processes, side: str, case: Case) -> dict[str, Any]:
    """One case with one side: a server, a client, and what happens to the server meanwhile."""
    server = processes.start("server", side, "0", case.body)
    endpoint = line(server)
    port = endpoint.rpartition(":")[2]
    client = processes.start("client", side, endpoint, case.body)
    if case.body == "killed":
        line(server)  # the request has arrived
        processes.end(server)  # SIGKILL
        server = processes.start("server", side, port, case.body)
        line(server)
    elif side == "plain" and case.body in ("raise", "{not json"):
        server.wait()  # it died of the exception; its operator starts it again
        processes.end(server)
        server = processes.start("server", side, port, case.body)
        line(server)
    try:
        seen: dict[str, Any] = json.loads(line(client))
    except ValueError:
        seen = {"saw": "nothing: the client died or hung", "seconds": 0.0, "as_promised": False}
    processes.end(client)
    processes.end(server)
    return seen


def both(processes: Processes, case: Case) -> dict[str, dict[str, Any]]:
    """One case, both sides at the same time."""
    seen: dict[str, dict[str, Any]] = {}

    def run(side: str) -> None:
        seen[side] = play(processes, side, case)

    threads = [threading.Thread(target=run, args=(side,), daemon=True) for side in ("plain", "greensafe")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def show(case: Case, seen: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield f"{case.title}"
    for side, result in seen.items():
        yield f"    {side:<10} after {result['seconds']:5.3f} s: {result['saw']}"


def main() -> int:
    processes = Processes()
    failed = []
    print(f"{len(CASES)} cases, each with plain pyzmq and with greensafe, over TCP, with real processes\n", flush=True)
    try:
        for number, case in enumerate(CASES, 1):
            print(f"[{number}/{len(CASES)}] ", end="", flush=True)
            seen = both(processes, case)
            print("\n".join(show(case, {side: seen[side] for side in ("plain", "greensafe")})), flush=True)
            if not seen["greensafe"]["as_promised"]:
                failed.append(case.title)
            stuck = "stuck" in seen["plain"]["saw"]
            if stuck == (case.body == "slow"):
                failed.append(f"{case.title} (plain pyzmq did not behave as described)")
    finally:
        processes.end_all()
    print("\nNot in this version, and not shown:")
    for missing in LATER:
        print(f"    {missing}")
    if failed:
        print(f"\nNOT AS PROMISED: {'; '.join(failed)}")
        return 1
    print("\nAs promised: greensafe's client got an answer or an error in every case; plain pyzmq's was stuck in 4 of 5.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        {"plain": plain_server, "greensafe": greensafe_server}[sys.argv[2]](sys.argv[3])
    elif sys.argv[1:2] == ["client"]:
        {"plain": plain_client, "greensafe": greensafe_client}[sys.argv[2]](sys.argv[3], sys.argv[4])
    else:
        sys.exit(main())
