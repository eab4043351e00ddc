"""Progress of work that goes in batches, as lines on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class ProgressTimer:
    """One line per batch: done, total, time left (by the batches after the first, which compiles)."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic, unit: str = "clips"):
        self.name, self.unit, self._clock, self._first = name, unit, clock, None

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        since, before = self._first
        left = "" if done == before else f", {(total - done) * (now - since) / (done - before) / 60:.1f} min left"
        print(f"{self.name}: {done}/{total} {self.unit}{left}", file=sys.stderr, flush=True)
