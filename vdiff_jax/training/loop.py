"""The training loop: batches in, checkpoints and metrics out, a clean stop on SIGTERM or Ctrl-C.

It knows nothing of models or data: it is given a jitted step, a function `batch_at(step)` and callbacks.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.step import TrainState
from vdiff_jax.training.writers import MetricWriter, ProgressLine, Scalars
from vdiff_jax.types import Array, Batch

Callback = Callable[[int, TrainState, MetricWriter | None], None]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """All intervals are in steps; 0 switches a thing off.

    sample_steps: previews. model_steps: finished models on the way, to measure quality against steps.
    max_skipped_in_row: that many non-finite updates in a row stop the run, after a checkpoint.
    max_minutes: stop cleanly, with a checkpoint, after this many minutes in this process (0 = no limit).
    """

    num_steps: int
    log_steps: int = 50
    checkpoint_steps: int = 500
    sample_steps: int = 1000
    model_steps: int = 0
    max_skipped_in_row: int = 10
    max_minutes: float = 0.0


class NonFiniteRun(RuntimeError):
    """Too many non-finite updates in a row."""


class StopRequest:
    """True once SIGTERM or SIGINT arrived; a second SIGINT interrupts at once. Use as a context manager."""

    def __init__(self):
        self.signal: int | None = None
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]],
    batches: Iterator[Batch],
    key: Array,
    config: LoopConfig,
    *,
    batch_size: int,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    writer: MetricWriter | None = None,
    on_sample: Callback | None = None,
    on_model: Callable[[int, TrainState], None] | None = None,
) -> tuple[TrainState, bool]:
    """Train from `state.step` to `config.num_steps`; returns (state, finished).

    batches: an iterator that starts at `state.step`. meta: stored beside every checkpoint. A checkpoint is written
    at the end, on SIGTERM/Ctrl-C, on the time limit and before `NonFiniteRun` is raised.
    """
    step = int(state.step)
    started = time.monotonic()
    progress = ProgressLine(config.num_steps, step, batch_size)
    pending: tuple[int, dict[str, Array]] | None = None
    try:
        with StopRequest() as stop:
            while step < config.num_steps:
                state, metrics = train_step(state, next(batches), key)
                step += 1
                # Read the step before this one, so that reading never stalls the device.
                if pending is not None:
                    _log(pending, config, writer, progress, checkpoints, state, meta)
                pending = (step, metrics) if _due(step, config.log_steps) or step == config.num_steps else None
                progress.advance(step)
                if _due(step, config.checkpoint_steps):
                    checkpoints.save(state, meta)
                if on_sample is not None and _due(step, config.sample_steps):
                    on_sample(step, state, writer)
                if on_model is not None and _due(step, config.model_steps):
                    on_model(step, state)
                late = config.max_minutes and time.monotonic() - started > 60 * config.max_minutes
                if stop or late:
                    progress.note(f"stopping at step {step}: " + ("signal received" if stop else "time limit reached"))
                    break
        if pending is not None:
            _log(pending, config, writer, progress, checkpoints, state, meta)
        checkpoints.save(state, meta)
        checkpoints.wait()
    finally:
        progress.close()
    return state, step >= config.num_steps


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _log(pending, config: LoopConfig, writer, progress: ProgressLine, checkpoints, state, meta) -> None:
    step, metrics = pending
    scalars = to_scalars(jax.device_get(metrics))
    scalars["clips_per_s"] = progress.report(step, scalars)
    if writer is not None:
        writer.scalars(step, scalars)
    if config.max_skipped_in_row and scalars["skipped_in_row"] >= config.max_skipped_in_row:
        checkpoints.save(state, meta)
        checkpoints.wait()
        raise NonFiniteRun(
            f"{int(scalars['skipped_in_row'])} updates in a row had a non-finite loss or gradient (step {step}); "
            f"the last good state is saved in {checkpoints.folder}: lower the learning rate or look at the data"
        )


def to_scalars(metrics: dict[str, Any]) -> Scalars:
    """Flatten metrics for the log. `{name}_sum` and `{name}_count` vectors (per log-SNR bin) become bin means."""
    scalars: Scalars = {}
    for name, value in metrics.items():
        array = np.asarray(value)
        if array.ndim == 0:
            scalars[name] = float(array)
        elif name.endswith("_sum"):
            count = np.asarray(metrics[name.removesuffix("_sum") + "_count"])
            for index in np.flatnonzero(count):
                scalars[f"{name.removesuffix('_sum')}/{index}"] = float(array[index] / count[index])
    return scalars
