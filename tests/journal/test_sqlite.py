"""SqliteJournal: the rules of a journal, and what only a file can go through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greensafe.journal import Journal, SqliteJournal
from greensafe.testing.conformance import JournalConformance


class TestConformance(JournalConformance):
    """It keeps the rules of a journal."""

    def make(self, folder: Path, **limits: Any) -> Journal:
        return SqliteJournal(folder / "requests.db", **limits)
