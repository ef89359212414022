"""A master that may be killed at any moment: the next one goes on where it was.

    python master.py ENDPOINT FOLDER

Agents exchange keys with it, wait until an operator accepts them, which may take days, and get a session. All that it knows is
in `FOLDER/master.db`, together with the journal of its requests. That file is secret; so is `FOLDER/operator.token`, by which
the operator is known.

The request of an agent that waits is open all that time. The clients of a killed master send what is open to the next one, and
there each handler runs again: steps that are stored return what they have returned, and it goes on at the first that is not.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import state
from gevent.event import Event
from keys import is_public, signature

from greensafe import RemoteError, Request, Server

#: More agents than will ever wait at a time: each holds a place all along, and if all are taken, the operator has to wait, too.
MOST = 100_000


class Master:
    """The handlers. What is in memory is only who is to be woken; it is made anew by the handlers that run again."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._accepted: WeakValueDictionary[str, Event] = WeakValueDictionary()

    def __call__(self, request: Request) -> bytes:
        asked = request.json()
        act = self._ACTS.get(asked.get("do")) if isinstance(asked, dict) else None
        if act is None:
            raise RemoteError("UNIMPLEMENTED", "this master exchanges keys, authorises, lists and accepts")
        return json.dumps(act(self, request, asked)).encode()

    def _exchange(self, request: Request, asked: dict[str, Any]) -> Any:
        name, public = str(asked.get("name")), asked.get("public")
        if not is_public(public):
            raise RemoteError("INVALID_ARGUMENT", "that is nobody's public half")
        return {"public": request.step("exchange", state.exchange, name, public)}

    def _authorise(self, request: Request, asked: dict[str, Any]) -> Any:
        agent = str(asked.get("fingerprint"))
        # Made before it is asked whether it is accepted, so that an acceptance in between is not missed.
        accepted = self._accepted.setdefault(agent, Event())
        # The attempt is in the name because each run must look again. And an attempt that has stored something is none in vain,
        # of which there are few (`max_attempts`): a master may be restarted any number of times while an agent waits.
        if not request.step(f"look {request.attempt}", state.is_accepted, agent):
            accepted.wait()
        # A step of its own: a nonce that was made and not stored was seen by nobody, so another one may be made.
        nonce = request.step("nonce", secrets.token_hex, 16)
        return {"nonce": nonce, "proof": request.step("session", state.open_session, agent, nonce)}

    def _accept(self, request: Request, asked: dict[str, Any]) -> Any:
        self._check_operator(request)
        agent = str(asked.get("fingerprint"))
        name = request.step("accept", state.accept, agent, str(asked.get("by")))
        # If the master dies here, the agent's request, which runs again, sees that it is accepted.
        if (accepted := self._accepted.get(agent)) is not None:
            accepted.set()
        return {"name": name}

    def _list(self, request: Request, asked: dict[str, Any]) -> Any:
        self._check_operator(request)
        return request.step("list", state.listing)

    def _check_operator(self, request: Request) -> None:
        if not hmac.compare_digest(b"".join(request.frames[1:]), signature(self._token, request.body)):
            raise RemoteError("PERMISSION_DENIED", "this takes the operator's token")

    _ACTS = {"exchange keys": _exchange, "authorise": _authorise, "accept": _accept, "list": _list}


def operator_token(folder: Path) -> bytes:
    """What was made when the first master was started here."""
    path = folder / "operator.token"
    if not path.exists():
        beside = path.with_suffix(".new")
        beside.write_bytes(secrets.token_bytes(32))
        beside.replace(path)  # whole, or not there
    return path.read_bytes()


def main(endpoint: str, folder: Path) -> None:
    os.umask(0o077)
    server = Server(
        endpoint,
        Master(operator_token(folder)),
        journal=folder / "master.db",
        deadline=None,  # agents wait for people
        max_inflight=MOST,
        cancel_vanished=True,  # an agent that is gone gives its place back; if it comes again, its request goes on
    )
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever(stop_timeout=0.5)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
