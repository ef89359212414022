"""Is a reply ever lost, or its caller told of an error, when the server is gone as soon as it has replied?"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from time import monotonic

import gevent
import pytest
from gevent.fileobject import FileObject
from helpers import LONG, ROOT, running

import greensafe as zmq
from greensafe import Client
from greensafe.errors import PeerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: For each transport: half of them from a server that speaks bytes, half from processes that end.
COUNT = 10_000
TOGETHER = 10

#: Ends each connection right behind the reply, in the way that the request says; `tests/zmtp.py` in a process of its own.
RAW = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import gevent
from zmtp import Listener, message

def serve(sock):
    connection = Connection(sock)
    header, empty, body = connection.receive()
    how, _, size = body.partition(b" ")
    frames = [header, empty, body + bytes(int(size))]
    if how == b"garbage":
        connection.send(frames, b"\\xff" * 50)
    elif how == b"pieces":
        data = message(frames)
        for at in range(0, len(data), max(1, len(data) // 3)):
            sock.sendall(data[at : at + max(1, len(data) // 3)])
            gevent.sleep(0)
    else:
        connection.send(frames)
    if how == b"half":
        sock.shutdown(1)
        gevent.sleep(0.01)
    connection.close()

from zmtp import Connection
with Listener(sys.argv[1]) as listener:
    print(listener.endpoint, flush=True)
    while True:
        gevent.spawn(serve, listener.accept_raw())
"""

#: For each line read: a process that binds, says where, answers one request and ends.
MORTAL = """
import os, sys, zmq
where = sys.argv[1]
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    if not os.fork():
        context = zmq.Context()
        router = context.socket(zmq.ROUTER)
        router.bind(where.format(number))
        print(router.last_endpoint.decode(), flush=True)
        frames = router.recv_multipart()
        router.send_multipart(frames)
        router.close()
        context.term()
        os._exit(0)
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                break
        except ChildProcessError:
            break
"""


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_connections_that_end(context: zmq.Context, tmp_path: Path, transport: str) -> None:
    """A server that ends the connection behind the reply, in one segment with it or in several: 0 lost, 0 false errors."""
    chance = random.Random(4)
    seen: Counter[str] = Counter()
    start = monotonic()

    def ask(count: int, endpoint: str) -> None:
        for _ in range(count):
            how = chance.choice([b"close", b"garbage", b"pieces", b"half"])
            body = b"%s %d" % (how, chance.choice([0, 10, 1000, 9000, 70_000]))
            with Client(endpoint, context=context, timeout=LONG) as client:
                try:
                    reply = client.request(body)
                except Exception as error:
                    seen[f"{body!r}: {type(error).__name__}"] += 1
                else:
                    seen["replies" if reply.startswith(body) else "wrong replies"] += 1

    address = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/s"
    with running([sys.executable, "-c", RAW, address]) as (_, endpoint):
        asking = [gevent.spawn(ask, COUNT // 2 // TOGETHER, endpoint) for _ in range(TOGETHER)]
        gevent.joinall(asking, raise_error=True)
    print(f"\n{transport}, connection ended behind the reply: {dict(seen)} in {monotonic() - start:.0f} s")
    assert seen == {"replies": COUNT // 2}


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_processes_that_end(context: zmq.Context, tmp_path: Path, transport: str) -> None:
    """A libzmq server whose process ends as soon as its reply has left: 0 lost, 0 false errors."""
    import subprocess

    seen: Counter[str] = Counter()
    start = monotonic()
    where = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/{{}}"
    process = subprocess.Popen([sys.executable, "-c", MORTAL, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    lines = FileObject(process.stdout, "rb", close=False)
    try:
        assert lines.readline() == b"ready\n"
        for number in range(COUNT // 2):
            process.stdin.write(b"\n")
            endpoint = lines.readline().decode().strip().rstrip("\0")
            with Client(endpoint, context=context, timeout=LONG) as client:
                body = b"%d" % number
                try:
                    reply = client.request(body)
                except (PeerError, zmq.OperationTimeout) as error:
                    seen[type(error).__name__] += 1
                else:
                    seen["replies" if reply == body else "wrong replies"] += 1
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    print(f"\n{transport}, process ended behind the reply: {dict(seen)} in {monotonic() - start:.0f} s")
    assert seen == {"replies": COUNT // 2}
