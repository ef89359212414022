"""What importing greensafe takes, and what it must not depend on: the platform, and when gevent patches."""

from __future__ import annotations

import textwrap

import pytest
from helpers import HANG, run_python

#: Takes away what the platform lacks, before anything of ours or of pyzmq's is imported.
ELSEWHERE = """
import os, signal, socket, sys
platform, os_name = sys.argv[1:]
import asyncio, logging, gevent, gevent.signal  # which look at the platform themselves, and have their own guards
if platform == "win32":
    for name in ("fork", "forkpty", "register_at_fork", "geteuid", "getuid", "sched_getaffinity", "waitpid", "WNOHANG"):
        if hasattr(os, name):
            delattr(os, name)
    for name in dir(signal):
        if name.startswith("SIG") and name not in ("SIGINT", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIG_DFL", "SIG_IGN"):
            delattr(signal, name)
    for name in ("fcntl", "grp", "pwd", "resource", "termios"):
        sys.modules[name] = None
    del socket.AF_UNIX
os.environ.pop("NOTIFY_SOCKET", None)
sys.platform, os.name = platform, os_name
"""

USE = """
import greensafe, greensafe.auth, greensafe.green, greensafe.monkey
import greensafe as zmq
for name in zmq.__all__:
    getattr(zmq, name)
with zmq.Context() as context, context.socket(zmq.REP) as rep, context.socket(zmq.REQ) as req:
    req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")
    req.send(b"x")
    assert rep.recv(timeout=300) == b"x"
    try:
        req.recv(timeout=0.01)
    except zmq.OperationTimeout:
        print("fine")
"""


@pytest.mark.parametrize(("platform", "os_name"), [("win32", "nt"), ("darwin", "posix"), ("linux", "posix")])
def test_import_where_there_are_no_signals_nor_forks(platform: str, os_name: str) -> None:
    """Windows and macOS lack signals, fork, ipc and modules that Linux has: importing greensafe fails on none, and it works."""
    result = run_python(ELSEWHERE + USE, platform, os_name, limit=3 * HANG, env={"PYTHONWARNINGS": "error"})
    assert (result.code, result.out) == (0, "fine\n"), result.err


PATCHED = """
import sys
if "before" in sys.argv:
    import greensafe, greensafe.auth, greensafe.monkey
from gevent import monkey
monkey.patch_all()
import threading, time
import gevent
import greensafe as zmq
from greensafe.auth import Authenticator

ticks = 0

def tick():
    global ticks
    while True:
        time.sleep(0.001)
        ticks += 1

def others_run(wait):
    names = set()
    for _ in range(100):  # on a busy machine a wait may be over before anybody had a turn
        before = ticks
        try:
            wait()
        except zmq.TimedOut as error:
            names.add(type(error).__name__)
        if ticks > before:
            return names, True
    return names, False

def in_threads(call):
    results = []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results

gevent.spawn(tick)
with zmq.Context() as context, Authenticator(context) as auth:
    auth.configure_plain(passwords={"name": "word"})
    with zmq.Server("tcp://127.0.0.1:0", lambda request: request.body[::-1], deadline=300) as server:
        with zmq.Client(server.endpoint, timeout=300) as client:
            print(client.request(b"abc"), in_threads(lambda: client.request(b"def")))
    with context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://a")
        b.connect("inproc://a")
        b.send_multipart([b"x", bytes(100_000)], copy=False)
        print([len(frame) for frame in a.recv_multipart()])
        poller = zmq.Poller()
        poller.register(a, zmq.POLLIN)
        for wait in (
            lambda: a.recv(timeout=0.05), lambda: a.poll(50), lambda: poller.poll(50), lambda: zmq.select([a], [], [], 0.05),
            lambda: zmq.deadline(0.05)(a.recv)(), lambda: zmq.deadline(0.05)(time.sleep)(60),
        ):
            print(*others_run(wait))
print(threading.active_count(), zmq.Context.instance().closed)
zmq.Context.instance().term()
"""


def test_import_before_patch_all_gives_the_same() -> None:
    """Sockets, servers, clients, threads, limits and zero-copy sends do the same, and nothing warns."""
    first, second = (
        run_python(textwrap.dedent(PATCHED), when, limit=3 * HANG, env={"PYTHONWARNINGS": "error"})
        for when in ("before", "after")
    )
    assert (first.code, first.err) == (second.code, second.err) == (0, "")
    assert first.out == second.out
    assert "False" not in first.out.rsplit("\n", 2)[0]
