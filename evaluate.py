"""Measure what a model of the shapes world can do, from the pixels of its clips.

    python evaluate.py --model=shapes --out=report.json
    python evaluate.py --model=runs/shapes --metrics=alignment --split=iid,combo --num_clips=500 --guidance_scale=3

Metrics: alignment (does the clip show what the prompt says, per attribute), prediction (next frames after known ones),
interpolation (frames between known ones), codec (the autoencoder alone), influence (which words the network listens
to, by noise level). The data section of --config names the world of the model. A table is printed, and written with
all settings to --out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vdiff_jax.command import run_script

_MODEL = flags.DEFINE_string("model", "shapes", "Bundled name, run folder or saved folder.")
_CONFIG = config_flags.DEFINE_config_file("config", "configs/shapes.py", "Recipe whose data section names the world.")
_METRICS = flags.DEFINE_list(
    "metrics", ["alignment", "prediction", "interpolation", "codec"], "Which metrics, separated by commas."
)
_SPLIT = flags.DEFINE_list("split", ["iid", "combo"], "Splits of alignment: iid, combo, motion, count, speed.")
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 500, "Clips per metric and split.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Clips generated at a time; does not change the result.")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default: the model's.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Guidance of alignment; 1 is off; default: the model's.")
_SAMPLER = flags.DEFINE_string("sampler", None, "Sampler by name; default: the model's.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the scenes and of the noise.")
_OUT = flags.DEFINE_string("out", "report.json", "Where the report is written.")


def main(_: list[str]) -> int:
    from vdiff_jax.evaluation.report import evaluate, rounded, table
    from vdiff_jax.interop.pretrained import save_json
    from vdiff_jax.pipeline import load
    from vdiff_jax.recipe import data_config
    from vdiff_jax.streams import make_stream

    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)  # before any work is spent
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"cannot write --out={out}: give the name of a file in a writable folder")
    data = data_config(_CONFIG.value)
    if data.source != "shapes":
        raise ValueError(f"--config has data.source={data.source!r}: these metrics need the shapes world")
    world = make_stream(data, seed=0, tokenizer=None).host.world
    print(f"loading {_MODEL.value}", file=sys.stderr)
    report = evaluate(
        load(_MODEL.value),
        world,
        metrics=_METRICS.value,
        splits=_SPLIT.value,
        num_clips=_NUM_CLIPS.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
        steps=_STEPS.value,
        guidance_scale=_GUIDANCE.value,
        sampler=_SAMPLER.value,
    )
    print(table(report))
    save_json(out, rounded(report))
    print(out)
    return 0


if __name__ == "__main__":
    run_script(main)
