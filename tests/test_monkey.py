"""Tests of greensafe.monkey; every patched program is a process of its own."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT, run_python

#: What every program begins with: `ticks` counts the turns that other greenlets got meanwhile.
TICKER = """
import gevent, time
ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1
ticker = gevent.spawn(tick)
"""

PATCH = """
import greensafe.monkey
greensafe.monkey.patch_zmq()
"""


def run(program: str, *, before: str = "", is_silent: bool = True, env: dict[str, str] | None = None) -> None:
    """Run `before`, patch, count ticks and run the program, every warning an error and nothing on stderr if `is_silent`."""
    text = textwrap.dedent(before) + PATCH + TICKER + textwrap.dedent(program)
    result = run_python(text, env={"PYTHONWARNINGS": "error", **(env or {})})
    assert result.code == 0, result.err
    assert not is_silent or result.err == ""


def test_plain_program_becomes_cooperative() -> None:
    """A REQ and a REP of a program that knows only zmq talk in two greenlets, and a recv that waits stops nobody."""
    run("""
        import zmq
        context = zmq.Context()
        rep, req = context.socket(zmq.REP), context.socket(zmq.REQ)
        req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")

        def answer():
            request = rep.recv()
            gevent.sleep(0.05)
            rep.send(b"to " + request)

        server = gevent.spawn(answer)
        req.send(b"it")
        assert req.recv() == b"to it"
        assert ticks
        assert type(req) is zmq.Socket and isinstance(req, greensafe.Socket)
        server.get()
        req.close(), rep.close(), context.term()
    """)


def test_poll_and_select_are_cooperative() -> None:
    """Poller.poll, zmq.select, zmq_poll, Socket.poll and RCVTIMEO wait without stopping others."""
    run("""
        import zmq
        context = zmq.Context()
        pull = context.socket(zmq.PULL)
        pull.rcvtimeo = 30
        poller = zmq.Poller()
        poller.register(pull, zmq.POLLIN)

        def receive():
            try:
                pull.recv()
            except zmq.Again:
                pass

        for wait in (
            lambda: poller.poll(30),
            lambda: pull.poll(30),
            lambda: zmq.select([pull], [], [], 0.03),
            lambda: zmq.zmq_poll([(pull, zmq.POLLIN)], 30),
            receive,
        ):
            before = ticks
            wait()
            assert ticks > before
        pull.close(), context.term()
    """)


def test_names_imported_before_the_patch_are_replaced() -> None:
    """`from zmq import Context` before the patch is the green one after it, `Context.instance` bound before it too."""
    run(
        """
        import zmq
        assert Context is zmq.Context and issubclass(Context, greensafe.Context)
        assert Short is zmq.Socket and issubclass(Short, greensafe.Socket)
        assert Poller is zmq.Poller is zmq.sugar.Poller is zmq.sugar.poll.Poller and issubclass(Poller, greensafe.Poller)
        assert zmq.sugar.context.Context is zmq.sugar.Context is Context
        assert zmq.sugar.socket.Socket is zmq.sugar.Socket is Short
        assert device is zmq.device is greensafe.device
        assert helper.Socket is Short
        assert instance() is Context.instance()
        Context.instance().term()
        """,
        before="""
        import sys, types
        from zmq import *
        from zmq import Context, Poller, Socket as Short, device
        instance = Context.instance
        helper = sys.modules["helper"] = types.ModuleType("helper")
        helper.Socket = Short
        """,
    )


def test_all_that_green_has_is_replaced() -> None:
    """Each name for which greensafe.green has its own is that one in zmq, in zmq.sugar and in zmq.devices."""
    run("""
        import zmq, zmq.devices
        for name in greensafe.monkey.NAMES:
            green, original = vars(greensafe.green)[name], greensafe.monkey.get_original(name)
            if green is original:
                continue
            now = getattr(zmq, name)
            assert now is green or issubclass(now, green), name
            assert vars(zmq.sugar).get(name, now) is vars(zmq.devices.basedevice).get(name, now) is now, name
            assert vars(zmq.backend).get(name) is not now, name
    """)


def test_instances_stay_instances() -> None:
    """isinstance and issubclass with zmq's names hold for what was made before, after, by greensafe and by zmq.asyncio."""
    run("""
        import zmq, zmq.asyncio, zmq.green
        original = greensafe.monkey.get_original
        old, new, green = original("Context")(), zmq.Context(), greensafe.Context()
        contexts = [old, new, green, zmq.green.Context()]
        assert all(isinstance(each, zmq.Context) for each in contexts)
        sockets = [each.socket(zmq.REQ) for each in contexts]
        assert all(isinstance(each, zmq.Socket) for each in sockets)
        assert type(sockets[0]) is original("Socket") and not isinstance(sockets[0], greensafe.Socket)
        assert issubclass(zmq.asyncio.Socket, zmq.Socket) and not issubclass(zmq.Context, zmq.Socket)
        assert isinstance(original("Poller")(), zmq.Poller) and not isinstance(None, zmq.Socket)
        shadow = zmq.Socket(sockets[0])
        assert shadow.underlying == sockets[0].underlying and isinstance(shadow, greensafe.Socket)
        assert zmq.Context(old).underlying == old.underlying
        [each.destroy(linger=0) for each in contexts]
    """)


def test_classes_derived_after_the_patch() -> None:
    """A subclass is green, generic or abstract as it may be, and what it says about its instances is exact."""
    run("""
        import abc, zmq

        class MySocket(zmq.Socket[bytes], abc.ABC):
            @property
            def twice(self):
                return 2

        class MyContext(zmq.Context[MySocket]):
            _socket_class = MySocket

        with MyContext() as context, context.socket(zmq.PULL) as mine, zmq.Socket(context, zmq.PULL) as other:
            assert type(mine) is MySocket and mine.twice == 2
            assert isinstance(mine, MySocket) and isinstance(mine, greensafe.Socket) and not isinstance(other, MySocket)
            assert issubclass(MySocket, zmq.Socket) and not issubclass(zmq.Socket, MySocket)
            before = ticks
            assert not mine.poll(20) and ticks > before
        own = MyContext.instance()
        assert type(own) is MyContext and own is not zmq.Context.instance()
        own.term(), zmq.Context.instance().term()
    """)


def test_instance_is_shared_with_greensafe() -> None:
    """zmq.Context.instance() is green and greensafe.Context.instance(), whoever asks first, again after it was terminated."""
    run("""
        import zmq
        first = zmq.Context.instance()
        assert first is greensafe.Context.instance() is zmq.Context.instance() is first.instance()
        with first.socket(zmq.PAIR) as sock:
            assert type(sock) is zmq.Socket
        first.term()
        second = greensafe.Context.instance()
        assert second is not first and second is zmq.Context.instance() and isinstance(second, zmq.Context)
        second.term()
    """)


BEFORE = """
import warnings
import zmq, zmq.asyncio, zmq.green, zmq.utils.garbage
import greensafe, greensafe.monkey
"""

WARN = """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    greensafe.monkey.patch_zmq()
    greensafe.monkey.patch_zmq()
for each in seen:
    print(f"{each.category.__name__} {each.filename}: {each.message}")
"""


def warned(program: str) -> str:
    """What patch_zmq says, called twice after `program`."""
    result = run_python(BEFORE + textwrap.dedent(program) + WARN)
    assert result.code == 0, result.err
    return result.out.strip()


def test_warns_once_about_what_was_made_before() -> None:
    """One warning, at the caller's line, names derived classes, living objects and Context.instance()."""
    said = warned("""
        class MySocket(zmq.Socket):
            pass

        class Deeper(MySocket):
            pass

        context = zmq.Context()
        sockets = [context.socket(zmq.REQ), context.socket(zmq.REQ), MySocket(context, zmq.REP)]
        poller = zmq.Poller()
        zmq.Context.instance()
    """)
    assert said.startswith("MonkeyPatchWarning <string>: patch_zmq() comes too late")
    assert said.count("\n") == 0
    assert "the classes __main__.Deeper, __main__.MySocket;" in said
    objects = "1 x __main__.MySocket, 2 x zmq.sugar.context.Context, 1 x zmq.sugar.poll.Poller, 2 x zmq.sugar.socket.Socket"
    assert f"the objects {objects};" in said
    assert "Context.instance()" in said


def test_warns_about_nothing_that_is_well() -> None:
    """Nothing is said about what is closed, cooperative by itself, or plain on purpose."""
    said = warned("""
        import asyncio

        class Mine(greensafe.Socket):
            pass

        class Async(zmq.asyncio.Context):
            pass

        async def make():
            context = Async()
            return context, context.socket(zmq.REQ), zmq.asyncio.Poller()

        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.close()
        kept = asyncio.run(make()), greensafe.Context(), zmq.green.Context().socket(zmq.REQ), greensafe.Poller()
        server = greensafe.Server("tcp://127.0.0.1:*", bytes, deadline=None)
        server.start()
        client = greensafe.Client(server.endpoint)
        client.request_multipart
        zmq.utils.garbage.gc.start()
    """)
    assert said == ""


def test_patching_twice_does_nothing() -> None:
    """A second call replaces nothing and what the first one replaced can still be undone."""
    run("""
        import zmq
        count = len(greensafe.monkey._changes)
        assert greensafe.monkey.is_patched()
        greensafe.monkey.patch_zmq()
        assert zmq.Context is greensafe.monkey.Context and len(greensafe.monkey._changes) == count
        greensafe.monkey.unpatch_zmq()
        assert not greensafe.monkey.is_patched() and zmq.Context is greensafe.monkey.get_original("Context")
        greensafe.monkey.unpatch_zmq()
        greensafe.monkey.patch_zmq()
        assert zmq.Context is greensafe.monkey.Context
    """)


def test_undo_restores_the_identity_of_every_name() -> None:
    """After unpatch_zmq every module's namespace holds the very objects that it held before."""
    result = run_python("""
import sys
from zmq import Context, select
import zmq, zmq.devices, zmq.auth.thread, zmq.log.handlers, zmq.decorators
import zmq.asyncio, zmq.green, zmq.utils.garbage, zmq.utils.monitor
import greensafe.monkey
instance = Context.instance

@zmq.decorators.context()
def decorated(context):
    return type(context)

own = {"__mp_main__", "greensafe.monkey", "gevent._threading"}  # the last gives itself another function at its first use

def spaces():
    named = {name: module for name, module in list(sys.modules.items()) if name not in own}
    named |= {"Device": zmq.devices.Device, "ProcessDevice": zmq.devices.ProcessDevice}
    return {name: dict(vars(owner)) for name, owner in named.items() if hasattr(owner, "__dict__")}

before = patched = undone = None
before = spaces()
greensafe.monkey.patch_zmq()
patched = spaces()
assert decorated() is zmq.Context is Context
greensafe.monkey.unpatch_zmq()
undone = spaces()
assert decorated() is zmq.Context is Context
changed = 0
for module, names in before.items():
    assert names.keys() <= undone[module].keys()
    for name, value in names.items():
        if (module, name) not in {("__main__", each) for each in ("before", "patched", "undone")}:
            assert undone[module][name] is value, (module, name)
            changed += patched[module][name] is not value
print(changed)
""")
    assert result.code == 0, result.err
    assert int(result.out) > 30


def test_undo_reaches_modules_imported_while_patched() -> None:
    """A module that was first imported while patched has the original classes after the undo."""
    run("""
        import zmq, zmq.devices, types, sys
        late = sys.modules["late"] = types.ModuleType("late")
        exec("from zmq import Context", vars(late))
        assert zmq.devices.basedevice.Context is late.Context is zmq.Context
        greensafe.monkey.unpatch_zmq()
        original = greensafe.monkey.get_original
        assert zmq.devices.basedevice.Context is late.Context is zmq.Context is original("Context")
        assert zmq.devices.basedevice.proxy is zmq.devices.proxy is zmq.proxy is original("proxy")
        assert zmq.devices.Device.context_factory == zmq.Context.instance
        assert zmq.devices.ProcessDevice.context_factory is zmq.Context
    """)


def test_undo_respects_what_was_changed_meanwhile() -> None:
    """A name that the program itself has set since keeps the program's value."""
    run(
        """
        Context = 7
        greensafe.monkey.unpatch_zmq()
        assert Context == 7
        """,
        before="from zmq import Context",
    )


def test_greensafe_itself_goes_on() -> None:
    """Server, Client, a green REP and its Poller work in a patched process, and the pumps' sockets are plain."""
    run("""
        import zmq
        server = greensafe.Server("tcp://127.0.0.1:*", lambda request: b"re: " + request.body, deadline=300)
        server.start()
        with greensafe.Client(server.endpoint, timeout=300) as client:
            assert [client.request(b"%d" % i) for i in range(100)] == [b"re: %d" % i for i in range(100)]
        assert type(server._socket) is greensafe.monkey.get_original("Socket")
        with zmq.Context() as context, context.socket(zmq.REQ) as req, greensafe.deadline(5):
            req.connect(server.endpoint)
            req.send(b"plain")
            poller = greensafe.Poller()
            poller.register(req, zmq.POLLIN)
            assert poller.poll(5000) == [(req, zmq.POLLIN)]
            assert req.recv() == b"re: plain"
        server.stop()
        zmq.Context.instance().term()
    """)


def test_server_and_client_started_before_the_patch() -> None:
    """A server and a client that run already are not disturbed, and nothing is said about their sockets."""
    run(
        """
        assert client.request(b"y") == b"y!"
        client.close(), server.stop()
        greensafe.Context.instance().term()
        """,
        before="""
        import greensafe
        server = greensafe.Server("tcp://127.0.0.1:*", lambda request: request.body + b"!", deadline=300)
        server.start()
        client = greensafe.Client(server.endpoint, timeout=300)
        assert client.request(b"x") == b"x!"
        """,
    )


def test_green_poller_takes_plain_sockets_made_before() -> None:
    """greensafe's Poller and zmq.Poller still tell plain sockets from green ones."""
    run("""
        import zmq
        context = greensafe.monkey.get_original("Context")()
        plain = context.socket(zmq.PULL)
        green = zmq.Socket(context, zmq.PUSH)
        green.connect(f"tcp://127.0.0.1:{plain.bind_to_random_port('tcp://127.0.0.1')}")
        for make in (greensafe.Poller, zmq.Poller):
            poller = make()
            poller.register(plain, zmq.POLLIN)
            gevent.spawn_later(0.02, green.send, b"x")
            before = ticks
            assert poller.poll(5000) == [(plain, zmq.POLLIN)]
            assert ticks > before
            assert plain.recv() == b"x"
        green.close(), plain.close(), context.term()
    """)


def test_asyncio_goes_on_with_the_originals() -> None:
    """zmq.asyncio works, first imported after the patch or not, and knows nothing of greensafe."""
    run("""
        import asyncio
        import zmq, zmq.asyncio
        assert not issubclass(zmq.asyncio.Socket, greensafe.Socket)

        async def main():
            with zmq.asyncio.Context() as context, context.socket(zmq.REP) as rep, context.socket(zmq.REQ) as req:
                assert type(rep._shadow_sock) is greensafe.monkey.get_original("Socket")
                req.connect(f"tcp://127.0.0.1:{rep.bind_to_random_port('tcp://127.0.0.1')}")
                await req.send(b"x")
                poller = zmq.asyncio.Poller()
                poller.register(rep, zmq.POLLIN)
                assert dict(await poller.poll(5000)) == {rep: zmq.POLLIN}
                await rep.send(b"re: " + await rep.recv())
                return await req.recv()

        assert asyncio.run(main()) == b"re: x"
    """)


def test_zmq_green_goes_on() -> None:
    """zmq.green keeps its own classes and works, first imported after the patch or not."""
    run("""
        import zmq, zmq.green
        assert not issubclass(zmq.green.Socket, greensafe.Socket) and not issubclass(zmq.green.Context, greensafe.Context)
        with zmq.green.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
            push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
            gevent.spawn_later(0.02, push.send, b"x")
            poller = zmq.green.Poller()
            poller.register(pull, zmq.POLLIN)
            assert poller.poll(5000) and pull.recv() == b"x" and ticks
    """)


@pytest.mark.parametrize("threads", ["", "import gevent.monkey; gevent.monkey.patch_all()"], ids=["native", "gevent"])
def test_zero_copy_sends(threads: str) -> None:
    """pyzmq's garbage collector, which a send with copy=False starts, works in its own thread or greenlet."""
    run(
        """
        import zmq, zmq.utils.garbage
        with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
            one.bind("inproc://x"), other.connect("inproc://x")
            tracker = one.send(b"x" * 1000000, copy=False, track=True)
            assert len(other.recv()) == 1000000
            tracker.wait(300)
        assert not isinstance(zmq.utils.garbage.gc.context, greensafe.Context)
        """,
        before=threads,
    )


def test_decorators_make_green_contexts_and_sockets() -> None:
    """@context and @socket, applied before or after the patch, hand out green ones."""
    run(
        """
        @context("mine")
        @socket(zmq.PULL, context_name="mine")
        def after(pull, mine):
            return mine, pull

        @socket(zmq.PULL)
        def alone(pull):
            assert not pull.poll(20)
            return pull.context, pull

        for function in (before, after, alone):
            seen = ticks
            one, pull = function()
            assert isinstance(one, greensafe.Context) and isinstance(pull, greensafe.Socket), function
        assert ticks > seen
        zmq.Context.instance().term()
        """,
        before="""
        import zmq
        from zmq.decorators import context, socket

        @context()
        @socket(zmq.PULL)
        def before(context, pull):
            return context, pull
        """,
    )


DEVICE = """
import sys, zmq, zmq.devices

def echo(device, context):
    device.bind_in(f"ipc://{FOLDER}/in"), device.bind_out(f"ipc://{FOLDER}/out")
    device.start()
    req, rep = context.socket(zmq.REQ), context.socket(zmq.REP)
    req.connect(f"ipc://{FOLDER}/in"), rep.connect(f"ipc://{FOLDER}/out")
    server = gevent.spawn(lambda: rep.send(rep.recv() + b"!"))
    with gevent.Timeout(300):
        req.send(b"x")
        assert req.recv() == b"x!"
    server.get()
    req.close(0), rep.close(0), context.term()
"""


@pytest.mark.parametrize("threads", ["", "import gevent.monkey; gevent.monkey.patch_all()"], ids=["native", "gevent"])
def test_thread_device(threads: str, tmp_path: Path) -> None:
    """zmq.devices.ThreadDevice carries messages in a thread, or a greenlet that stops nobody, until its context ends."""
    run(
        f"FOLDER = {str(tmp_path)!r}"
        + DEVICE
        + textwrap.dedent("""
        device = zmq.devices.ThreadDevice(zmq.QUEUE, zmq.ROUTER, zmq.DEALER)
        echo(device, zmq.Context())
        assert device._context is zmq.Context.instance() and not device.done
        with gevent.Timeout(300):
            zmq.Context.instance().term()
        device.join(300)
        assert device.done
        """),
        before=threads,
        is_silent=False,  # gevent prints how the greenlets of the proxy ended
    )


def test_process_device(tmp_path: Path) -> None:
    """zmq.devices.ProcessDevice carries messages in a forked process."""
    run(
        f"FOLDER = {str(tmp_path)!r}"
        + DEVICE
        + textwrap.dedent("""
        import warnings
        device = zmq.devices.ProcessDevice(zmq.QUEUE, zmq.ROUTER, zmq.DEALER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
            echo(device, zmq.Context())
        device.launcher.terminate()
        device.join(300)
        """)
    )


def test_log_handler() -> None:
    """zmq.log.handlers.PUBHandler publishes through a green socket."""
    run("""
        import logging, zmq
        from zmq.log.handlers import PUBHandler
        handler = PUBHandler("inproc://log")
        assert isinstance(handler.socket, greensafe.Socket)
        sub = handler.ctx.socket(zmq.SUB)
        sub.subscribe(b"")
        sub.connect("inproc://log")
        logging.getLogger("x").addHandler(handler)
        gevent.spawn_later(0.02, logging.getLogger("x").warning, "hello")
        with gevent.Timeout(300):
            assert b"hello" in sub.recv_multipart()[1]
        assert ticks
        handler.ctx.destroy(0)
    """)


@pytest.mark.parametrize("threads", ["", "import gevent.monkey; gevent.monkey.patch_all()"], ids=["native", "gevent"])
def test_thread_authenticator(threads: str) -> None:
    """zmq.auth.thread, an asyncio loop in a thread or greenlet of its own, lets a client with the password in, and ends."""
    run(
        """
        import zmq
        from zmq.auth.thread import ThreadAuthenticator
        context = zmq.Context()
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_plain(domain="*", passwords={"me": "secret"})
        server, client = context.socket(zmq.REP), context.socket(zmq.REQ)
        server.plain_server = True
        client.plain_username, client.plain_password = b"me", b"secret"
        client.connect(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
        answering = gevent.spawn(lambda: server.send(server.recv()))
        with gevent.Timeout(300):
            client.send(b"x")
            assert client.recv() == b"x"
        answering.get()
        client.close(0), server.close(0)
        authenticator.stop()
        context.term()
        """,
        before=threads,
    )


def test_before_patch_all() -> None:
    """gevent.monkey.patch_all() after patch_zmq() has nothing to complain about."""
    run("import gevent.monkey; gevent.monkey.patch_all(); import zmq; zmq.Context().term()")


def test_third_party_program() -> None:
    """zeroless, which knows only a plain zmq, serves and asks in greenlets of one process (if it is installed)."""
    spec = importlib.util.find_spec("zeroless")
    if spec is None or spec.origin is None:
        pytest.skip("pip install zeroless")
    run(
        """
        import warnings, zmq
        warnings.simplefilter("ignore", ResourceWarning)  # zeroless makes a context for nothing each time,
        warnings.simplefilter("ignore", DeprecationWarning)  # and asks for Socket.socket_type
        import zeroless

        with zmq.Context() as context, context.socket(zmq.PULL) as free:
            port = free.bind_to_random_port("tcp://127.0.0.1")

        def serve():
            reply, requests = zeroless.Server(port).reply()
            for request in requests:
                gevent.sleep(0.05)
                reply(request + b"!")

        server = gevent.spawn(serve)
        client = zeroless.Client()
        client.connect_local(port)
        request, replies = client.request()
        with gevent.Timeout(300):
            for number in range(3):
                request(b"%d" % number)
                assert next(replies) == b"%d!" % number
        assert ticks
        server.kill()
        zmq.Context.instance().destroy(0)
        """,
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(spec.origin).parent.parent)])},
    )
