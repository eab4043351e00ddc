"""A recipe made into the functions that `training` needs: the two stages `autoencoder` and `diffusion`.

This is the one place where data, networks, losses and previews of a training run meet; `train.py` only drives it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.data.buckets import parse_buckets
from vdiff_jax.recipe import Recipe, check_stage, data_config, lora_config
from vdiff_jax.stages.autoencoder import autoencoder_stage
from vdiff_jax.stages.diffusion import diffusion_stage
from vdiff_jax.stages.stage import Stage
from vdiff_jax.starting_point import filled, load_start

__all__ = ["Stage", "check_batches", "make_stage"]


def make_stage(recipe: Recipe, mesh: Mesh, workdir: Path, look: Callable[[Recipe], None] | None = None) -> Stage:
    """The stage that `recipe.stage` names.

    look: called with the recipe once it is whole, before any data are read for training.
    Raises ValueError for settings that cannot work and OSError for data that cannot be read, before anything is made.
    """
    check_batches(recipe, mesh)
    check_stage(recipe.stage)
    lora_config(recipe)
    start = load_start(recipe, mesh)
    recipe = recipe if start is None else filled(recipe, start)
    if look is not None:
        look(recipe)
    stages = {"autoencoder": autoencoder_stage, "diffusion": diffusion_stage}
    return stages[recipe.stage](recipe, data_config(recipe), start, mesh, workdir)


def check_batches(recipe: Recipe, mesh: Mesh) -> None:
    """Raises ValueError unless batches, also in the parts of an accumulation, and clips divide over the mesh."""
    data = data_config(recipe)
    shapes = parse_buckets(data.buckets, data.batch_size) if data.buckets else (data,)
    for shape in shapes:
        parallel.check_batch_size(shape.batch_size, mesh, recipe.train.accumulation_steps)
        parallel.check_num_frames(shape.num_frames, mesh)
