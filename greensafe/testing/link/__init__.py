"""A link between a program and its peer that fails on command."""

from __future__ import annotations

from .faulty_link import Direction as Direction, FaultyLink as FaultyLink

__all__ = ["Direction", "FaultyLink"]
