"""Frames of the running thread and of other threads.

Their names in `sys` begin with an underscore, as not every Python need have them. The Pythons that gevent runs on have them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

__all__ = ["frame_at", "frames_of_threads"]

#: Return the frame so many calls up the stack: 0 is the caller's own.
frame_at: Callable[[int], FrameType] = sys._getframe

#: Return the innermost frame of every thread, by the thread's ident.
frames_of_threads: Callable[[], dict[int, FrameType]] = sys._current_frames
