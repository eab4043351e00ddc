"""The training loop: batches in, checkpoints and metrics out, a clean stop on SIGTERM or Ctrl-C.

It knows nothing of models or data: it is given a jitted step, a function from data position to batches, and callbacks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vdiff_jax.training.agreement import first_message
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.heartbeat import Heartbeat
from vdiff_jax.training.step import TrainState
from vdiff_jax.training.stopping import StopRequest
from vdiff_jax.training.writers import MetricWriter, ProgressLine, Scalars
from vdiff_jax.types import Array, Batch

Callback = Callable[[int, TrainState, MetricWriter | None], None]
TIME_LIMIT, SIGNAL = "time limit reached", "signal received"
MOST_REWINDS = 3
"""To the same checkpoint; one more ends the run."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """All intervals are in steps; 0 switches a thing off.

    sample_steps: previews. model_steps: finished models on the way, to measure quality against steps.
    max_skipped_in_row: that many non-finite updates in a row stop the run, after a checkpoint.
    max_minutes: stop cleanly, with a checkpoint, after this many minutes in this process (0 = no limit).
    rewind_on_spikes: that many spikes (`train.spike_sigmas`) within 128 steps restore the newest checkpoint, and
        training goes on with the data after them.
    heartbeat_s: seconds without progress after which the process says where it hangs, and ends.
    """

    num_steps: int
    log_steps: int = 50
    checkpoint_steps: int = 500
    sample_steps: int = 1000
    model_steps: int = 0
    max_skipped_in_row: int = 10
    max_minutes: float = 0.0
    rewind_on_spikes: int = 0
    heartbeat_s: float = 100.0


class NonFiniteRun(RuntimeError):
    """Too many non-finite updates in a row."""


class SpikingRun(RuntimeError):
    """Spikes come back however often the run is rewound."""


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]],
    batches_from: Callable[[int], Iterator[Batch]],
    key: Array,
    config: LoopConfig,
    *,
    batch_size: int,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    data_offset: int = 0,
    clock: Goodput | None = None,
    writer: MetricWriter | None = None,
    on_sample: Callback | None = None,
    on_model: Callable[[int, TrainState], None] | None = None,
) -> tuple[TrainState, str | None]:
    """Train from `state.step` to `config.num_steps`; returns (state, None or why it stopped: TIME_LIMIT, SIGNAL).

    batches_from: data position -> iterator of batches from there on. data_offset: the position is the step plus this,
    0 unless the run was rewound. meta: stored beside every checkpoint, with `data_offset`. clock: accounts for the
    time. A checkpoint is written at the end, on SIGTERM/Ctrl-C, on the time limit and before `NonFiniteRun` is raised.
    All processes call this with the same arguments, but `writer`, which only the first has.
    """
    loop = _Loop(config, checkpoints, meta, data_offset, clock or Goodput(), writer)
    loop.step = loop.clock.step = int(state.step)
    loop.progress = ProgressLine(config.num_steps, loop.step, batch_size, quiet=jax.process_index() > 0)
    try:
        with StopRequest() as stop, Heartbeat(loop.clock, config.heartbeat_s):
            state = loop.run(state, train_step, batches_from, key, stop, on_sample, on_model)
            loop.save(state)
            checkpoints.wait()
            loop.clock.enter("export")
    finally:
        loop.progress.close()
    if loop.step >= config.num_steps:
        return state, None
    # Only those whose own time is over know that it was not a signal.
    return state, TIME_LIMIT if first_message(TIME_LIMIT if stop.reason == TIME_LIMIT else None) else SIGNAL


@dataclasses.dataclass
class _Loop:
    """What a run carries from step to step beside its state."""

    config: LoopConfig
    checkpoints: Checkpoints
    meta: dict[str, Any]
    data_offset: int
    clock: Goodput
    writer: MetricWriter | None
    progress: ProgressLine = dataclasses.field(init=False)
    step: int = 0
    compiled: bool = False
    refused: float = 0.0
    rewinds: tuple[int, int] = (-1, 0)  # the step last gone back to, and how often

    def run(self, state, train_step, batches_from, key, stop: StopRequest, on_sample, on_model) -> TrainState:
        started, config, clock = time.monotonic(), self.config, self.clock
        batches = batches_from(self.step + self.data_offset)
        before: dict[str, Array] | None = None  # metrics of the step before
        while self.step < config.num_steps:
            state, metrics = self._one_step(state, train_step, batches, key, before)
            # The step before this one is read, so that reading never stalls the device.
            if before is not None:
                self._log(before, self.step - 1)
                self._end_if_not_finite(before, self.step - 1, state)
                if config.rewind_on_spikes and int(before["recent_spikes"]) >= config.rewind_on_spikes:
                    state = self._rewind(state)
                    batches, before = batches_from(self.step + self.data_offset), None
                    continue
            before = metrics
            self.progress.advance(self.step)
            if _due(self.step, config.checkpoint_steps):
                self.save(state)
            if on_sample is not None and _due(self.step, config.sample_steps):
                self._export("preview", on_sample, state, self.writer)
            if on_model is not None and _due(self.step, config.model_steps):
                self._export("model", on_model, state)
            if config.max_minutes and time.monotonic() - started > 60 * config.max_minutes:
                stop.ask(TIME_LIMIT)
            if reason := stop.agreed():
                self.progress.note(f"stopping at step {self.step}: {reason}")
                break
            clock.step = self.step
        if before is not None:
            self._log(before, self.step)
            self._end_if_not_finite(before, self.step, state)
        return state

    def _one_step(self, state, train_step, batches, key, before: dict[str, Array] | None):
        clock = self.clock
        clock.enter("data")
        batch = next(batches)
        # Where the devices are busy with the step before, nothing waited for the batch.
        busy = before is not None and not cast(Any, before["loss"]).is_ready()
        clock.enter("step" if self.compiled else "compile", "step" if busy else None)
        self.compiled = True
        state, metrics = train_step(state, batch, key)
        # Waiting for the first step is waiting for the slowest process to compile; it counts as that.
        jax.block_until_ready((metrics if before is None else before)["loss"])
        self.step += 1
        return state, metrics

    def save(self, state: TrainState) -> None:
        self.clock.saved(self.step)
        self.clock.enter("checkpoint")
        self.checkpoints.save(state, {**self.meta, "data_offset": self.data_offset})

    def _export(self, name: str, write: Callable[..., None], *arguments: Any) -> None:
        """The first process writes, and the others wait here, where they are not taken for stalled."""
        self.clock.enter("export")
        write(self.step, *arguments)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)

    def _rewind(self, state: TrainState) -> TrainState:
        """The newest checkpoint, to go on with the data after the step that was one spike too many."""
        position = self.step - 1 + self.data_offset
        self.clock.enter("checkpoint")
        self.checkpoints.wait()
        if self.checkpoints.latest_step is None:
            raise SpikingRun(
                f"{self.config.rewind_on_spikes} spikes before the first checkpoint (step {self.step - 1}): lower the "
                "learning rate, or train.checkpoint_steps"
            )
        abstract = jax.eval_shape(lambda tree: tree, state)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # its memory is needed for the restored one
        state, _ = self.checkpoints.restore(abstract, shardings)
        # What the checkpoint knows of recent spikes must not count towards the next rewind.
        history = dataclasses.replace(state.history, spiked=_cleared(state.history.spiked))
        state = dataclasses.replace(state, history=history)
        step = int(state.step)
        self.rewinds = (step, self.rewinds[1] + 1 if self.rewinds[0] == step else 1)
        if self.rewinds[1] > MOST_REWINDS:
            raise SpikingRun(
                f"spikes came back after {MOST_REWINDS} rewinds to step {step}: lower the learning rate, or look at "
                "the data; the checkpoint is from before them"
            )
        self.progress.note(
            f"{self.config.rewind_on_spikes} spikes up to step {self.step - 1}: back to step {step}, with the data "
            f"from position {position} on"
        )
        self.step, self.data_offset = step, position - step
        self.clock.step = step
        self.clock.resumed(step)
        return state

    def _log(self, metrics: dict[str, Array], step: int) -> None:
        config = self.config
        if not (_due(step, config.log_steps) or step == config.num_steps):
            return
        scalars = to_scalars(jax.device_get(metrics))
        scalars["clips_per_s"] = self.progress.report(step, scalars)
        if scalars["skipped"] + scalars["spikes"] > self.refused:
            self.progress.note(f"{scalars['skipped']:.0f} updates were not finite, {scalars['spikes']:.0f} were spikes")
        self.refused = scalars["skipped"] + scalars["spikes"]
        if self.writer is not None:
            shares = {f"goodput/{name}": share for name, share in self.clock.percent().items()}
            self.writer.scalars(step, {**scalars, **shares})
            self.clock.write()

    def _end_if_not_finite(self, metrics: dict[str, Array], step: int, state: TrainState) -> None:
        """At every step, not only at those that are logged."""
        most = self.config.max_skipped_in_row
        if most and (in_row := int(metrics["skipped_in_row"])) >= most:
            self.save(state)
            self.checkpoints.wait()
            raise NonFiniteRun(
                f"{in_row} updates in a row had a non-finite loss or gradient (step {step}); "
                f"the last good state is saved in {self.checkpoints.folder}: lower the learning rate or look at the "
                "data"
            )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _cleared(flags: Array) -> Array:
    return jax.device_put(jnp.zeros(flags.shape, flags.dtype), flags.sharding)


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
