"""A watchdog: a run that stands still says where, shows the stacks of its threads and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Any

import jax

from vdiff_jax.training.goodput import Goodput

STALLED = 77
"""The exit code."""
_PATIENCE = 20  # heartbeats that a phase may take which is long by nature, or was not finished once
_SPREAD = 5  # times the longest so far that a step or a batch may take
_REGULAR = ("step", "data")
_WORDS = {
    "step": "the step has not finished: a device, or another process that it waits for",
    "data": "waiting for the data loader",
    "compile": "compiling the step, or waiting for another process to",
    "checkpoint": "writing or restoring a checkpoint, or waiting for another process to",
    "export": "making a preview or writing a model, or waiting for another process to",
}


class Heartbeat:
    """Watches a run's clock, and ends the process with `STALLED` where nothing goes on. A context manager.

    seconds: what a step or a batch may take, or five times the longest so far if that is more; the first of each, and
    phases that are long by nature, 20 times as long. 0 = off. The start of a run, before the loop, is not watched.
    """

    def __init__(self, clock: Goodput, seconds: float):
        self._clock, self._seconds = clock, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def limit(self, phase: str) -> float:
        """Seconds that this phase may take now."""
        if phase in _REGULAR and phase in self._clock.longest:
            return max(self._seconds, _SPREAD * self._clock.longest[phase])
        return _PATIENCE * self._seconds

    def _watch(self) -> None:
        pause, last, asleep = self._seconds / 10, time.monotonic(), 0.0
        watched = self._clock.now
        while not self._over.wait(pause):
            if jax.process_count() > 1:  # should code in C keep even this thread from running
                faulthandler.dump_traceback_later(max(3 * self._seconds, 60), exit=True)
            moment = time.monotonic()
            if self._clock.now != watched:
                watched, asleep = self._clock.now, 0.0
            # This thread was not woken either: the whole process was stopped, as by Ctrl-Z.
            asleep += max(moment - last - 2 * pause, 0.0)
            last = moment
            phase, since = watched
            if phase in _WORDS and moment - since - asleep > self.limit(phase):
                self._end(phase, moment - since)

    def _end(self, phase: str, seconds: float) -> None:
        who = f"process {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""
        print(
            f"\nerror: {who}no progress for {seconds:.0f} s after step {self._clock.step} ({phase}): {_WORDS[phase]}. "
            "Start again to go on from the newest checkpoint; train.heartbeat_s is how long to wait. "
            "The stacks of all threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(STALLED)
