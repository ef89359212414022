"""The tests that every journal backend must pass.

    class TestMine(JournalConformance):
        def make(self, folder, *, ttl=86_400.0, max_bytes=2**30):
            return MyJournal(folder / "requests.mine", ttl=ttl, max_bytes=max_bytes)

in a test file is all that a backend needs; pytest runs the tests, hypothesis is needed for one of them. There is a test for
each rule of `greensafe.journal.base` and `greensafe.sansio.records`; `Model` says the same in code.
The tests stand in `requests`, `batches` and `lasting`.

What it does not test, since only the backend knows how: what happens when the place is full, read-only, damaged or somebody
else's (JournalUnavailable), and what a loss of power leaves.
"""

from __future__ import annotations

from pathlib import Path

from ...journal.base import Journal
from .batches import Batches
from .lasting import Lasting
from .model import Model, Request
from .requests import Requests

__all__ = ["JournalConformance", "Model", "Request"]


# pytest runs the tests of the last base first.
class JournalConformance(Lasting, Batches, Requests):
    """Tests of a Journal; see the module's head. A subclass stands at the top of its file, and needs nothing to be made."""

    def make(self, folder: Path, *, ttl: float = 86_400.0, max_bytes: int = 2**30) -> Journal:
        """Make a journal that is not open yet. The same folder means the same place, with what was stored there.

        Args:
            folder: Is there, and empty at first.
            ttl: Seconds after which something that has not changed is dropped.
            max_bytes: How much may be kept.
        """
        raise NotImplementedError
