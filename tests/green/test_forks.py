"""What was made before a fork, used in the child: a program as gunicorn --preload makes them, run as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import HANG, run_python

PROGRAM = """
import os, sys
PATCH
import gevent
import greensafe as zmq

def reply(request):
    return b"%d: " % os.getpid() + request.body

server = zmq.Server("ipc://FOLDER/s", reply, deadline=300)
client = zmq.Client("ipc://FOLDER/s", timeout=300)
context = zmq.Context()
context.default_timeout = 300
inherited = context.socket(zmq.REQ)
inherited.connect("ipc://FOLDER/s")
if "started" in sys.argv:
    server.start()
    assert client.request(b"warm") == b"%d: warm" % os.getpid()
    inherited.send(b"warm")
    assert inherited.recv() == b"%d: warm" % os.getpid()
parent = os.getpid()
children = []
for number in range(2):
    child = os.fork()
    if not child:
        try:
            assert client.request(b"child") == b"%d: child" % parent
            assert client.request(b"child") == b"%d: child" % parent
            req = context.socket(zmq.REQ)
            req.connect("ipc://FOLDER/s")
            req.send(b"socket")
            assert req.recv() == b"%d: socket" % parent
            try:
                inherited.recv(timeout=1)
            except RuntimeError as error:
                assert "fork" in str(error)
            except zmq.ZMQError as error:
                assert error.errno == zmq.EFSM
            else:
                raise AssertionError("the parent's socket was used")
            own = zmq.Server("ipc://FOLDER/%d" % os.getpid(), reply, deadline=300)
            with own, zmq.Client(own.endpoint, timeout=300) as mine:
                assert mine.request(b"own") == b"%d: own" % os.getpid()
            req.close()
            client.close()
            server.stop()
            context.destroy(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
server.start()
for child in children:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        gevent.sleep(0.005)
    print(os.waitstatus_to_exitcode(status))
assert client.request(b"still") == b"%d: still" % parent
inherited.send(b"still")
assert inherited.recv() == b"%d: still" % parent
server.stop()
print("parent fine")
"""


MADE_IN_THE_CHILD = """
import os, signal, sys
import gevent
import zmq as plain
import greensafe as zmq

zmq.Context().term()  # the hub's threadpool has a thread, which stays in the parent
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    signal.alarm(600)  # a child that hangs ends itself
    status = 1
    try:
        context = plain.Context() if "plain" in sys.argv else zmq.Context.instance()
        with zmq.Server("ipc://FOLDER/s", lambda request: request.body, deadline=300, context=context) as server:
            with zmq.Client(server.endpoint, timeout=300, context=context) as client:
                assert client.request(b"x") == b"x"
        assert gevent.get_hub().threadpool.apply(int) == 0
        context.term()
        status = 0
    finally:
        os._exit(status)
"""


@pytest.mark.parametrize("kind", ["green", "plain"])
def test_made_in_a_forked_child(tmp_path: Path, kind: str) -> None:
    """A context, a server and a client first made in a child that os.fork made work there, and the context ends."""
    result = run_python(MADE_IN_THE_CHILD.replace("FOLDER", str(tmp_path)), kind)
    assert result.out == "0\n", result.out + result.err


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
@pytest.mark.parametrize("state", ["started", "fresh"])
@pytest.mark.parametrize("loop", ["libev", "libuv-cffi"])
def test_used_in_a_forked_child(tmp_path: Path, patch: str, state: str, loop: str) -> None:
    """Clients and contexts open their own sockets in the child, a server is not started there, and the parent feels nothing."""
    if loop != "libev":
        pytest.importorskip("cffi")
    program = PROGRAM.replace("PATCH", patch).replace("FOLDER", str(tmp_path))
    result = run_python(program, state, env={"GEVENT_LOOP": loop} if loop != "libev" else None)
    assert result.out.split("\n")[:3] == ["0", "0", "parent fine"], result.out + result.err


FORK_IN_A_CALLBACK = """
import os, sys
PATCH
import gevent
import greensafe as zmq
context = zmq.Context.instance()
a, b = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
a.bind("tcp://127.0.0.1:*")
b.connect(a.last_endpoint)
poller = zmq.Poller()
poller.register(a)
waiter = gevent.spawn(a.recv)
gevent.sleep(0)
server = zmq.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=300)
server.start()
client = zmq.Client(server.endpoint, timeout=300)
if "client" in sys.argv:
    client.request(b"1")  # is switched to by the client's pump, in the middle of reading
else:
    b.send(b"x")
    waiter.get()  # and this by one that the socket's watcher has switched to
    waiter = gevent.spawn(a.recv)
    gevent.sleep(0)
child = os.fork()
if not child:
    for use in (
        lambda: a.recv(), lambda: a.recv(timeout=0), lambda: a.recv_multipart(zmq.NOBLOCK), lambda: a.send(b"no"),
        lambda: a.send_multipart([b"no", b"no"]), lambda: a.poll(), lambda: a.poll(0), lambda: poller.poll(0), lambda: a.events,
        lambda: zmq.select([a], [], [], 0),
    ):
        for _ in range(2):
            try:
                use()
            except RuntimeError as error:
                assert "fork" in str(error)
            else:
                raise AssertionError(use)
    other = zmq.Context.instance()
    assert other is not context
    with other.socket(zmq.PAIR) as x, context.socket(zmq.PAIR) as y:
        x.bind("tcp://127.0.0.1:*")
        y.connect(x.last_endpoint)
        y.send_multipart([b"own", bytes(100_000)], copy=False)
        assert x.recv(timeout=300) == b"own"
    a.close()  # the child's copy of the waiter ends
    try:
        waiter.get(timeout=300)
    except RuntimeError as error:
        assert "fork" in str(error)
    assert client.request(b"child") == b"child"
    sys.exit(0)
gevent.sleep(0)
while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    gevent.sleep(0.005)
assert status == 0, status
b.send(b"parent")
assert waiter.get(timeout=300) == b"parent"
print("fine")
client.close(), server.stop(), a.close(), b.close(), context.term()
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
@pytest.mark.parametrize("switched_by", ["client", "watcher"])
def test_a_fork_out_of_a_callback(patch: str, switched_by: str) -> None:
    """A greenlet that a message has woken forks: the child reads no more of the parent's sockets, and none of them can be used.

    libzmq says EINTR there and pyzmq asks again, for ever: the child never came back.
    """
    result = run_python(FORK_IN_A_CALLBACK.replace("PATCH", patch), switched_by, limit=3 * HANG)
    assert (result.code, result.out) == (0, "fine\n"), result.err
