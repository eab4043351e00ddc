"""What does reading clips cost a training step, and does its memory grow?

    python benchmarks/loader_overhead.py --steps=2000 --out=loader_overhead.json

Clips with captions are written to a folder and encoded into a latent cache; the step of `--config` then runs in
alternating blocks on three kinds of batches: `ready`, one that lies on the device, its latents drawn; `held`, one in
host memory, moved to the device and its latents drawn at each step; and `cached`, read from the latent cache as in
training. `cached / held` is what reading costs; `held / ready` what drawing latents afresh costs, on any data. They are
measured in seconds of all cores of this process, which other work on the machine disturbs least, and in wall time.
`--steps` further steps on the cache show resident memory: a line is fitted to its second half. The exit code is 0 if
the median of `cached / held` in core seconds is at most `--max_ratio` and memory does not grow by more than
`--max_growth_mib` over the steps.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from vdiff_jax import parallel
from vdiff_jax.command import run_script
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.video_io import Clip
from vdiff_jax.interop.pretrained import save_json
from vdiff_jax.pipeline import load
from vdiff_jax.recipe import Recipe, TrainConfig, section
from vdiff_jax.stages import make_stage
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import init_sharded_state, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/folder.py", "Recipe whose step is timed.")
_AUTOENCODER = flags.DEFINE_string("autoencoder", "shapes", "A model whose autoencoder makes the latents.")
_CLIPS = flags.DEFINE_integer("clips", 200, "Clips in the folder.")
_FRAMES = flags.DEFINE_integer("frames", 48, "Frames of each.")
_BLOCK = flags.DEFINE_integer("block", 10, "Steps in a block.")
_BLOCKS = flags.DEFINE_integer("blocks", 12, "Blocks of either kind.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Steps over which memory is watched.")
_OUT = flags.DEFINE_string("out", "loader_overhead.json", "Where the figures are written.")
_MAX_RATIO = flags.DEFINE_float("max_ratio", 1.05, "Bar of cached / held in core seconds.")
_MAX_GROWTH = flags.DEFINE_float("max_growth_mib", 16.0, "Bar of the growth of memory over the steps.")


def main(_: list[str]) -> int:
    recipe, out = _CONFIG.value, Path(_OUT.value)
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = Path(temporary), load(_AUTOENCODER.value).settings.size
        write_clips(folder / "clips", _CLIPS.value, _FRAMES.value, size if isinstance(size, int) else size[0])
        recipe.model.autoencoder_from = _AUTOENCODER.value
        recipe.data.update(folder=str(folder / "clips"), latent_cache=str(folder / "cache"), size=size)
        figures = measured(recipe, folder)
    figures |= {"device": jax.devices()[0].device_kind, "batch_size": recipe.data.batch_size}
    save_json(out, figures)
    for name, value in figures.items():
        if not isinstance(value, list):
            print(f"{name:<28} {format(value, '.5g') if isinstance(value, float) else value}")
    return int(figures["core_cached_over_held"] > _MAX_RATIO.value or figures["growth_mib"] > _MAX_GROWTH.value)


def write_clips(folder: Path, count: int, frames: int, size: int) -> None:
    t, y, x = np.mgrid[0:frames, 0:size, 0:size].astype(np.float64)
    for index in range(count):
        waves = [np.sin((x + (1 + index % 5) * t) / 9), np.cos((y - 3 * t) / (5 + index % 7)), np.sin((x + y) / 25)]
        clip = Clip((127.5 + 110 * np.stack(waves, -1)).astype(np.uint8), 8.0)
        clip.save(folder / f"{index:04d}.mp4", crf=28)
        (folder / f"{index:04d}.txt").write_text(f"waves of kind {index % 35}\n")


def measured(recipe: Recipe, workdir: Path) -> dict[str, Any]:
    mesh = parallel.make_mesh(**recipe.parallel)
    with jax.set_mesh(mesh):
        stage = make_stage(recipe, mesh, workdir)
        train = section(recipe, "train", TrainConfig)
        optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), train.num_steps)
        key = jax.random.key(recipe.seed)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings)
        with mock.patch.object(Loader, "starting_at", lambda loader, at: itertools.repeat(loader.batch_at(at))):
            held = stage.batches_from(0)
            ready = itertools.repeat(next(held))
        batches = stage.batches_from(0)
        kinds = {"ready": ready, "held": held, "cached": batches}

        def run(source: Iterator[Any], count: int) -> tuple[float, float]:
            """Core seconds and seconds of a step."""
            nonlocal state
            began = time.process_time(), time.perf_counter()
            for _ in range(count):
                state, _ = step(state, next(source), key)
            jax.block_until_ready(state)
            return (time.process_time() - began[0]) / count, (time.perf_counter() - began[1]) / count

        for source in kinds.values():
            run(source, _BLOCK.value)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for block in range(_BLOCKS.value):
            for name in list(kinds) if block % 2 else reversed(kinds):
                times[name].append(run(kinds[name], _BLOCK.value))
            told = ", ".join(f"{name} {taken[-1][0]:.4f}" for name, taken in times.items())
            print(f"block {block + 1} of {_BLOCKS.value}: core seconds {told}", file=sys.stderr)
        memory = watched(lambda: run(batches, 10))
    return compared({name: np.asarray(taken) for name, taken in times.items()}) | memory


def compared(times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Medians and ratios of the times [block, core or wall] of each kind."""
    figures: dict[str, Any] = {}
    for index, clock in enumerate(("core", "wall")):
        figures |= {f"{clock}_{name}_s": float(np.median(taken[:, index])) for name, taken in times.items()}
        for above, below in (("cached", "held"), ("held", "ready")):
            ratios = times[above][:, index] / times[below][:, index]
            figures[f"{clock}_{above}_over_{below}"] = float(np.median(ratios))
            figures[f"{clock}_{above}_over_{below}_quartiles"] = np.quantile(ratios, (0.25, 0.75)).tolist()
    return figures


def watched(ten_steps: Callable[[], Any]) -> dict[str, Any]:
    """Resident memory over the steps, in MiB, and its growth over all of them by a line through the second half."""
    resident = []
    for done in range(0, _STEPS.value, 10):
        ten_steps()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        if done % 200 == 0:
            print(f"step {done}: {resident[-1]:.1f} MiB resident", file=sys.stderr)
    half = np.asarray(resident[len(resident) // 2 :])
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
    return {
        "resident_first_mib": resident[0] if resident else 0.0,
        "resident_last_mib": resident[-1] if resident else 0.0,
        "growth_mib": slope * len(resident),
        "noise_mib": float(half.std()) if len(half) else 0.0,
    }


if __name__ == "__main__":
    run_script(main)
