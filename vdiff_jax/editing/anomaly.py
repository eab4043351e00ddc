"""How surprising the frames of a clip are to a model that has seen the frames before them.

A window shows its first frames, the context, clean, and the others under noise of one level. What the denoiser makes of
them in one step, it expects; the squared distance to what is there is the error. At a level where the noise hides the
clip this is the error of a prediction from the context alone. At a cleaner level the denoiser also sees a trace of what
is there, and errs where that trace and the context do not fit together.

Errors of different levels, and of frames near to and far from the context, have different sizes. Each is compared with
what it is on normal windows (`Normal`), after which they share a unit and can be put together (`combine`, `lay_out`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.sampling.job import START_STREAM, known_frames, stream
from vdiff_jax.sampling.samplers import context_noise
from vdiff_jax.types import Array, Conditioning, DenoiseFn, Latents

SMALLEST_SPREAD = 1e-6
"""Below this an error per token does not vary at all; it keeps the division by the spread finite."""


class Normal(NamedTuple):
    """What frames of normal windows err: `mean` and `std`, f32 `[l k]`, by level and by place after the context."""

    mean: np.ndarray
    std: np.ndarray


def window_errors(
    denoise_fn: DenoiseFn,
    latents: Latents,
    levels: Array,
    cond: Conditioning,
    keys: Array,
    *,
    context: int,
    noise_kind: str = "gaussian",
) -> Array:
    """The squared error of the one-step clean estimate, summed over channels; a program of `VideoDiffusion.run`.

    Args:
        latents: `[b f h w c]`, final scale, one window each. levels: `[l]`, log-SNR of the frames after the context.
        keys: `[b]`, one per window; all levels of a window share one noise.
        context: how many first frames are known, shown at the level of clean context.
        noise_kind: the law of the noise, see `diffusion.noise`.
    Returns:
        f32 `[l b f h w]`, 0 in the context.
    """
    known = known_frames(latents, np.arange(latents.shape[1]) < context)
    noise = draw_noise(stream(keys, START_STREAM), latents.shape[1:], noise_kind).astype(latents.dtype)
    pinned = add_noise(latents, context_noise(keys, known, noise_kind), known.logsnr)
    is_known = known.mask > 0.5

    def at(level: Array) -> Array:
        logsnr = jnp.broadcast_to(level, latents.shape[:2])
        z = jnp.where(is_known, pinned, add_noise(latents, noise, logsnr))
        x0_hat = denoise_fn(z, logsnr, known, cond, next_logsnr=logsnr, keys=keys)
        return jnp.sum(jnp.where(is_known, 0.0, jnp.square(x0_hat - latents)), axis=-1)

    return jax.lax.map(at, jnp.asarray(levels, latents.dtype))


def normal_errors(errors: np.ndarray) -> Normal:
    """What is normal, from the errors `[l n k h w]` of n normal windows: mean and deviation of a frame's mean error.

    Raises:
        ValueError: fewer than 2 windows.
    """
    if errors.shape[1] < 2:
        raise ValueError(f"{errors.shape[1]} normal window(s): a deviation needs at least 2, give more or longer clips")
    frames = np.asarray(errors, np.float64).mean(axis=(-2, -1))
    return Normal(frames.mean(axis=1).astype(np.float32), frames.std(axis=1, ddof=1).astype(np.float32))


def own_errors(errors: np.ndarray) -> Normal:
    """What is normal by a clip's own word: the median over its windows stands for mean and deviation.

    The median is that of the undisturbed frames as long as they are in the majority. Raises ValueError below 3 windows,
    where nothing is.
    """
    if errors.shape[1] < 3:
        raise ValueError(
            f"the clip holds {errors.shape[1]} window(s): at least 3 are needed to tell what is usual in it; give "
            "normal clips to calibrate by, or a longer clip"
        )
    median = np.median(np.asarray(errors, np.float64).mean(axis=(-2, -1)), axis=1).astype(np.float32)
    return Normal(median, median)


def combine(errors: np.ndarray, normal: Normal) -> np.ndarray:
    """Errors `[l n k h w]` as excess over the normal in units of its deviation, mean over levels: f32 `[n k h w]`.

    The mean of a frame's excess over space is what its mean error exceeds the normal by.
    """
    mean, std = (values[:, None, :, None, None] for values in normal)
    return ((errors - mean) / np.maximum(std, SMALLEST_SPREAD)).mean(axis=0).astype(np.float32)


def lay_out(excess: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that start at frames 0, 1, 2, ... put together: score f32 `[f]` and heat f32 `[f h w]`.

    excess: `[n k h w]` of n windows, the k frames after the context of each. A frame is seen by up to k windows, from
    nearer and from farther; the one to which it is most surprising counts. The first `context` frames get 0.
    """
    count, ahead = excess.shape[:2]
    num_frames = context + count + ahead - 1
    score = np.zeros(num_frames, np.float32)
    heat = np.zeros((num_frames, *excess.shape[2:]), np.float32)
    frames = excess.mean(axis=(-2, -1))
    for frame in range(num_frames - context):
        places = np.arange(max(0, frame - count + 1), min(ahead, frame + 1))
        place = places[np.argmax(frames[frame - places, places])]
        score[context + frame] = frames[frame - place, place]
        heat[context + frame] = excess[frame - place, place]
    return score, heat
