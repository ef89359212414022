"""Limits as numbers of seconds."""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from typing import Any

__all__ = ["ENDLESS", "to_float", "to_seconds"]

#: The longest limit in seconds, which is none beyond it: what is computed from it does not become infinite.
ENDLESS = 1e300


def to_seconds(value: Any) -> float | None:
    """Check a limit: None and infinity are none, 0 and negative have passed, timedelta and Decimal are fine.

    Raises:
        TypeError: It is not a number of seconds; bool, str and bytes are not.
        ValueError: It is NaN.
    """
    if value is None:
        return None
    if type(value) is not float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        elif isinstance(value, (bool, str, bytes)) or not isinstance(value, (int, float, Decimal)):
            raise TypeError(f"a limit is a number of seconds, a timedelta or None, not {value!r}")
        value = to_float(value)
    if value != value:
        raise ValueError("a limit cannot be NaN")
    if value > ENDLESS:
        return None
    return float(value) if value > 0 else 0.0


def to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else 0.0
