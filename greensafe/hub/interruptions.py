"""Exceptions that a signal's handler raises while the library works: how they are known, and what they have interrupted.

Python runs a signal's handler in the main thread, wherever that is: when a function begins, when a loop goes round, after a
call of C, and within each call of pyzmq, which asks for signals after libzmq is done. So pyzmq raises although the frame has
been sent, or has been received and is dropped. Which of the two it was stands in the traceback: Cython notes the lines.

It does not know what the frames belong to.
"""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import zmq.backend.cython

__all__ = ["has_called", "is_interruption", "is_of_zmq"]

#: How the code of pyzmq's calls names its file.
_FILE = "zmq/backend/cython/_zmq.py"

#: The functions of pyzmq that call libzmq to send or receive a frame, and the call by which each does so.
_CALLS = {
    "_send_copy": "zmq_msg_send(",
    "_send_frame": "zmq_msg_send(",
    "_recv_copy": "zmq_msg_recv(",
    "_recv_frame": "zmq_msg_recv(",
}

#: What stands for the line of a call that is not known: pyzmq asks for signals after libzmq's call, and hardly ever before it.
_UNKNOWN = 0


def is_interruption(error: BaseException) -> bool:
    """Return whether an exception came from outside, by a signal's handler (or is none that code raises by mistake)."""
    if not isinstance(error, Exception):
        return True
    handlers = _handlers()
    return any(trace.tb_frame.f_code in handlers for trace in _traces(error.__traceback__))


def is_of_zmq(error: BaseException) -> bool:
    """Return whether pyzmq has raised it by itself, and not a signal's handler that ran in one of its calls."""
    if not isinstance(error, zmq.ZMQError):
        return False
    traces = _traces(error.__traceback__)
    return bool(traces) and traces[-1].tb_frame.f_code.co_filename.endswith(_FILE)


def has_called(error: BaseException) -> bool | None:
    """Return whether libzmq had been called when a signal's handler raised in a call of pyzmq's; None if elsewhere."""
    found: bool | None = None
    for trace in _traces(error.__traceback__):
        code = trace.tb_frame.f_code
        if code.co_filename.endswith(_FILE):
            name = code.co_name.rpartition(".")[2]
            if name in _CALLS:
                found = trace.tb_lineno > _lines().get(name, _UNKNOWN)
            elif name == "_getsockopt":
                found = True  # recv asks for RCVMORE when it has the frame
            elif found is None:
                found = False
    return found


def _traces(trace: TracebackType | None) -> list[TracebackType]:
    found = []
    while trace is not None:
        found.append(trace)
        trace = trace.tb_next
    return found


def _handlers() -> set[CodeType]:
    """Return the code of all signal handlers that are installed."""
    found = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        code = getattr(handler, "__code__", None)
        if code is None and callable(handler):
            code = getattr(type(handler).__call__, "__code__", None)
        if code is not None:
            found.add(code)
    return found


@functools.cache
def _lines() -> dict[str, int]:
    """The line of each call of libzmq in the source that pyzmq was compiled from, as far as that is there to read."""
    found: dict[str, int] = {}
    try:
        source = (Path(zmq.backend.cython.__file__).parent / "_zmq.py").read_text()
    except OSError:
        return found
    inside = ""
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("def "):
            inside = line[4:].partition("(")[0]
        if inside in _CALLS and inside not in found and _CALLS[inside] in line:
            found[inside] = number
    return found
