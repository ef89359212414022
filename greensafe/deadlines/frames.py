"""Frames of generators, whose blocks can be suspended."""

from __future__ import annotations

import inspect
from types import FrameType

__all__ = ["is_generator", "is_on_stack"]

_GENERATOR_FLAGS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def is_generator(frame: FrameType) -> bool:
    """Return whether a block in this frame can be suspended between two values. One run by contextlib is its consumer's."""
    return bool(frame.f_code.co_flags & _GENERATOR_FLAGS) and not _is_contextmanager(frame)


def _is_contextmanager(frame: FrameType) -> bool:
    """Return whether a generator's frame is run by contextlib: then its consumer is the block that is meant."""
    back = frame.f_back
    while back is not None and back.f_code.co_flags & _GENERATOR_FLAGS:
        back = back.f_back
    return back is not None and back.f_globals.get("__name__") == "contextlib"


def is_on_stack(top: FrameType | None, frame: FrameType) -> bool:
    """Return whether a generator's frame is running below `top`, rather than suspended between two values."""
    while top is not None:
        if top is frame:
            return True
        top = top.f_back
    return False
