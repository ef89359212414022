"""Raise an exception where a signal's handler could: at each such place in the package's code, one after the other.

CPython calls handlers when a function begins, when a loop goes round, and when a call of C has returned, whose result is lost
if the handler raises. (It does so in pyzmq's calls as well, which no trace function sees.)

The trace function can raise at the next opcode only. From Python 3.12 on a RETURN_VALUE stands outside of the `try` that its
call is in, where no handler would raise: so a call whose result is returned is left out where a function has a `try`.

Before Python 3.12 each greenlet is traced by itself: what runs in the hub is interrupted only if the hub has begun inside.
"""

from __future__ import annotations

import sys
from dis import opmap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import greensafe

__all__ = ["Interrupter", "Interruption"]

_PACKAGE = str(Path(greensafe.__file__).parent)

_CALLS = frozenset(number for name, number in opmap.items() if name.startswith("CALL") or name == "PRECALL")
_RETURN = opmap["RETURN_VALUE"]
_JUMPS = frozenset(number for name, number in opmap.items() if name.startswith("JUMP_BACKWARD"))


class Interruption(BaseException):
    """What the handler raises: as KeyboardInterrupt, it is no Exception."""


class Interrupter:
    """Raise an Interruption at the place with this number, once; to be used in a `with`.

    Args:
        number: From 0 on. If there are fewer places nothing is raised.
        inside: Folders or files of the package; only their code is interrupted.

    Attributes:
        number: As it was given.
        has_begun: Whether it was entered.
        has_raised: Whether it has.
        where: The function and line.
    """

    def __init__(self, number: int, *inside: str) -> None:
        self.number = self._left = number
        self._prefixes = tuple(f"{_PACKAGE}/{each}" for each in inside or ("",))
        self._called: dict[FrameType, bool] = {}
        self._is_over = False
        self.has_begun = False
        self.has_raised = False
        self.where = ""

    def __enter__(self) -> Interrupter:
        self.has_begun = True
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        sys.settrace(None)
        self._called.clear()

    def _on_call(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_back in self._called:
            self._called[frame.f_back] = False  # it was a call of Python
        if self._is_over or self.has_raised or not frame.f_code.co_filename.startswith(self._prefixes):
            return None
        self._pass(frame)
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_event

    def _on_event(self, frame: FrameType, event: str, _: object) -> Any:
        if self._is_over or self.has_raised:
            return None
        if event == "return":
            self._called.pop(frame, None)
        elif event == "opcode":
            was_call = self._called.pop(frame, False)
            opcode = _opcode(frame.f_code, frame.f_lasti)
            if (was_call and not (opcode == _RETURN and frame.f_code.co_exceptiontable)) or opcode in _JUMPS:
                self._pass(frame)
            if opcode in _CALLS:
                self._called[frame] = True
        return self._on_event

    def _pass(self, frame: FrameType) -> None:
        self._left -= 1
        if self._left < 0:
            self.has_raised = True
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            raise Interruption(self.where)


def _opcode(code: CodeType, at: int) -> int:
    return code.co_code[at]
