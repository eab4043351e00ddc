"""How fast are the training step and the sampler, and how much of the device's peak do they use?

    python benchmarks/speed.py --config=configs/shapes_full.py --model=runs/shapes_full --out=speed.json

TFLOP/s counts the multiplications and additions of the program as written (before fusion); the share of peak is given
where the peak of the device is known, or by --peak_tflops. Clips are rendered and encoded inside the timed loop, as
in training, unless the name says otherwise.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from vdiff_jax import parallel
from vdiff_jax.command import run_script
from vdiff_jax.interop.pretrained import save_json
from vdiff_jax.pipeline import load
from vdiff_jax.recipe import Recipe, TrainConfig, section
from vdiff_jax.stages import make_stage
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import init_sharded_state, make_train_step

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16
_CONFIG = config_flags.DEFINE_config_file("config", "configs/shapes_full.py", "Recipe whose step is timed.")
_MODEL = flags.DEFINE_string("model", None, "Run folder whose sampler is timed.")
_OUT = flags.DEFINE_string("out", "speed.json", "Where the figures are written.")
_CLIPS = flags.DEFINE_integer("clips", 64, "Clips sampled at a time.")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed training steps; sampling is timed 3 times.")
_PEAK = flags.DEFINE_float("peak_tflops", 0.0, "Peak of the device in bf16 TFLOP/s; default: by its name.")


def main(_: list[str]) -> int:
    recipe, out = _CONFIG.value, Path(_OUT.value)
    figures = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    figures |= train_speed(recipe, _REPEATS.value)
    peak = _PEAK.value or next((v for name, v in PEAK_TFLOPS.items() if name in figures["device"]), 0.0)
    if peak:
        figures["share_of_peak"] = figures["tflops_per_s"] / (peak * jax.device_count())
    if _MODEL.value:
        figures |= sample_speed(load(_MODEL.value), _CLIPS.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_json(out, figures)
    for name, value in figures.items():
        print(f"{name:<28} {value if isinstance(value, (str, int)) else format(value, '.4g')}")
    return 0


def train_speed(recipe: Recipe, repeats: int) -> dict[str, Any]:
    """Seconds of compilation, then the time of a step on ready batches and of the whole loop with its data."""
    mesh = parallel.make_mesh(**recipe.parallel)
    with jax.set_mesh(mesh):
        stage = make_stage(recipe, mesh, Path(_OUT.value).parent)
        train = section(recipe, "train", TrainConfig)
        optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), train.num_steps)
        key = jax.random.key(recipe.seed)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings)
        batches = stage.batches_from(0)
        batch = next(batches)
        began = time.perf_counter()
        lowered = step.lower(state, batch, key)  # type: ignore[attr-defined]
        flops = float((lowered.cost_analysis() or {}).get("flops", float("nan")))
        compiled = lowered.compile()
        compile_s = time.perf_counter() - began
        state, metrics = compiled(state, batch, key)
        times = {}
        for name, source in (("step", itertools.repeat(batch)), ("loop", batches)):
            jax.block_until_ready(metrics)
            began = time.perf_counter()
            for _ in range(repeats):
                state, metrics = compiled(state, next(source), key)
            jax.block_until_ready(metrics)
            times[name] = (time.perf_counter() - began) / repeats
    size = recipe.data.batch_size
    return {
        "compile_s": compile_s,
        "step_ms": 1e3 * times["step"],
        "step_clips_per_s": size / times["step"],
        "loop_clips_per_s": size / times["loop"],
        "tflops_per_s": flops / times["step"] / 1e12,
    }


def sample_speed(model: Any, clips: int) -> dict[str, Any]:
    """Clips per second of text-to-video with guidance, to latents and to frames; best of 3 after compilation."""
    keys = jax.random.split(jax.random.key(0), clips)
    prompts = ["a red circle moving right on a black background"] * clips
    latents = model.generate_latents(prompts, keys=keys)
    model.decode(latents)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        latents = jax.block_until_ready(model.generate_latents(prompts, keys=keys))
        middle = time.perf_counter()
        model.decode(latents)
        seconds.append((middle - began, time.perf_counter() - began))
    best = np.min(seconds, axis=0)
    print(f"sampled {clips} clips", file=sys.stderr)
    return {"sample_clips_per_s": clips / best[0], "sample_and_decode_clips_per_s": clips / best[1]}


if __name__ == "__main__":
    run_script(main)
