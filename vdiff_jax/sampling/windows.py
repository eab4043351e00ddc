"""Clips longer than the network's window: windows that share frames, and what one hands to the next.

A clip is walked from its beginning. Each window knows the last frames of the one before as context, so that motion goes
on, and may know anchor frames from far before, so that things stay what they are. Averaging the overlap of windows that
were made apart does neither: it fades what they disagree on.

Generated context is shown under a little noise that is really added and told to the network (`CONTEXT_LOGSNR`): it
learned to correct context of that kind, so small errors do not grow from window to window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from vdiff_jax.types import Array, Known, Latents

CONTEXT_LOGSNR = 5.0
"""Level of generated context: sigma / alpha is 8 %."""


class Window(NamedTuple):
    """Frames `start` to `stop` (not included) of a clip, of which the first `context` are made already."""

    start: int
    stop: int
    context: int


def window_slices(num_frames: int, length: int, overlap: int) -> list[Window]:
    """Windows of `length` frames over a clip, at least `overlap` frames shared with the one before; the last one ends
    with the clip. A clip that fits into one window is one.

    Raises:
        ValueError: an overlap that is negative or leaves no new frame.
    """
    if not 0 <= overlap < length:
        raise ValueError(f"overlap={overlap} of windows of {length} frames: it must be at least 0 and leave new frames")
    if num_frames <= length:
        return [Window(0, num_frames, 0)]
    windows, done = [], 0
    while done < num_frames:
        stop = min(done + length - (overlap if done else 0), num_frames)
        windows.append(Window(stop - length if done else 0, stop, done - (stop - length) if done else 0))
        done = stop
    return windows


def with_context(known: Known, made: Latents, logsnr: float | Array = CONTEXT_LOGSNR) -> Known:
    """`known` of a window whose first frames `made [b k h w c]` are there already: they become context as a whole."""
    count = made.shape[1]
    if count == 0:
        return known
    return Known(
        latents=known.latents.at[:, :count].set(made),
        mask=known.mask.at[:, :count].set(1.0),
        logsnr=known.logsnr.at[:, :count].set(logsnr),
    )


def pull_statistics(latents: Latents, anchor: Latents, weight: float | Array) -> Latents:
    """`latents` with their mean and deviation per channel (over frames and space) moved by `weight` to the anchor's.

    Adaptive instance normalisation (Huang & Belongie 2017) of a window towards the first one, against slow drift of
    brightness and colour. weight: 0 = off .. 1 = equal statistics.
    """
    axes = (1, 2, 3)
    mean, deviation = latents.mean(axes, keepdims=True), latents.std(axes, keepdims=True)
    goal_mean, goal_deviation = anchor.mean(axes, keepdims=True), anchor.std(axes, keepdims=True)
    pulled = (latents - mean) * (goal_deviation / jnp.maximum(deviation, 1e-6)) + goal_mean
    return latents + weight * (pulled - latents)
