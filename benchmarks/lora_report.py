"""What a low-rank update of the bundled model learned from its few clips, and what it cost, read from pixels.

    python benchmarks/lora_report.py --lora=runs/shapes_lora --out=runs/shapes_lora/report.json

Three families of prompts, for the base model and for the same with the update, with the same noise: scenes of the new
clips' world (`new`; also counted over those whose direction and background no clip shows together), the new shape in
colours that no clip shows (`new, other colours`), and what the base model was trained for (`old`). The reader expects
every shape and colour there is, also in old prompts, so that a leak of the new into the old counts.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from vdiff_jax.command import run_script
from vdiff_jax.data.shapes import (
    Records,
    ShapesWorld,
    attributes,
    captions,
    draw_records,
    split_rng,
)
from vdiff_jax.data.shapes_world import COLOURS, SHAPES
from vdiff_jax.evaluation.report import rounded
from vdiff_jax.evaluation.shapes_reader import read_batch
from vdiff_jax.evaluation.shapes_scores import score
from vdiff_jax.evaluation.shapes_tasks import accuracy, share
from vdiff_jax.interop.lora import load_lora
from vdiff_jax.interop.pretrained import save_json
from vdiff_jax.lora_stage import split_batch
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.progress import ProgressTimer
from vdiff_jax.recipe import DataConfig, data_config, lora_config
from vdiff_jax.streams import make_stream

sys.path.insert(0, str(Path(__file__).parent.parent))  # a recipe may build on another one
_CONFIG = config_flags.DEFINE_config_file("config", "configs/shapes_lora.py", "Recipe of the update.")
_BASE = flags.DEFINE_string("base", "shapes", "The model before.")
_LORA = flags.DEFINE_string("lora", "runs/shapes_lora", "Run folder of the update.")
_NUM_NEW = flags.DEFINE_integer("num_new", 120, "Clips of the new family.")
_NUM_COLOURS = flags.DEFINE_integer("num_colours", 60, "Clips of the new shape in other colours.")
_NUM_OLD = flags.DEFINE_integer("num_old", 250, "Clips of old prompts.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Clips generated at a time.")
_SEED = flags.DEFINE_integer("seed", 1, "Seed of the scenes and of the noise; the recipe was chosen by looking at 0.")
_OUT = flags.DEFINE_string("out", "lora_report.json", "Where the report is written.")


def main(_: list[str]) -> int:
    recipe = _CONFIG.value
    new, old = split_batch(data_config(recipe), lora_config(recipe))
    if new.source != "shapes" or old is None or old.source != "shapes":
        raise ValueError("--config: the new clips and lora.prior must both be of the shapes world")
    new_world, old_world = _world(new), _world(old)
    colours = tuple(colour for colour in old_world.colours if colour not in new_world.colours)
    families = {
        "new": (new_world, _NUM_NEW.value),
        "new, other colours": (dataclasses.replace(new_world, colours=colours), _NUM_COLOURS.value),
        "old": (old_world, _NUM_OLD.value),
    }
    reader = dataclasses.replace(old_world, shapes=SHAPES, colours=COLOURS)
    clips = make_stream(new, seed=recipe.seed, tokenizer=None).host.fixed_scenes()
    shown = {_pair(clips, index) for index in range(new.num_scenes)}

    lora = load_lora(_LORA.value)
    before = load(_BASE.value)
    models = {"before": before, "after": load(_LORA.value)}  # each as it is used, with its own guidance
    trained = parameter_count(lora.factors) + np.size(lora.word_rows if lora.word_rows is not None else ())
    whole = sum(parameter_count(before.params[name]) for name in ("unet", "text_encoder"))
    report: dict[str, Any] = {
        "clips": captions(clips),
        "trained_parameters": int(trained),
        "share_of_parameters": trained / whole,
        "results": {},
    }
    print(f"{trained} of {whole} parameters of UNet and text encoder trained ({100 * trained / whole:.2f} %)")
    for family, (world, count) in families.items():
        records = draw_records(split_rng("iid", _SEED.value, 7), world, "iid", count)
        rows: dict[str, Any] = {}
        unseen = [_pair(records, index) not in shown for index in range(count)]
        for name, model in models.items():
            scores = _scores(model, records, reader, f"{family}, {name}")
            rows[name] = accuracy(scores)
            if family == "new":
                rows[name]["all, unseen pairs"] = share([row["all"] for row, fresh in zip(scores, unseen) if fresh])
        report["results"][family] = rows
        _print(family, rows)
        save_json(_OUT.value, rounded(report))
    print(_OUT.value)
    return 0


def _world(data: DataConfig) -> ShapesWorld:
    """With every shape and colour once: training may show some more often by naming them again."""
    world = make_stream(data, seed=0, tokenizer=None).host.world
    shapes = tuple(shape for shape in SHAPES if shape in world.shapes)
    return dataclasses.replace(world, shapes=shapes, colours=tuple(c for c in COLOURS if c in world.colours))


def _pair(records: Records, index: int) -> tuple[str, str]:
    scene = attributes(records, index)
    return scene["objects"][0].get("direction", "still"), scene["background"]


def _scores(model: VideoDiffusion, records: Records, reader: ShapesWorld, label: str) -> list[dict[str, bool]]:
    """One clip per scene, from its complete caption; clip i depends on (seed, i) only."""
    prompts, scores = captions(records), []
    progress = ProgressTimer(label)
    for start in range(0, len(prompts), _BATCH_SIZE.value):
        batch = prompts[start : start + _BATCH_SIZE.value]
        with warnings.catch_warnings():  # the base model says for each prompt that it does not know the new word
            warnings.simplefilter("ignore")
            clips = model.generate(batch, seed=_SEED.value, first_index=start)
        readings = read_batch(np.stack([clip.frames for clip in clips]), reader)
        scores += [score(reading, attributes(records, start + row)) for row, reading in enumerate(readings)]
        progress(start + len(batch), len(prompts))
    return scores


def _print(family: str, rows: dict[str, Any]) -> None:
    print(f"\n{family} (n = {rows['after']['all']['n']})")
    for key in rows["after"]:
        cells = [f"{name} {row[key]['value']:.3f} ± {row[key]['se']:.3f}" for name, row in rows.items()]
        print(f"  {key:<18}{'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    run_script(main)
