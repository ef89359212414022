"""Tools for the tests of programs: a link that fails on command, a clock set by hand, and the tests of a journal.

from greensafe.testing import FaultyLink, JournalConformance, ManualClock

docs/testing.md shows them in tests of a program. `import greensafe` does not load this package.
"""

from __future__ import annotations

from .clock import ManualClock as ManualClock
from .conformance import JournalConformance as JournalConformance
from .link import Direction as Direction, FaultyLink as FaultyLink

__all__ = ["Direction", "FaultyLink", "JournalConformance", "ManualClock"]
