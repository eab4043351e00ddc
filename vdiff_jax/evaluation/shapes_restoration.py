"""Restoration of shapes clips against the true ones, beside a classical method on the same measurement.

| task          | what is given                                       | classical baseline                          |
|---------------|-----------------------------------------------------|---------------------------------------------|
| superres      | 4 x 4 pixels averaged                               | bicubic                                     |
| noise         | Gaussian noise of .2 in 0..1                        | the better of 3-D median and Gaussian blur  |
| blocks        | 30 % of the 8 x 8 blocks lost, drawn for each frame | spatio-temporal filling by the median       |
| blur          | Gaussian blur of 1.5 pixels                         | the better of Wiener and unsharp masking    |
| frames        | every third frame                                   | the better of repeating and linear blending |
| colour        | luma only                                           | grey copy                                   |

No prompt is given. Blocks and frames take the fast way of `Restoration.restore`, noise both ("single" and "mean" by the
posterior, "fast" in one answer), the others the posterior. A baseline that has a choice gets the better one for its
mean PSNR, told by the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax import tasks
from vdiff_jax.data.shapes import Records
from vdiff_jax.data.shapes_world import COLOURS, PALETTE
from vdiff_jax.editing import classical, degradations
from vdiff_jax.editing.classical import LUMA
from vdiff_jax.editing.degradations import Degradation
from vdiff_jax.editing.inpaint import fill_hole, known_outside
from vdiff_jax.evaluation.metrics import psnr
from vdiff_jax.evaluation.shapes_edits import object_masks
from vdiff_jax.evaluation.shapes_tasks import Evaluation, average, moving_scenes, share
from vdiff_jax.sampling.job import CLEAN_LOGSNR
from vdiff_jax.types import Array, Known

TASKS = ("superres", "noise", "blocks", "blur", "frames", "colour")
NOISE_STD = {"superres": 0.01, "noise": 0.4, "blocks": 0.01, "blur": 0.01, "colour": 0.01}
"""Of the measurement, in -1..1; .01 is about that of 8 bits."""
BLUR_STD = 1.5
FRAME_STRIDE = 3
DRAWS = 4


def restoration(ev: Evaluation, task: str, steps: int = 25) -> dict[str, Any]:
    """One restoration: "single" (PSNR in dB of one draw), "mean" (of the mean of 4), "baseline", their differences
    "gain_single" and "gain_mean", and "codec" (the truth through the autoencoder). For "noise" also "fast". For
    "colour" also "hue_error" in degrees within the object, the same of the mean, and "hue_error_gray" (90, what no
    knowledge of hue gives)."""
    records = moving_scenes(ev, ev.num_clips, stream=11)
    rows: list[dict[str, float]] = []
    for index in ev.batches(ev.num_clips):
        truth = ev.video(records, index, ev.num_frames)
        draws, others = _restore(ev, task, truth, index, steps)
        codec = ev.model.decode(ev.model.encode(truth)) / 127.5 - 1.0
        hidden = _judged_frames(task, ev.num_frames)
        for k in range(len(set(index))):
            row = {name: psnr(clips[k][hidden], truth[k][hidden]) for name, clips in others.items()}
            row |= {"single": psnr(draws[0][k][hidden], truth[k][hidden])}
            row |= {"mean": psnr(np.mean([draw[k] for draw in draws], axis=0)[hidden], truth[k][hidden])}
            rows.append(row | {"codec": psnr(codec[k][hidden], truth[k][hidden])})
            if task == "colour":
                rows[-1] |= _hue_errors(ev, records, index[k], truth[k], [draw[k] for draw in draws])
    names = [name for name in rows[0] if name.startswith("baseline")]
    best = max(names, key=lambda name: np.mean([row[name] for row in rows]))
    figures: dict[str, Any] = {"n": ev.num_clips, "baseline_is": best.removeprefix("baseline ")}
    figures |= {name: average([row[name] for row in rows]) for name in rows[0] if name not in names}
    figures["baseline"] = average([row[best] for row in rows])
    for name in ("single", "mean"):
        figures[f"gain_{name}"] = average([row[name] - row[best] for row in rows])
    figures["above_baseline"] = share([row["single"] >= row[best] for row in rows])
    return figures


def _judged_frames(task: str, num_frames: int) -> np.ndarray:
    """Frames that count: where some are given, the others."""
    if task != "frames":
        return np.ones(num_frames, bool)
    return np.arange(num_frames) % FRAME_STRIDE != 0


def _restore(
    ev: Evaluation, task: str, truth: np.ndarray, index: np.ndarray, steps: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """(draws, baselines and other answers by name), clips in -1..1."""
    latents = ev.model.encode(truth)

    def keys(draw: int) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, draw))(ev.keys("iid", index))

    def decode(latents: Array) -> np.ndarray:
        return ev.model.decode(latents) / 127.5 - 1.0

    if task == "frames":  # whole frames are known: no measurement is needed
        kept = np.arange(0, ev.num_frames, FRAME_STRIDE)
        mask = np.zeros((*latents.shape[:-1], 1), np.float32)
        mask[:, kept] = 1.0
        known = Known(latents, jnp.asarray(mask), jnp.full(latents.shape[:2], CLEAN_LOGSNR))
        draws = [decode(ev.model.complete(known, keys=keys(d), steps=steps, guidance_scale=1.0)) for d in range(DRAWS)]
        given = truth[:, kept]
        return draws, {
            "baseline repeat": classical.repeat_frames(given, kept, ev.num_frames),
            "baseline blend": classical.blend_frames(given, kept, ev.num_frames),
        }
    degradation, std = _degradation(task, truth.shape, index), NOISE_STD[task]
    noise = np.stack([np.random.default_rng([ev.seed, 12, number]).standard_normal(
        jax.eval_shape(degradation, truth).shape[1:]) for number in index])  # fmt: skip
    observed = np.asarray(degradation(jnp.asarray(truth))) + std * noise.astype(np.float32)
    noise_std = jnp.float32(std)
    if task == "blocks":  # whole tokens are intact
        lost = 1.0 - np.asarray(degradation.parameters[0])[..., 0]
        known = known_outside(ev.model.encode(fill_hole(observed, lost)), lost, margin=0)
        made = [decode(ev.model.complete(known, keys=keys(d), steps=steps, guidance_scale=1.0)) for d in range(DRAWS)]
        draws = [np.where(lost[..., None] > 0.5, clip, observed) for clip in made]
        return draws, _baselines(task, observed, degradation)
    measured = (jnp.asarray(observed), degradation, noise_std)
    draws = []
    guesses = [ev.model.encode(guess) for guess in degradation.first_guesses(observed, std, ev.num_frames)]
    for draw in range(DRAWS):
        latents, _ = tasks.restore_from(ev.model, guesses, *measured, keys=keys(draw), steps=steps)
        draws.append(decode(latents))
    answers = _baselines(task, observed, degradation)
    if task == "noise":  # white noise is a level of the process; from there on there is one answer
        answers["fast"] = decode(tasks.denoise(ev.model, observed, std, keys=keys(0), steps=steps))
    return draws, answers


def _degradation(task: str, shape: tuple[int, ...], index: np.ndarray) -> Degradation:
    if task == "blocks":
        parts = [degradations.block_mask(shape[1:4], 8, 0.3, seed=int(number)).parameters[0] for number in index]
        return degradations.mask_pixels(jnp.concatenate(parts))
    makers: dict[str, Callable[[], Degradation]] = {
        "superres": lambda: degradations.downsample(4),
        "noise": degradations.identity,
        "blur": lambda: degradations.gaussian_blur(BLUR_STD),
        "colour": degradations.grayscale,
    }
    if task not in makers:
        raise ValueError(f"restoration {task!r} is unknown: choose one of {', '.join(TASKS)}")
    return makers[task]()


def _baselines(task: str, observed: np.ndarray, degradation: Degradation) -> dict[str, np.ndarray]:
    if task == "superres":
        return {"baseline bicubic": classical.bicubic_upsample(observed, 4)}
    if task == "noise":
        smooth = ndimage.gaussian_filter(observed, sigma=(0, 0.7, 1.0, 1.0, 0), mode="nearest")
        return {"baseline median": classical.median_denoise(observed), "baseline gaussian": np.asarray(smooth)}
    if task == "blocks":
        return {"baseline fill": classical.fill_missing(observed, np.asarray(degradation.parameters[0]))}
    if task == "blur":
        kernel = np.asarray(ndimage.gaussian_filter(np.eye(1, 169, 84).reshape(13, 13), BLUR_STD))
        wiener = classical.wiener_deconvolve(observed, kernel, NOISE_STD["blur"])
        return {"baseline wiener": wiener, "baseline unsharp": classical.unsharp(observed, BLUR_STD)}
    return {"baseline grey": classical.gray_copy(observed)}


def _hue_errors(ev: Evaluation, records: Records, number: int, truth: np.ndarray, draws: list[np.ndarray]):
    """Mean angle in degrees between true and restored colour in the opponent plane, within the object."""
    inside = object_masks(ev, records, np.asarray([number]))[0] > 0.9
    wanted = _chroma(PALETTE[records["colour"][number, 0]])

    def error(clip: np.ndarray) -> float:
        found = _chroma(clip[inside].mean(axis=0))
        if np.hypot(*found) < 0.02:  # grey has no hue: no better than chance
            return 90.0
        cosine = float(found @ wanted / (np.hypot(*found) * np.hypot(*wanted)))
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    gray = np.repeat((truth @ np.asarray(LUMA, np.float32))[..., None], 3, axis=-1)
    assert len(COLOURS) == len(PALETTE)
    return {
        "hue_error": error(draws[0]),
        "hue_error_mean": error(np.mean(draws, axis=0)),
        "hue_error_gray": error(gray),
    }


def _chroma(colour: np.ndarray) -> np.ndarray:
    """Two coordinates of a colour in the plane across grey, `[2]`."""
    red, green, blue = (float(value) for value in colour)
    return np.array([red - (green + blue) / 2, np.sqrt(3) / 2 * (green - blue)])
