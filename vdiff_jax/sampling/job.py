"""Jobs and plans: every task as data for the one scan.

A plan is the log-SNR of every frame before each step and after the last, `[s+1 b f]`. Because every frame carries its
own noise, any plan in which levels rise from noise to clean ends in the same law of clips, whichever frame goes first:
all at once, as a ramp, one after another, keyframes before the others. A frame whose level does not change in a step
is frozen in it. A plan that runs backwards turns a clip into the noise that makes it.

Randomness: sample i uses keys[i] only. Streams of one key are told apart by `stream`, so that start noise, context
noise and step noise never repeat each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.schedule import Schedule, grid
from vdiff_jax.types import Array, Job, Known, Latents

CLEAN_LOGSNR = 10.0
"""The level at which clean context is shown: sigma / alpha is 0.7 %, the cleanest a model sees in training."""

START_STREAM, CONTEXT_STREAM, STEP_STREAM = 0, 1, 2


def stream(keys: Array, number: int | Array) -> Array:
    """Keys `[b]` of an independent stream of each sample."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def nothing_known(shape: Sequence[int], dtype: Any = jnp.float32) -> Known:
    """Known of latents of shape (b, f, h, w, c) in which nothing is given."""
    b, f, h, w, _ = shape
    return Known(
        latents=jnp.zeros(tuple(shape), dtype),
        mask=jnp.zeros((b, f, h, w, 1), dtype),
        logsnr=jnp.full((b, f), CLEAN_LOGSNR, dtype),
    )


def known_frames(
    latents: Latents, frames: Sequence[int] | np.ndarray | Array, logsnr: float | Array = CLEAN_LOGSNR
) -> Known:
    """Known in which whole frames are given.

    Args:
        latents: `[b f h w c]`, read at the given frames only.
        frames: indices of the given frames (negative from the end), or a bool vector `[f]` (may be traced).
        logsnr: level at which they are shown, scalar or `[b f]`; below 10 for context that was itself generated.
    Raises:
        ValueError: an index outside the clip, or a bool vector of another length.
    """
    b, f, h, w, _ = latents.shape
    given = _frame_selection(frames, f)
    mask = jnp.broadcast_to(given[None, :, None, None, None], (b, f, h, w, 1)).astype(latents.dtype)
    return Known(latents, mask, jnp.broadcast_to(jnp.asarray(logsnr, latents.dtype), (b, f)))


def _frame_selection(frames: Any, num_frames: int) -> Array:
    """Indices or a bool vector as a bool vector `[f]`."""
    if not (isinstance(frames, jax.Array) and frames.dtype == jnp.bool_):
        frames = np.asarray(frames)
        if frames.dtype != np.bool_:
            if frames.size and (frames.min() < -num_frames or frames.max() >= num_frames):
                raise ValueError(f"known frames {frames.tolist()} lie outside a clip of {num_frames} frames.")
            frames = np.isin(np.arange(num_frames), frames.astype(int) % num_frames)
    if frames.shape != (num_frames,):
        raise ValueError(f"the bool vector of known frames has shape {frames.shape}; the clip has {num_frames} frames.")
    return jnp.asarray(frames)


# Plans -----------------------------------------------------------------------------------------------------------


def uniform_plan(schedule: Schedule, steps: int, batch: int, num_frames: int, start: float | Array = 1.0) -> Array:
    """All frames at one level, `[steps+1 b f]`, from share `start` of the schedule's walk (1 = pure noise) to clean."""
    return jnp.broadcast_to(grid(schedule, steps, start)[:, None, None], (steps + 1, batch, num_frames))


def even_plan(schedule: Schedule, steps: int, logsnr: float | Array, batch: int, num_frames: int) -> Array:
    """All frames at one level, `[steps+1 b f]`, from `logsnr` to clean in even steps of log-SNR.

    logsnr: scalar, `[b]` or `[b f]`, clipped to the schedule's range.
    """
    start = jnp.clip(jnp.asarray(logsnr, jnp.float32), schedule.logsnr_min, schedule.logsnr_max)
    start = jnp.broadcast_to(start[:, None] if start.ndim == 1 else start, (batch, num_frames))
    share = jnp.linspace(0.0, 1.0, steps + 1)[:, None, None]
    return start[None] + share * (schedule.logsnr_max - start)[None]


def staggered_plan(schedule: Schedule, steps: int, starts: Sequence[int] | np.ndarray, batch: int) -> Array:
    """Frame i waits `starts[i]` steps in noise, takes `steps` steps, then stays clean; `[max(starts)+steps+1 b f]`."""
    starts_array = np.asarray(starts)
    if starts_array.min() < 0:
        raise ValueError(f"starts {starts_array.tolist()} must not be negative.")
    index = np.arange(starts_array.max() + steps + 1)[:, None] - starts_array[None]
    plan = grid(schedule, steps)[np.clip(index, 0, steps)]
    return jnp.broadcast_to(plan[:, None], (plan.shape[0], batch, plan.shape[1]))


def ramp_plan(schedule: Schedule, steps: int, delay: int, batch: int, num_frames: int) -> Array:
    """Each frame starts `delay` steps after the one before it: the plan of streaming."""
    return staggered_plan(schedule, steps, [delay * i for i in range(num_frames)], batch)


def autoregressive_plan(
    schedule: Schedule, steps: int, batch: int, num_frames: int, block: int = 1, backwards: bool = False
) -> Array:
    """Blocks of `block` frames one after another, each in `steps` steps; `backwards`: the last block first."""
    starts = np.arange(num_frames) // block * steps
    return staggered_plan(schedule, steps, starts[::-1] if backwards else starts, batch)


def keyframes_first(schedule: Schedule, steps: int, batch: int, num_frames: int, stride: int = 4) -> Array:
    """Every `stride`-th frame first, then all the others between them."""
    return staggered_plan(schedule, steps, np.where(np.arange(num_frames) % stride == 0, 0, steps), batch)


def random_monotone_plan(key: Array, schedule: Schedule, steps: int, batch: int, num_frames: int) -> Array:
    """Every frame rises at its own random, smooth pace; the same path for any number of steps.

    u = 1 - w, with w(t) = t + sum_k a_k sin(pi k t) / (pi k), k = 1..3, sum |a_k| <= 0.9, so that w' > 0.
    """
    order = jnp.arange(1, 4)[:, None, None, None] * jnp.pi
    wobble = jax.random.uniform(key, (3, 1, batch, num_frames), minval=-0.3, maxval=0.3)
    t = jnp.linspace(0.0, 1.0, steps + 1)[:, None, None]
    w = t + jnp.sum(wobble * jnp.sin(order * t[None]) / order, axis=0)
    return schedule.logsnr(jnp.clip(1 - w, 0.0, 1.0))


def reverse(plan: Array) -> Array:
    """The plan walked backwards, from clean to noise: with a deterministic sampler, the inversion of a clip.

    Where the plan ends at +inf, the clip is taken to be at the last level before it: without any noise there is no
    direction to go back in.
    """
    end = jnp.where(jnp.isposinf(plan[-1]), plan[-2], plan[-1])
    return jnp.concatenate([end[None], plan[-2::-1]])


# Jobs ------------------------------------------------------------------------------------------------------------


def text_to_video_job(
    keys: Array, shape: Sequence[int], schedule: Schedule, steps: int, cond: Any, noise_kind: str = "gaussian"
) -> Job:
    """Nothing known, one level: the job of text-to-video (and of images, with f = 1).

    keys: `[b]`, one per sample. shape: (b, f, h, w, c) of the latents.
    """
    batch, num_frames = shape[:2]
    noise = draw_noise(stream(keys, START_STREAM), tuple(shape[1:]), noise_kind)
    return Job(
        z=schedule.start_std(steps) * noise,
        plan=uniform_plan(schedule, steps, batch, num_frames),
        known=nothing_known(shape),
        cond=cond,
    )
