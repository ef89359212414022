"""The model of a journal: the rules of `greensafe.journal.base` and `greensafe.sansio.records`, in code.

Each case is a method that a test can override to break one rule. It keeps nothing, and drops nothing: it knows no file, no time
and no size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from ...errors import JournalError
from ...sansio.records import Ack, Begin, Effect, Excuse, Failed, Finish, Forget, Known, Rerun, State, Step, Write

__all__ = ["Model", "Request"]


class Model:
    """A journal that keeps nothing on disk: the rules in code, with which `test_any_history` compares.

    Attributes:
        requests: By their id.
    """

    def __init__(self) -> None:
        self.requests: dict[bytes, Request] = {}

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        """Do the writes, as Journal.commit does."""
        before = deepcopy(self.requests)
        try:
            return [self.write(write) for write in writes]
        except JournalError:
            self.requests = before
            raise

    def write(self, write: Write) -> Any:
        """Do one of them, and return its result; JournalError if that cannot be."""
        match write:
            case Begin():
                return self.begin(write)
            case Ack(id):
                if (request := self.requests.get(id)) and request.state is State.DONE:
                    request.state, request.reply = State.ACKED, []
                return None
            case Excuse(id):
                if (request := self.requests.get(id)) and request.state is State.OPEN:
                    request.fruitless = max(request.fruitless - 1, 0)
                return None
            case Forget(id):
                self.requests.pop(id, None)
                return None
            case Effect(b"", _, _, act):
                return self.call(act)
        request = self.requests.get(write.request_id)
        if request is None or request.state is not State.OPEN:
            raise JournalError("it is not open")
        return self.go_on(request, write)

    def begin(self, write: Begin) -> Known | None:
        """The result of a Begin."""
        request = self.requests.get(write.request_id)
        if request is None:
            self.requests[write.request_id] = Request(list(write.body), write.until)
            return None
        return request.known(request.body == list(write.body))

    def go_on(self, request: Request, write: Write) -> Any:
        """The result of a write about a request that is open."""
        match write:
            case Rerun():
                request.attempts += 1
                request.fruitless += 1
            case Step(_, name, number, value):
                self.step(request, (name, number), value)
            case Effect(_, name, number, act):
                return self.effect(request, (name, number), act)
            case Finish(_, kind, body):
                request.state, request.kind, request.reply, request.steps = State.DONE, kind, list(body), {}
        return None

    def step(self, request: Request, key: tuple[str, int], value: bytes) -> None:
        """Store a step, unless it is."""
        if key not in request.steps:
            request.steps[key] = value
            request.fruitless = 0

    def effect(self, request: Request, key: tuple[str, int], act: Callable[[Any], bytes]) -> Any:
        """The result of an Effect."""
        if key in request.steps:
            return request.steps[key]
        value = self.call(act)
        if not isinstance(value, Failed):
            self.step(request, key, value)
        return value

    def call(self, act: Callable[[Any], bytes]) -> bytes | Failed:
        """Call it; return its result, or what it has raised."""
        try:
            value = act(None)
            if not isinstance(value, bytes):
                raise TypeError(f"not bytes: {value!r}")
        except Exception as error:  # noqa: BLE001 - it is the result
            return Failed(error)
        return value


@dataclass
class Request:
    """One request, as the model keeps it."""

    body: list[bytes]
    until: float | None
    state: State = State.OPEN
    attempts: int = 1
    fruitless: int = 1
    kind: int = 0
    reply: list[bytes] = field(default_factory=list)
    steps: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def known(self, is_same: bool) -> Known:
        """Return what a journal would say of it."""
        until, steps = self.until, dict(self.steps)
        return Known(self.state, is_same, self.attempts, self.fruitless, until, self.kind, list(self.reply), steps)
