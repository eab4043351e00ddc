"""What a training step and the sampler send between devices, counted on simulated ones, and that meshes agree.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --config=configs/shapes.py --meshes=8x1x1,1x8x1,2x2x2,1x1x8 --steps=3

For each mesh (data x fsdp x context): how often and how many bytes, in units of the float32 parameters, each kind of
collective has; what the state takes on a device; and how far losses and parameters after --steps are from one device.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from vdiff_jax import parallel
from vdiff_jax.collectives import collectives, histogram
from vdiff_jax.command import use_compile_cache
from vdiff_jax.recipe import Recipe, section
from vdiff_jax.stages import make_stage
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import init_sharded_state, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe; default: a small network on synthetic clips.")
_MESHES = flags.DEFINE_list("meshes", "8x1x1,4x1x1,2x1x1,1x8x1,4x2x1,2x2x2,1x1x8", "Meshes, data x fsdp x context.")
_STEPS = flags.DEFINE_integer("steps", 3, "Training steps that are compared with one device; 0 = count only.")
_SMALL = {
    "data": {"source": "shapes", "size": 32, "num_frames": 8, "batch_size": 8, "context_length": 24},
    "model": {
        "autoencoder_from": "shapes",
        "unet": {"channels": (32, 64), "attention": (True, True), "embedding_features": 64},
        "text_encoder": {"features": 32, "hidden_features": 64, "layers": 1},
    },
    # Adam divides a gradient by its size; where the true one is zero, that makes steps of rounding errors.
    "optimizer": {"warmup_steps": 1, "epsilon": 1e-3},
}


def main(_: list[str]) -> None:
    use_compile_cache()
    recipe = _CONFIG.value or _small_recipe()
    one = None
    for name in ["1x1x1", *_MESHES.value]:
        result, losses, params = measure(recipe, name, _STEPS.value)
        if one is not None and _STEPS.value:
            result["loss"] = float(np.abs(losses / one[0] - 1).max())
            # A leaf that starts at zero and has no gradient holds rounding errors only: a step is the least scale.
            least = recipe.optimizer.learning_rate
            result["params"] = max(
                float(np.abs(a - b).max() / max(np.abs(a).max(), least))
                for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(params))
            )
        one = one or (losses, params)
        print(json.dumps(result), flush=True)


def measure(recipe: Recipe, name: str, steps: int) -> tuple[dict, np.ndarray, dict]:
    """(what is told of a mesh, losses [steps], parameters after them on the host)."""
    shape = [int(size) for size in name.split("x")]
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), max(steps, 3))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        stage = make_stage(recipe, mesh, Path(folder))
        key = jax.random.key(recipe.seed)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh, start=stage.start)
        taken = parallel.bytes_per_device(state)
        batches = stage.batches_from(0)
        first = next(batches)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings).lower(state, first, key).compile()
        weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
        losses = []
        for index in range(steps):
            state, metrics = step(state, first if index == 0 else next(batches), key)
            losses.append(float(metrics["loss"]))
        params = jax.device_get(state.params)
    sent = collectives(step.as_text())
    known = {leaf.shape for leaf in jax.tree.leaves(params)}
    gathers = [(shape, 4 * math.prod(shape)) for c in sent if c.kind == "all-gather" for _, shape in c.shapes]
    return (
        {
            "mesh": name,
            "weights_bytes": weights,
            "sent": {kind: [count, round(size / weights, 4)] for kind, (count, size) in histogram(sent).items()},
            "gathered_weights": round(sum(size for shape, size in gathers if shape in known) / weights, 4),
            "largest_other_gather_bytes": max((size for shape, size in gathers if shape not in known), default=0),
            "state_per_device": round(taken / (4 * weights / mesh.shape["fsdp"]), 4),
        },
        np.array(losses),
        params,
    )


def _small_recipe() -> Recipe:
    from vdiff_jax.recipe import default_recipe

    recipe = default_recipe("diffusion")
    for name, values in _SMALL.items():
        recipe[name].update(values)
    return recipe


if __name__ == "__main__":
    sys.exit(app.run(main))
