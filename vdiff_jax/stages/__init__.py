"""A recipe made into the functions that `training` needs: the two stages `autoencoder` and `diffusion`.

This is the one place where data, networks, losses and previews of a training run meet; `train.py` only drives it.
"""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.data.buckets import parse_buckets
from vdiff_jax.recipe import DataConfig, Recipe, check_stage, data_config, lora_config
from vdiff_jax.stages.autoencoder import autoencoder_stage
from vdiff_jax.stages.diffusion import diffusion_stage
from vdiff_jax.stages.stage import Stage
from vdiff_jax.starting_point import filled, load_start

__all__ = ["Stage", "check_batches", "make_stage"]


def make_stage(recipe: Recipe, mesh: Mesh, workdir: Path) -> Stage:
    """The stage that `recipe.stage` names.

    Raises ValueError for settings that cannot work and OSError for data that cannot be read, before anything is made.
    """
    data = data_config(recipe)
    check_batches(data, mesh)
    check_stage(recipe.stage)
    lora_config(recipe)
    start = load_start(recipe, mesh)
    recipe = recipe if start is None else filled(recipe, start)
    stages = {"autoencoder": autoencoder_stage, "diffusion": diffusion_stage}
    return stages[recipe.stage](recipe, data_config(recipe), start, mesh, workdir)


def check_batches(data: DataConfig, mesh: Mesh) -> None:
    """Raises ValueError unless batches and clips of every shape divide over the mesh."""
    shapes = parse_buckets(data.buckets, data.batch_size) if data.buckets else (data,)
    for shape in shapes:
        parallel.check_batch_size(shape.batch_size, mesh)
        parallel.check_num_frames(shape.num_frames, mesh)
