"""The tests of a journal backend."""

from __future__ import annotations

from .model import Model as Model, Request as Request
from .suite import JournalConformance as JournalConformance

__all__ = ["JournalConformance", "Model", "Request"]
