"""The wish to stop: a signal or the time limit, and the step at which all processes do."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """True once SIGTERM or SIGINT arrived; a second SIGINT interrupts at once. Use as a context manager.

    With several processes JAX's preemption service receives SIGTERM: whichever process it reaches, all are told of the
    same step. That service is also sent what only one process knows, Ctrl-C or the time limit.
    """

    def __init__(self):
        self.reason: str | None = None
        self._interrupted = self._sent = False
        self._calls = 0
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # With several processes a handler of ours would take SIGTERM away from the service.
            numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            for number in numbers:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def agreed(self) -> str | None:
        """Why to stop now, or None; the same step on all processes, each of which calls it after every step."""
        if jax.process_count() == 1:
            return self.reason
        if self.reason and not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return None
        self.ask("signal received by one of the processes")
        return self.reason

    def _handle(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.ask("signal received")
