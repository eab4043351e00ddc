"""Which words of a prompt does the network listen to, and at which noise level?

True clips are noised, the network estimates the clean ones once with their captions and once with captions that are
wrong in one attribute. How much larger the error gets is the influence of that attribute. It needs one network call
per level instead of a whole sampling, and shows an ignored word long before clips are worth looking at: its influence
is zero at every level.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from vdiff_jax.data.shapes import DIRECTIONS, attributes, caption
from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.evaluation.shapes_tasks import Evaluation, average, moving_scenes

LEVELS = (-9.0, -7.0, -5.0, -3.0, -1.0)


def influence(ev: Evaluation) -> dict[str, Any]:
    """Figures by log-SNR, as `{"-9": {"value", "se", "n"}, ...}`, over scenes with one moving object:

    "error": mean squared error of the estimate per latent value, with the true caption. "direction" (turned around),
    "colour", "shape", "background" (each the next one of the world) and "prompt" (the empty prompt): how much larger
    the error is with that caption.
    """
    records = moving_scenes(ev, ev.num_clips, stream=4)
    truth = [attributes(records, number) for number in range(ev.num_clips)]
    prompts = {name: [caption(changed(scene, name, ev)) for scene in truth] for name in ("", *ATTRIBUTES)}
    prompts["prompt"] = [""] * ev.num_clips
    error: dict[str, dict[float, list[float]]] = {name: {level: [] for level in LEVELS} for name in prompts}
    for index in ev.batches(ev.num_clips):
        latents = jnp.asarray(ev.model.encode(ev.video(records, index, ev.num_frames)))
        eps = draw_noise(ev.keys("iid", index), latents.shape[1:], ev.model.settings.noise)
        real = len(set(index))
        for level in LEVELS:
            logsnr = jnp.full(latents.shape[:2], level)
            z = add_noise(latents, eps, logsnr)
            for name, texts in prompts.items():
                output = ev.model.estimate(z, logsnr, [texts[number] for number in index])
                mse = np.square(np.asarray(output) - np.asarray(latents)).mean((1, 2, 3, 4))
                error[name][level] += mse[:real].tolist()
    base = error.pop("")
    figures: dict[str, Any] = {"n": ev.num_clips, "error": {f"{level:g}": average(base[level]) for level in LEVELS}}
    for name, by_level in error.items():
        figures[name] = {f"{level:g}": average(np.subtract(by_level[level], base[level])) for level in LEVELS}
    return figures


ATTRIBUTES = ("direction", "colour", "shape", "background")


def changed(scene: dict[str, Any], name: str, ev: Evaluation) -> dict[str, Any]:
    """A scene (see `shapes.attributes`) with one attribute of its first object, or its background, made wrong."""
    first, *others = scene["objects"]
    if name == "direction":
        first = first | {name: DIRECTIONS[(DIRECTIONS.index(first[name]) + 4) % 8]}
    elif name == "background":
        scene = scene | {name: following(ev.world.backgrounds, scene[name])}
    elif name:
        first = first | {name: following(getattr(ev.world, name + "s"), first[name])}
    return scene | {"objects": [first, *others]}


def following(values: tuple[str, ...], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]
