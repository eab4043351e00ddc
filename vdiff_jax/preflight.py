"""What can be told of a training run before it takes its memory: its data, its mesh, its checkpoint, its step.

`train.py` does all of this before it begins, and with `--preflight` nothing else. Each thing that cannot work is
refused in a sentence of its own that ends with the fix.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.data.preflight import DataReport, check_data
from vdiff_jax.recipe import Recipe, data_config
from vdiff_jax.stages import Stage
from vdiff_jax.training.preflight import MemoryReport, check_memory, step_memory
from vdiff_jax.training.step import TrainState


def check_run_data(recipe: Recipe, mesh: Mesh) -> DataReport | None:
    """Look at the clips, see `data.preflight.check_data`; None for those that are rendered.

    recipe: a whole one, see `stages.make_stage`. Raises ValueError or OSError where no training is possible.
    """
    data = data_config(recipe)
    reads_prompts = recipe.stage == "diffusion" and recipe.model.text in ("joint", "minilm")
    return check_data(data, data.batch_size, parallel.batch_share(mesh)[1], needs_captions=reads_prompts)


def check_run_memory(stage: Stage, step: Any, state: TrainState, limit_gb: float = 0.0) -> list[MemoryReport]:
    """What a step needs on each device, one report for each shape of batch; all are compiled, which training needs.

    step: jitted, see `training.step.make_train_step`. state: see `abstract_state`. limit_gb: 0 = what the devices have.
    Raises ValueError for a step that does not fit.
    """
    reports = []
    for number in stage.example_steps:
        batches = stage.batches_from(number)
        batch = jax.tree.map(_shape, next(batches))
        batches.close()  # type: ignore[attr-defined]
        available = int(limit_gb * 1e9) or None
        reports.append(step_memory(step, state, batch, jax.random.key(0), available))
        check_memory(reports[-1])
    return reports


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
