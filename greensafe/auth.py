"""Authentication of the clients that connect to the sockets of a context (ZAP).

An `Authenticator` answers libzmq's questions (ZAP, RFC 27) for every socket of its context. What is checked, and how it is
configured, is pyzmq's own `zmq.auth.Authenticator`; here is only what asks it. The other names of zmq.auth are here as well.
Rules:

* Every request that can be answered is answered once, whatever the checks do: a handshake without an answer waits until its
  server's HANDSHAKE_IVL is over, by default 30 seconds.
* A greenlet for each request: a credentials callback may wait as greenlets do and holds nobody else up. One that never
  returns holds up its own client alone, until HANDSHAKE_IVL; its greenlet stays until `stop()`.
* 400 and 500 are final: libzmq's client does not try again until somebody connects it again. So 400 (refused) and 500 (the
  checks failed) are for who asked while this runs; `stop()` answers 300: the client connects again by itself, when
  HANDSHAKE_IVL or the server's socket ends.
* While no authenticator runs libzmq admits every CURVE client, whatever its key, and every NULL client; PLAIN it refuses. So
  start before the servers bind and stop after they are closed, or set both ZAP_DOMAIN and ZAP_ENFORCE_DOMAIN on them.
  (The second without the first aborts the process when a PLAIN client comes.) What is configured for "*" holds for servers
  without a ZAP_DOMAIN only, and NULL clients are looked at only where there is one.

A ROUTER, not pyzmq's REP: a REP takes one request at a time, and one that is not answered leaves it unable to receive.

It does not know servers or clients, nor who was admitted: a server finds that in the "User-Id" of its frames.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Final

import gevent
import zmq
import zmq.auth
from gevent.hub import Hub
from zmq.auth import CURVE_ALLOW_ANY, create_certificates, load_certificate, load_certificates

from .green.context import Context
from .green.socket import Socket
from .hub.log_limiter import Seldom
from .hub.threads import call_in, is_elsewhere
from .sansio.backoff import Intensity

__all__ = ["CURVE_ALLOW_ANY", "Authenticator", "create_certificates", "load_certificate", "load_certificates"]

#: The endpoint at which libzmq looks for the handler, one in each context.
ENDPOINT: Final = "inproc://zeromq.zap.01"

#: RFC 27: a version, which each request and reply begins with, and the status codes that are not pyzmq's to give.
_VERSION: Final = b"1.0"
_TEMPORARY: Final = b"300"
_INTERNAL: Final = b"500"

#: Lines a second of each kind: a check that fails, with its traceback; and, at level DEBUG, each step of all checks.
EACH_FAILURE: Final = 10
EACH_STEP: Final = 100

#: The errors of a socket whose end has come: it was closed, or its context is being terminated.
_ENDED: Final = (zmq.ENOTSOCK, zmq.ETERM)


class Authenticator(zmq.auth.Authenticator):
    """The ZAP handler of a context: it admits or refuses each client that connects, in greenlets.

        with Authenticator(context) as auth:
            auth.configure_curve(location="certificates/clients")
            server = context.socket(zmq.REP)
            ...

    `allow`, `deny`, `configure_plain`, `configure_curve` and `configure_curve_callback` are pyzmq's and may be called at any
    time; they change nothing for who is admitted already. A callback is called in a greenlet of its own for each client and
    returns whether the key is good; it may wait as greenlets do. A coroutine is fine as well unless it really awaits.
    `curve_user_id` may be overridden; it is called on a shallow copy of this object.

    At level DEBUG pyzmq logs the passwords that it accepts, to the logger "zmq.auth" or to `log`.

    Args:
        context: Whose sockets are looked after, in whatever thread they are; by default Context.instance().
        encoding: Of domains, addresses, user names and passwords.
        log: A logger; by default "zmq.auth". What clients can cause is limited there: see docs/observation.md.
    """

    zap_socket: Any  # the bound ROUTER, None while stopped; in the copy that checks a request, its _Handshake

    def __init__(self, context: zmq.Context[Any] | None = None, encoding: str = "utf-8", log: Any = None) -> None:
        super().__init__(Context.instance() if context is None else context, encoding, log)
        self._checks_log = _ChecksLog(self.log)
        self._handling: dict[_Handshake, gevent.Greenlet] = {}
        self._reader: gevent.Greenlet | None = None
        self._hub: Hub | None = None

    def start(self) -> None:
        """Answer from now on, in this thread's hub, until `stop()` or the context's end.

        Raises:
            zmq.ZMQError: EADDRINUSE if the context has an authenticator already, this one or another. Nothing has changed.
        """
        sock: Socket = self.context.socket(zmq.ROUTER, socket_class=Socket)
        try:
            sock.bind(ENDPOINT)
        except zmq.ZMQError as error:
            sock.close(0)
            if error.errno != zmq.EADDRINUSE:
                raise
            raise zmq.ZMQError(
                zmq.EADDRINUSE, f"this context has an authenticator already ({ENDPOINT} is bound): stop that one first"
            ) from None
        self.zap_socket = sock
        self._hub = gevent.get_hub()
        self._reader = gevent.spawn(self._serve, sock)

    def stop(self) -> None:
        """Stop. Clients that are being checked are told to come again; callbacks that still run are killed.

        Returns at once. Stopping what is not started does nothing; afterwards it can be started again. In another thread this
        waits for a turn of the hub in which it was started; RuntimeError if there is none (see `threads.call_in`).
        """
        sock = self.zap_socket
        if sock is None:
            return
        if self._hub is not None and is_elsewhere(self._hub):
            call_in(self._hub, "Authenticator.stop", self.stop)
            return
        self.zap_socket = None
        unread = []
        with suppress(zmq.ZMQError):  # Again: all is read; or the socket was ended by its context
            sock.unbind(ENDPOINT)  # the name is free at once; libzmq gives it back some time after the close
            while True:
                unread.append(sock.recv_multipart(zmq.NOBLOCK))
        for handshake in [*self._handling, *filter(None, (self._open(sock, frames) for frames in unread))]:
            handshake.refuse(_TEMPORARY, b"The authenticator was stopped")
        for greenlet in self._handling.values():
            greenlet.kill(block=False)
        self._handling = {}
        sock.close(0)
        self._checks_log.flush()

    def __enter__(self) -> Authenticator:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        has_failed = self._reader is not None and self._reader.ready()
        state = "stopped" if self.zap_socket is None else "failed" if has_failed else "started"
        return f"<Authenticator {state}, checking {len(self._handling)}>"

    def _serve(self, sock: Socket) -> None:
        """Read requests until the socket's end, and on after a pause when that fails, three times within five seconds.

        When it fails more often, or anything else ends this, a kill for instance, the socket stays bound: who connects is not
        answered then, and so not admitted.
        """
        intensity = Intensity()
        while True:
            try:
                self._read(sock)
                break
            except Exception:
                pause = intensity.restart(monotonic(), random.random())
                if pause is None:
                    self.log.critical("reading requests has failed too often: nobody is admitted any more", exc_info=True)
                    return
                self.log.exception("reading a request has failed: on in %.3f s", pause)
            gevent.sleep(pause)
        if self.zap_socket is sock:
            self.stop()

    def _read(self, sock: Socket) -> None:
        """Read requests until the socket's end."""
        while True:
            try:
                frames = sock.recv_multipart(timeout=None)
            except zmq.ZMQError as error:
                if error.errno not in _ENDED:
                    raise
                return
            handshake = self._open(sock, frames)
            if handshake is not None:
                self._handling[handshake] = gevent.spawn(self._check, handshake)

    def _open(self, sock: Socket, frames: list[bytes]) -> _Handshake | None:
        """Separate the envelope from the request; None if there is no telling where it ends."""
        try:
            split = frames.index(b"") + 1
        except ValueError:
            self._checks_log.warning("ZAP request of %d frames without an empty delimiter dropped", len(frames))
            return None
        return _Handshake(sock, frames[:split], frames[split:])

    def _check(self, handshake: _Handshake) -> None:
        """The body of a request's greenlet: the request is answered, however this ends."""
        policy = copy.copy(self)
        policy.zap_socket = handshake  # where pyzmq's checks send their reply
        policy.log = self._checks_log
        try:
            _complete(policy.handle_zap_message(handshake.request))
        except (Exception, gevent.Timeout) as error:  # noqa: BLE001 - the program's callback: the client is refused
            self._checks_log.failed("the check of a client failed: it is refused", error)
        finally:
            self._handling.pop(handshake, None)
            handshake.refuse(_INTERNAL, b"Internal error")


class _ChecksLog:
    """The log lines of the checks. Clients can cause them at will, and with texts of their own."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._seldom = Seldom()
        self.flush = self._seldom.flush

    def debug(self, text: str, *args: object) -> None:
        self._say(logging.DEBUG, text, args)

    def warning(self, text: str, *args: object) -> None:
        self._say(logging.WARNING, text, args)

    def error(self, text: str, *args: object) -> None:
        self._say(logging.ERROR, text, args)

    def failed(self, text: str, error: BaseException) -> None:
        self._seldom.say(self._log, logging.ERROR, text, key=type(error).__name__, most=EACH_FAILURE, error=error)

    def _say(self, level: int, text: str, args: tuple[object, ...]) -> None:
        if self._log.isEnabledFor(level):
            most = EACH_STEP if level == logging.DEBUG else 1
            self._seldom.say(self._log, level, "%s", text % args if args else text, key=text, most=most)


class _Handshake:
    """One ZAP request, and the reply gate in front of the socket; pyzmq's checks take it for the ZAP socket itself."""

    def __init__(self, sock: Socket, route: list[bytes], request: list[bytes]) -> None:
        self.request = request
        self._sock = sock
        self._route = route
        self._is_answered = False

    def send_multipart(self, reply: list[bytes]) -> None:
        """Send the reply, if it is the first one and the socket is still there; never waits."""
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self._sock.send_multipart([*self._route, *reply], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in _ENDED:
                raise

    def refuse(self, status: bytes, text: bytes) -> None:
        """Refuse the client, unless it was answered before."""
        request_id = self.request[1] if len(self.request) > 1 else b""
        self.send_multipart([_VERSION, request_id, status, text, b"", b""])


def _complete(checks: Coroutine[Any, Any, None]) -> None:
    """Run pyzmq's coroutine to its end in this greenlet: it waits for nothing itself, only what it calls may."""
    try:
        checks.send(None)
    except StopIteration:
        return
    checks.close()
    raise RuntimeError("a credentials callback awaits, but no event loop runs here: let it wait as greenlets do")
