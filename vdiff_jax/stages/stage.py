"""`Stage`: what a training run is made of, and the sheets of pictures that it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vdiff_jax.data.sources import SkipReport
from vdiff_jax.data.video_io import save_image
from vdiff_jax.training.step import LossFn
from vdiff_jax.training.writers import MetricWriter
from vdiff_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training run is made of.

    init: key -> trainable params. loss_fn: see `training.step.LossFn`. batches_from: step -> iterator of device
    batches. on_sample: (step, params, writer) -> shows what they make, or None. finish: (params, folder) -> writes the
    finished model. Both take the averaged parameters on the host, and one process calls them, in
    `parallel.on_this_process()`. left_out, unread, example_steps: see `Stream`. frozen: parameters that the loss reads
    and nothing changes, or None. start: what `init` gives where that depends on no key: weights of
    another model, which need no program to make them.
    """

    init: Callable[[Array], Params]
    loss_fn: LossFn
    batches_from: Callable[[int], Iterator[Batch]]
    on_sample: Callable[[int, Params, MetricWriter], None] | None
    finish: Callable[[Params, Path], None]
    left_out: SkipReport
    unread: SkipReport
    example_steps: tuple[int, ...] = (0,)
    frozen: Params | None = None
    start: Params | None = None


def save_sheet(workdir: Path, step: int, sheet: np.ndarray) -> None:
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    save_image(folder / f"{step:07d}.png", sheet)
