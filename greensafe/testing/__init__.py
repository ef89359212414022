"""What programs are tested with: a link that fails on command, and a clock that goes only when told.

from greensafe.testing import FaultyLink, ManualClock

docs/testing.md shows both in tests of a program. `import greensafe` does not load this package.
"""

from __future__ import annotations

from .clock import ManualClock as ManualClock
from .link import Direction as Direction, FaultyLink as FaultyLink

__all__ = ["Direction", "FaultyLink", "ManualClock"]
