"""How much of a style image's look the bundled model gives to moving clips, and how much of their content it keeps.

    python benchmarks/style_report.py --num_clips=60 --out=style_report.json

Clips are of the held-out split, one object each that moves. Style images, of which the model is told nothing:

    scene   a frame of another held-out scene, with an object of another colour on another background
    graded  a frame of the clip itself, graded: the hues turned, the contrast lower, black lifted
    tinted  the same with another contrast and lift in every channel, so that greys become coloured

Per strength: `fall`, 1 - distance(result, style) / distance(source, style) of the means over clips, see
`evaluation.style_metrics`; the share of clips that keep their direction of motion and their shape, read from the pixels
(one object must be seen); how far its centre is from where it was. The reader knows the colours of ungraded scenes
only, so `recoloured` has direction and shape again for clips under the affine map of colours that brings each nearest
to its source, which moves nothing; readability and place are of recoloured clips where the style is a grade. Controls:
the source; the ideal answer (its scene rendered, or graded, in the style's look), and that through the autoencoder;
mean and deviation matched per colour channel on the pixels, without any model (Reinhard et al. 2001).
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from vdiff_jax.command import run_script
from vdiff_jax.data.shapes import Records, draw_records, make_world, native_times, render, select, split_rng
from vdiff_jax.evaluation.report import rounded
from vdiff_jax.evaluation.shapes_reader import Reading, read_batch
from vdiff_jax.evaluation.shapes_tasks import Evaluation, average, moving_scenes, share
from vdiff_jax.evaluation.style_metrics import style_distance
from vdiff_jax.interop.pretrained import save_json
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.stylize import stylize_latents

KINDS = ("scene", "graded", "tinted")

_MODEL = flags.DEFINE_string("model", "shapes", "The model.")
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 60, "Clips per kind of style.")
_STYLES = flags.DEFINE_multi_enum("styles", KINDS, KINDS, "Kinds of style image.")
_STRENGTHS = flags.DEFINE_list("strengths", ["0.25", "0.5", "0.75", "1"], "Strengths.")
_STRUCTURE = flags.DEFINE_float("structure", 0.3, "How firmly the source is held.")
_METHOD = flags.DEFINE_string("method", "flow", "flow, inversion or sdedit.")
_SHARED = flags.DEFINE_float("shared_attention", 0.0, "Weight of shared attention.")
_LAYOUT = flags.DEFINE_float("layout", 0.0, "Pull of the 4 x 4 low-pass.")
_STEPS = flags.DEFINE_integer("steps", 24, "Denoising steps.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 20, "Clips at a time.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of scenes, grades and noise.")
_OUT = flags.DEFINE_string("out", "style_report.json", "Where the report is written.")


def main(_: list[str]) -> int:
    model = load(_MODEL.value)
    world = make_world("small", sizes=("large",), speeds=("fast",), size=32, num_frames=16)
    records = moving_scenes(Evaluation(model, world, seed=_SEED.value), _NUM_CLIPS.value, stream=11)
    draw = jax.jit(functools.partial(render, world=world))
    source = np.asarray(draw(records, native_times(world, _NUM_CLIPS.value)))
    names = ("num_clips", "structure", "method", "shared_attention", "layout", "steps", "seed")
    report: dict[str, Any] = {**{name: flags.FLAGS[name].value for name in names}, "results": {}}
    for kind in _STYLES.value:
        if kind == "scene":
            others = _other_scenes(records, draw_records(split_rng("iid", _SEED.value, 12), world, "iid", 4000))
            style = np.asarray(draw(others, native_times(world, len(source))))[:, 7:8]
            ideal = np.asarray(draw(_dressed(records, others), native_times(world, len(source))))
        else:
            ideal = _graded(source, kind == "tinted")
            style = ideal[:, 7:8]
        measure = functools.partial(_row, world=world, style=style, source=source, graded=kind != "scene")
        rows = report["results"][kind] = {}
        print(f"\n{kind:<14}    fall  direction   shape     recoloured  readable  error px  seconds")
        _add(report, rows, "source", measure(source))
        _add(report, rows, "ideal", measure(ideal))
        _add(report, rows, "ideal, codec", measure(_through(model, ideal)))
        _add(report, rows, "pixels", measure(_matched(source, style)))
        for strength in _STRENGTHS.value:
            started = time.monotonic()
            made = _stylized(model, source, style, float(strength))
            _add(report, rows, strength, measure(made) | {"seconds": time.monotonic() - started})
    print(_OUT.value)
    return 0


def _through(model: VideoDiffusion, video: np.ndarray) -> np.ndarray:
    return np.concatenate([model.decode(model.encode(clip)) for clip in video]) / 127.5 - 1.0


def _stylized(model: VideoDiffusion, source: np.ndarray, style: np.ndarray, strength: float) -> np.ndarray:
    made, size = [], _BATCH_SIZE.value
    for start in range(0, len(source), size):
        index = np.minimum(np.arange(start, start + size), len(source) - 1)
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(_SEED.value), number))(index)
        latents = stylize_latents(
            model,
            model.encode(source[index]),
            model.encode(style[index]),
            keys=keys,
            strength=strength,
            structure=_STRUCTURE.value,
            method=_METHOD.value,
            shared_attention=_SHARED.value,
            layout=_LAYOUT.value,
            steps=_STEPS.value,
        )
        made.append(model.decode(latents) / 127.5 - 1.0)
    return np.concatenate(made)[: len(source)].astype(np.float32)


def _row(clips: np.ndarray, *, world: Any, style: np.ndarray, source: np.ndarray, graded: bool) -> dict[str, Any]:
    """Everything measured of a set of clips, see the module."""
    before, after = style_distance(source, style), style_distance(clips, style)
    old, new = read_batch(source, world), read_batch(clips, world)
    recoloured = read_batch(_recoloured(clips, source), world)
    seen = list(zip(old, recoloured if graded else new))
    return {
        "distance": average(after),
        "fall": 1.0 - float(after.mean() / before.mean()),
        "direction": share([_same(*pair, "direction") for pair in zip(old, new)]),
        "shape": share([_same(*pair, "shape") for pair in zip(old, new)]),
        "direction recoloured": share([_same(*pair, "direction") for pair in zip(old, recoloured)]),
        "shape recoloured": share([_same(*pair, "shape") for pair in zip(old, recoloured)]),
        "readable": share([reading.readable for _, reading in seen]),
        "error_px": average([_stray(*pair) for pair in seen]),
    }


def _same(old: Reading, new: Reading, name: str) -> bool:
    return len(new.objects) == 1 and getattr(new.objects[0], name) == getattr(old.objects[0], name)


def _stray(old: Reading, new: Reading) -> float:
    """Root mean square distance of the object's centres in pixels; NaN unless one object is seen."""
    if len(new.objects) != 1:
        return float("nan")
    return float(np.sqrt(np.nanmean(np.square(new.objects[0].track - old.objects[0].track).sum(axis=1))))


def _other_scenes(records: Records, pool: Records) -> Records:
    """For every scene one of the pool with another colour of the object and another background, each used once."""
    chosen: list[int] = []
    single = [int(number) for number in np.flatnonzero(pool["count"] == 1)]
    for colour, background in zip(records["colour"][:, 0], records["background"]):
        fits = (n for n in single if pool["colour"][n, 0] != colour and pool["background"][n] != background)
        chosen.append(next(fits))
        single.remove(chosen[-1])
    return select(pool, np.asarray(chosen))


def _dressed(records: Records, others: Records) -> Records:
    dressed = {name: value.copy() for name, value in records.items()} | {"background": others["background"].copy()}
    dressed["colour"][:, 0] = others["colour"][:, 0]
    return dressed


def _graded(video: np.ndarray, tinted: bool) -> np.ndarray:
    """Every clip graded: hues turned round the grey axis by up to 60 degrees, then a gain of 0.6 to 0.9 and a lift of 0
    to 0.15 of the range of 0..1. tinted: another gain and lift for every channel."""
    rng, count = np.random.default_rng(_SEED.value + 13), len(video)
    angle = rng.uniform(-np.pi / 3, np.pi / 3, count)[:, None, None]
    axis = np.ones(3) / np.sqrt(3)
    cross, along = np.cross(np.eye(3), axis)[None], np.outer(axis, axis)[None]
    turn = np.cos(angle) * (np.eye(3)[None] - along) + np.sin(angle) * cross + along
    shape = (count, 1, 1, 1, 3 if tinted else 1)
    gain, lift = rng.uniform(0.6, 0.9, shape), rng.uniform(0, 0.15, shape)
    unit = np.einsum("bfhwc,bdc->bfhwd", (video + 1) / 2, turn)
    return (np.clip(lift + gain * unit, 0, 1) * 2 - 1).astype(np.float32)


def _recoloured(clips: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Every clip under the affine map of colours that brings it nearest to its source. Nothing moves by that."""
    made = []
    for clip, goal in zip(clips.reshape(len(clips), -1, 3), source.reshape(len(source), -1, 3)):
        pixels = np.concatenate([clip, np.ones_like(clip[:, :1])], axis=1)
        made.append(pixels @ np.linalg.lstsq(pixels, goal, rcond=None)[0])
    return np.clip(np.reshape(made, clips.shape), -1, 1).astype(np.float32)


def _matched(video: np.ndarray, style: np.ndarray) -> np.ndarray:
    axes = (1, 2, 3)
    unit = (video - video.mean(axes, keepdims=True)) / video.std(axes, keepdims=True)
    return np.clip(unit * style.std(axes, keepdims=True) + style.mean(axes, keepdims=True), -1, 1).astype(np.float32)


def _add(report: dict[str, Any], rows: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Prints a row and writes the report as far as it is."""
    rows[name] = row
    names = ("direction", "shape", "direction recoloured", "shape recoloured", "readable", "error_px")
    cells = [f"{row[key]['value']:{width}.3f}" for key, width in zip(names, (11, 8, 8, 7, 10, 10))]
    seconds = f"{row['seconds']:9.0f}" if "seconds" in row else ""
    line = f"{name:<14}{row['fall']:8.3f}{''.join(cells)}{seconds}"
    print(line, flush=True)
    save_json(_OUT.value, rounded(report))


if __name__ == "__main__":
    run_script(main)
