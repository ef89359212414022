"""Limits on everything that a block of code waits for."""

from __future__ import annotations

from .scope import (
    HandlerScope as HandlerScope,
    allowed_until as allowed_until,
    check as check,
    deadline as deadline,
    is_signal_due as is_signal_due,
    move_on as move_on,
    preempted as preempted,
    preemptible as preemptible,
    raise_if_preempted as raise_if_preempted,
    shield as shield,
)
from .seconds import to_seconds as to_seconds
from .signal import DeadlineSignal as DeadlineSignal

__all__ = [
    "DeadlineSignal",
    "HandlerScope",
    "allowed_until",
    "check",
    "deadline",
    "is_signal_due",
    "move_on",
    "preempted",
    "preemptible",
    "raise_if_preempted",
    "shield",
    "to_seconds",
]
