"""Tests of greensafe.auth."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, wait_until
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

import greensafe as zmq
from greensafe import auth as auth_module
from greensafe.auth import CURVE_ALLOW_ANY, ENDPOINT, Authenticator, create_certificates, load_certificate, load_certificates
from greensafe.hub import log_limiter as seldom

pytestmark = pytest.mark.usefixtures("limit", "hub_turns")

needs_curve = pytest.mark.skipif(not zmq.has("curve"), reason="this libzmq was built without CURVE")

#: How long a refused client is waited for.
SHORT = 100 * MS

DOMAIN = b"test"


@pytest.fixture
def hub_turns() -> Iterator[None]:
    """Fail the test in which the hub stood still."""
    gaps = [0.0]

    def tick() -> None:
        before = monotonic()
        while True:
            gevent.sleep(MS)
            now = monotonic()
            gaps.append(now - before)
            before = now

    ticker = gevent.spawn(tick)
    yield
    ticker.kill()
    assert max(gaps) < LONG


@pytest.fixture
def auth(context: zmq.Context) -> Iterator[Authenticator]:
    with Authenticator(context) as made:
        yield made


class Provider:
    """Credentials whose callback is `decide`, and the keys that it was asked about."""

    def __init__(self, decide: Callable[[], Any]) -> None:
        self.decide = decide
        self.asked: list[tuple[str, bytes]] = []

    def callback(self, domain: str, key: bytes) -> Any:
        self.asked.append((domain, key))
        return self.decide()


class Pair:
    """A REP and a REQ that connects to it over tcp, with these options; `options` of both begin with server_ or client_."""

    def __init__(self, context: zmq.Context, **options: Any) -> None:
        self.server = context.socket(zmq.REP)
        self.client = context.socket(zmq.REQ)
        for name, value in options.items():
            side, _, option = name.partition("_")
            setattr(getattr(self, side), option, value)
        # Only what fails, so that the first event is the one a test asks about.
        self._failures = self.client.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        port = self.server.bind_to_random_port("tcp://127.0.0.1")
        self.client.connect(f"tcp://127.0.0.1:{port}")

    def assert_admitted(self) -> zmq.Frame:
        """A request comes through and is answered; returns it."""
        self.client.send(b"request")
        frame = self.server.recv(copy=False, timeout=LONG)
        self.server.send(b"reply")
        assert self.client.recv(timeout=LONG) == b"reply"
        return frame

    def assert_refused(self, status: int = 400) -> None:
        """The client learns it at once, its wait ends with its limit, and the server never sees the request."""
        self.client.send(b"request")
        event = parse_monitor_message(self._failures.recv_multipart(timeout=LONG))
        assert event["value"] == status
        with pytest.raises(zmq.OperationTimeout):
            self.client.recv(timeout=SHORT)
        assert self.server.poll(0) == 0


def null(context: zmq.Context) -> Pair:
    return Pair(context, server_zap_domain=DOMAIN)


def plain(context: zmq.Context, password: bytes = b"right", name: bytes = b"admin") -> Pair:
    return Pair(context, server_plain_server=True, client_plain_username=name, client_plain_password=password)


def curve(context: zmq.Context, keys: tuple[bytes, bytes] | None = None, domain: bytes = b"", **options: Any) -> Pair:
    server_public, server_secret = zmq.curve_keypair()
    public, secret = keys or zmq.curve_keypair()
    if domain:  # libzmq takes no empty one
        options["server_zap_domain"] = domain
    return Pair(
        context,
        server_curve_server=True,
        server_curve_secretkey=server_secret,
        client_curve_serverkey=server_public,
        client_curve_publickey=public,
        client_curve_secretkey=secret,
        **options,
    )


# NULL: by address.


def test_null_without_policy(context: zmq.Context, auth: Authenticator) -> None:
    """Until something is configured NULL clients are admitted, PLAIN and CURVE clients are not."""
    assert null(context).assert_admitted().get("User-Id") == "anonymous"
    plain(context).assert_refused()
    if zmq.has("curve"):
        curve(context).assert_refused()


def test_allow(context: zmq.Context, auth: Authenticator) -> None:
    """Who is on the allow list is admitted, everybody else is not."""
    auth.allow("127.0.0.2", "127.0.0.3")
    null(context).assert_refused()
    auth.allow("127.0.0.1")
    null(context).assert_admitted()


def test_deny(context: zmq.Context, auth: Authenticator) -> None:
    """Who is on the deny list is not admitted, everybody else is; allow and deny exclude each other."""
    auth.deny("127.0.0.2")
    null(context).assert_admitted()
    auth.deny("127.0.0.1")
    null(context).assert_refused()
    with pytest.raises(ValueError, match="not both"):
        auth.allow("127.0.0.1")


def test_null_without_domain_is_not_asked_about(context: zmq.Context, auth: Authenticator) -> None:
    """A NULL server without a ZAP_DOMAIN admits everybody."""
    auth.deny("127.0.0.1")
    Pair(context).assert_admitted()


# PLAIN: by name and password.


def test_plain(context: zmq.Context, auth: Authenticator) -> None:
    """The right password admits under its user's name; a wrong one, a wrong name and a denied address do not."""
    auth.configure_plain(passwords={"admin": "right"})
    assert plain(context).assert_admitted().get("User-Id") == "admin"
    plain(context, b"wrong").assert_refused()
    plain(context, b"right", b"nobody").assert_refused()
    auth.deny("127.0.0.1")
    plain(context).assert_refused()


def test_plain_in_a_domain(context: zmq.Context, auth: Authenticator) -> None:
    """Passwords of one domain are good there only."""
    auth.configure_plain("other", {"admin": "right"})
    plain(context).assert_refused()


# CURVE: by key.


@needs_curve
def test_curve_location(context: zmq.Context, auth: Authenticator, tmp_path: Path) -> None:
    """A key with a certificate in the folder is admitted, under its own name; another one is not."""
    create_certificates(tmp_path, "client")
    public, secret = load_certificate(tmp_path / "client.key_secret")
    assert secret is not None
    assert list(load_certificates(tmp_path)) == [public]
    auth.configure_curve(location=tmp_path)
    assert curve(context, (public, secret)).assert_admitted().get("User-Id") == public.decode()
    curve(context).assert_refused()


@needs_curve
def test_curve_any(context: zmq.Context, auth: Authenticator) -> None:
    """CURVE_ALLOW_ANY admits whoever knows the server's key; not a client without CURVE."""
    auth.configure_curve(location=CURVE_ALLOW_ANY)
    curve(context).assert_admitted()


@needs_curve
def test_curve_callback(context: zmq.Context, auth: Authenticator) -> None:
    """A callback decides by domain and key; its domain's alone."""
    keys = zmq.curve_keypair()
    provider = Provider(lambda: provider.asked[-1] == ("test", keys[0]))
    auth.configure_curve_callback("test", provider)
    curve(context, keys, DOMAIN).assert_admitted()
    curve(context, None, DOMAIN).assert_refused()
    curve(context, keys, b"other").assert_refused()
    assert len(provider.asked) == 2


@needs_curve
def test_callback_that_is_a_coroutine(context: zmq.Context, auth: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine that does not wait is as good as a function; one that waits for asyncio is refused, and the log says why."""

    async def at_once() -> bool:
        return True

    async def waiting() -> bool:
        await asyncio.sleep(0)
        return True

    auth.configure_curve_callback(credentials_provider=Provider(at_once))
    curve(context).assert_admitted()
    auth.configure_curve_callback(credentials_provider=Provider(waiting))
    curve(context).assert_refused(500)
    assert "a credentials callback awaits" in caplog.text


@needs_curve
@pytest.mark.parametrize(
    "error",
    [ValueError("gone"), StopIteration(), gevent.Timeout(1), gevent.GreenletExit()],
    ids=lambda error: type(error).__name__,
)
def test_callback_raises(
    context: zmq.Context, auth: Authenticator, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """The client of a callback that raises is refused, the log says why, and the next client is checked as ever."""

    def fail() -> bool:
        raise error

    provider = Provider(fail)
    auth.configure_curve_callback(credentials_provider=provider)
    curve(context).assert_refused(500)
    assert ("the check of a client failed" in caplog.text) is not isinstance(error, gevent.GreenletExit)
    provider.decide = lambda: True
    curve(context).assert_admitted()


@needs_curve
def test_user_id_raises(context: zmq.Context) -> None:
    """A curve_user_id that raises is a check that failed; what it returns is the client's User-Id."""

    class Named(Authenticator):
        names: dict[bytes, str] = {}

        def curve_user_id(self, client_public_key: bytes) -> str:
            return self.names[client_public_key]

    keys = zmq.curve_keypair()
    with Named(context) as auth:
        auth.configure_curve(location=CURVE_ALLOW_ANY)
        auth.names[z85.decode(keys[0])] = "known"
        curve(context).assert_refused(500)
        assert curve(context, keys).assert_admitted().get("User-Id") == "known"


@needs_curve
def test_callback_waits(context: zmq.Context, auth: Authenticator) -> None:
    """A callback that waits holds up its own client alone."""
    go = gevent.event.Event()
    slow = Provider(go.wait)
    auth.configure_curve_callback("slow", slow)
    auth.configure_curve_callback("fast", Provider(lambda: True))
    waiting = curve(context, domain=b"slow")
    first = gevent.spawn(waiting.assert_admitted)
    wait_until(lambda: slow.asked)
    assert repr(auth) == "<Authenticator started, checking 1>"
    curve(context, domain=b"fast").assert_admitted()
    assert not first.ready()
    go.set()
    first.get()
    wait_until(lambda: repr(auth) == "<Authenticator started, checking 0>")


# Requests that libzmq would not send.


GARBAGE = {
    "no delimiter": [b"x"],
    "nothing": [b""],
    "one frame": [b"", b"1.0"],
    "too few": [b"", b"1.0", b"id", b"", b"127.0.0.1"],
    "wrong version": [b"", b"9.9", b"id", b"", b"127.0.0.1", b"", b"NULL"],
    "unknown mechanism": [b"", b"1.0", b"id", b"", b"127.0.0.1", b"", b"MAGIC"],
    "plain without password": [b"", b"1.0", b"id", b"", b"127.0.0.1", b"", b"PLAIN", b"admin"],
    "curve without key": [b"", b"1.0", b"id", b"", b"127.0.0.1", b"", b"CURVE"],
    "curve with half a key": [b"", b"1.0", b"id", b"callback", b"127.0.0.1", b"", b"CURVE", b"xyz"],
    "not text": [b"", b"1.0", b"id", b"\xff\xfe", b"\xff", b"\xff", b"PLAIN", b"\xff", b"\xff"],
    "gssapi not text": [b"", b"1.0", b"id", b"", b"127.0.0.1", b"", b"GSSAPI", b"\xff"],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(context: zmq.Context, auth: Authenticator, frames: list[bytes]) -> None:
    """A request that is none is refused, or dropped if it has no delimiter; the next client is checked as ever."""
    auth.configure_plain(passwords={"admin": "right"})
    auth.configure_curve_callback("callback", Provider(lambda: True))
    dealer = context.socket(zmq.DEALER)
    dealer.connect(ENDPOINT)
    dealer.send_multipart(frames)
    plain(context).assert_admitted()
    plain(context, b"wrong").assert_refused()
    if b"" in frames:
        reply = dealer.recv_multipart(timeout=LONG)
        assert reply[:2] == [b"", b"1.0"]
        assert reply[3] in (b"400", b"500")
        assert reply[2] == (frames[2] if len(frames) > 2 else b"")
    assert dealer.poll(0) == 0


def test_garbage_by_req(context: zmq.Context, auth: Authenticator) -> None:
    """A REQ may ask as well, and a hundred pieces of garbage keep nobody out."""
    req = context.socket(zmq.REQ)
    req.connect(ENDPOINT)
    for _ in range(100):
        req.send(b"garbage")
        assert req.recv_multipart(timeout=LONG)[2] == b"500"
    null(context).assert_admitted()


# Starting and stopping.


def test_second_authenticator(context: zmq.Context, auth: Authenticator) -> None:
    """A context has one authenticator: starting a second, or one twice, is an error that leaves nothing and changes nothing."""
    auth.allow("127.0.0.2")
    second = Authenticator(context)
    for _ in range(2):
        with pytest.raises(zmq.ZMQError, match="has an authenticator already") as caught:
            second.start()
        assert caught.value.errno == zmq.EADDRINUSE
    assert second.zap_socket is None
    assert [sock for sock in context.kept if not sock.closed] == [auth.zap_socket]
    with pytest.raises(zmq.ZMQError, match="has an authenticator already"):
        auth.start()
    second.stop()
    null(context).assert_refused()
    auth.stop()
    second.start()
    null(context).assert_admitted()
    second.stop()


def test_start_after_stop(context: zmq.Context) -> None:
    """An authenticator that was stopped can be started again at once, and remembers its configuration."""
    auth = Authenticator(context)
    auth.stop()
    auth.configure_plain(passwords={"admin": "right"})
    for _ in range(20):
        auth.start()
        auth.stop()
        auth.stop()
    assert repr(auth) == "<Authenticator stopped, checking 0>"
    with auth:
        plain(context).assert_admitted()
        plain(context, b"wrong").assert_refused()
    with auth:
        plain(context).assert_admitted()


@needs_curve
def test_stop_while_checking(context: zmq.Context) -> None:
    """Who is being checked at stop() is not admitted, whatever the callback says later, and comes again by itself."""
    ended: list[str] = []

    def stubborn() -> bool:
        try:
            gevent.sleep(LONG)
        finally:
            ended.append("killed")
        return True

    provider = Provider(stubborn)
    auth = Authenticator(context)
    auth.configure_curve_callback(credentials_provider=provider)
    auth.start()
    pair = curve(context, server_handshake_ivl=int(1000 * SHORT))
    wait_until(lambda: provider.asked)
    auth.stop()
    assert repr(auth) == "<Authenticator stopped, checking 0>"
    wait_until(lambda: ended)
    provider.decide = lambda: True
    with auth:
        pair.assert_admitted()
    assert len(provider.asked) == 2


@needs_curve
def test_callback_survives_the_kill(context: zmq.Context) -> None:
    """A callback that goes on after stop() and says yes admits nobody."""
    go = gevent.event.Event()

    def stubborn() -> bool:
        while not go.is_set():
            try:
                go.wait()
            except gevent.GreenletExit:
                continue
        return True

    provider = Provider(stubborn)
    auth = Authenticator(context)
    auth.configure_curve_callback(credentials_provider=provider)
    auth.start()
    pair = curve(context)
    pair.client.send(b"request")
    wait_until(lambda: provider.asked)
    auth.stop()
    gevent.sleep(MS)
    go.set()
    with pytest.raises(zmq.OperationTimeout):
        pair.server.recv(timeout=SHORT)


@needs_curve
def test_stop_by_a_callback(context: zmq.Context, auth: Authenticator) -> None:
    """A callback may stop its own authenticator."""
    provider = Provider(auth.stop)
    auth.configure_curve_callback(credentials_provider=provider)
    pair = curve(context, server_handshake_ivl=int(1000 * SHORT))
    wait_until(lambda: provider.asked)
    assert auth.zap_socket is None
    provider.decide = lambda: True
    with Authenticator(context) as second:
        second.configure_curve_callback(credentials_provider=provider)
        pair.assert_admitted()


def test_stop_before_requests_are_read(context: zmq.Context) -> None:
    """Requests that stop() finds unread are told to come again."""
    auth = Authenticator(context)
    auth.start()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(ENDPOINT)
    dealer.send_multipart([b"", b"1.0", b"id", b"", b"127.0.0.1", b"", b"NULL"])
    auth.stop()
    assert dealer.recv_multipart(timeout=LONG)[2:4] == [b"id", b"300"]


@pytest.mark.parametrize("end", [zmq.Context.term, zmq.Context.destroy])
def test_context_ends_first(end: Callable[[zmq.Context], None]) -> None:
    """The end of a context ends its authenticator; stop() is harmless afterwards."""
    context = zmq.Context()
    auth = Authenticator(context)
    auth.start()
    gevent.sleep(0)
    end(context)
    assert context.closed
    wait_until(lambda: auth.zap_socket is None)
    auth.stop()


@needs_curve
def test_context_ends_while_checking() -> None:
    """A context can be terminated while a callback waits; the callback is killed."""
    context = zmq.Context()
    provider = Provider(lambda: gevent.sleep(LONG))
    auth = Authenticator(context)
    auth.configure_curve_callback(credentials_provider=provider)
    auth.start()
    pair = curve(context)
    wait_until(lambda: provider.asked)
    ending = gevent.spawn(context.term)
    wait_until(lambda: auth.zap_socket is None)
    pair.client.disable_monitor()
    pair._failures.close()
    pair.client.close(0)
    pair.server.close(0)
    ending.get()


def test_plain_context() -> None:
    """It looks after the sockets of a context that is not green as well; without one, after Context.instance()."""
    import zmq as pyzmq

    with pyzmq.Context() as context, Authenticator(context) as auth:
        auth.deny("127.0.0.1")
        server, client = context.socket(pyzmq.REP), context.socket(pyzmq.REQ)
        server.zap_domain = DOMAIN
        failures = client.get_monitor_socket(pyzmq.EVENT_HANDSHAKE_FAILED_AUTH)
        client.connect(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
        wait_until(lambda: failures.poll(0))
        client.disable_monitor()
        for sock in (failures, client, server):
            sock.close(0)
    assert Authenticator().context is zmq.Context.instance()
    zmq.Context.instance().term()


def test_limits_of_the_context_are_not_its_own(context: zmq.Context) -> None:
    """An authenticator waits for requests without limit, whatever its context's sockets do by default."""
    context.default_timeout = MS
    context.setsockopt(zmq.RCVTIMEO, 1)
    with Authenticator(context) as auth:
        auth.deny("127.0.0.1")
        gevent.sleep(5 * MS)
        null(context).assert_refused()


@needs_curve
def test_killed_reader_admits_nobody(context: zmq.Context, auth: Authenticator) -> None:
    """When somebody kills every greenlet, CURVE clients are not admitted unseen; stop() and start() repair it."""
    gevent.sleep(0)
    gevent.killall([each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and each._run == auth._serve])
    pair = curve(context, server_handshake_ivl=int(1000 * SHORT))
    pair.client.send(b"request")
    with pytest.raises(zmq.OperationTimeout):
        pair.server.recv(timeout=SHORT / 2)
    auth.stop()
    auth.configure_curve(location=CURVE_ALLOW_ANY)
    auth.start()
    assert pair.server.recv(timeout=LONG) == b"request"


def test_many_clients(context: zmq.Context, auth: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
    """Fifty clients that come at the same time are each told apart."""
    caplog.set_level(logging.WARNING)
    auth.configure_plain(passwords={"admin": "right"})
    server = context.socket(zmq.ROUTER)
    server.plain_server = True
    port = server.bind_to_random_port("tcp://127.0.0.1")
    for number in range(50):
        client = context.socket(zmq.DEALER)
        client.plain_username = b"admin"
        client.plain_password = b"wrong" if number % 2 else b"right"
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"%d" % number)
    heard = {int(server.recv_multipart(timeout=LONG)[1]) for _ in range(25)}
    assert heard == set(range(0, 50, 2))
    assert server.poll(1000 * SHORT) == 0
    assert caplog.text == ""


@needs_curve
def test_server_and_client(context: zmq.Context, auth: Authenticator) -> None:
    """Keys set on their contexts hold for a Server and a Client: the right one is answered, another one is Refused at once."""
    server_public, context.curve_secretkey = zmq.curve_keypair()
    context.curve_server = True
    known = zmq.curve_keypair()

    class Known:
        def callback(self, domain: str, key: bytes) -> bool:
            return key == known[0]

    auth.configure_curve_callback(credentials_provider=Known())
    with zmq.Server("tcp://127.0.0.1:0", lambda request: request.body, deadline=LONG, context=context) as server:
        for keys in (known, zmq.curve_keypair()):
            with zmq.Context() as own:
                own.curve_serverkey = server_public
                own.curve_publickey, own.curve_secretkey = keys
                with zmq.Client(server.endpoint, context=own, timeout=LONG) as client:
                    if keys is known:
                        assert client.request(b"x") == b"x"
                    else:
                        with pytest.raises(zmq.Refused):
                            client.request(b"x")


# Its own loop.


@pytest.mark.parametrize("what", ["recv_multipart", "_open"])
def test_reading_that_fails_goes_on(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """It is logged with its traceback, and who comes afterwards is judged as ever."""
    owner: Any = Authenticator if what == "_open" else zmq.Socket
    real, left = getattr(owner, what), [RuntimeError("injected")]

    def fail(self: Any, *args: Any, **options: Any) -> Any:
        if left and (what == "_open" or self is auth.zap_socket):
            raise left.pop()
        return real(self, *args, **options)

    auth = Authenticator(context)
    auth.configure_plain(passwords={"admin": "right"})
    with monkeypatch.context() as patch:
        patch.setattr(owner, what, fail)
        with auth:
            if what == "_open":
                plain(context).client.send(b"nobody answers this one")
            wait_until(lambda: caplog.records)
            plain(context).assert_admitted()
            plain(context, b"wrong").assert_refused()
    assert "injected" in str(caplog.records[0].exc_info)
    assert "on in" in caplog.records[0].getMessage()


def test_reading_that_goes_on_failing(
    context: zmq.Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After three restarts it ends, which is said; then nobody is admitted, until it is started again."""

    def fail(self: Any, sock: Any) -> None:
        raise RuntimeError("injected")

    auth = Authenticator(context)
    auth.configure_plain(passwords={"admin": "right"})
    with monkeypatch.context() as patch, auth:
        patch.setattr(Authenticator, "_read", fail)
        wait_until(lambda: repr(auth) == "<Authenticator failed, checking 0>")
        assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3 + [logging.CRITICAL]
        pair = plain(context)
        pair.client.send(b"request")
        assert pair.server.poll(SHORT * 1000) == 0
    with auth:
        assert repr(auth) == "<Authenticator started, checking 0>"
        plain(context).assert_admitted()


def test_checks_do_not_fill_the_log(
    context: zmq.Context, auth: Authenticator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handshakes come as often as clients like: a check that always fails has ten lines a second, and a count at the end."""
    monkeypatch.setattr(seldom, "PERIOD", LONG)
    log = auth._checks_log
    for _ in range(50):
        log.failed("the check of a client failed: it is refused", ValueError("no"))
        log.error("Invalid PLAIN credentials: %r", [b"\n"])
    assert len(caplog.records) == auth_module.EACH_FAILURE + 1
    auth.stop()
    assert "(the last of 40 more" in caplog.text
    assert "(the last of 49 more" in caplog.text


def test_what_a_client_says_of_itself_stays_in_its_line(auth: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
    """pyzmq logs names as they come, at level DEBUG: they are escaped."""
    caplog.set_level(logging.DEBUG, "zmq.auth")
    auth._checks_log.debug("ALLOWED (PLAIN) username=%s", "me\n2026 CRITICAL root: forged \x1b[2J")
    assert [record.getMessage() for record in caplog.records if "PLAIN" in record.getMessage()] == [
        r"ALLOWED (PLAIN) username=me\n2026 CRITICAL root: forged \x1b[2J"
    ]
