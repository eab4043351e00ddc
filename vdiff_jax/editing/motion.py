"""Tasks of motion: which frames are known, and when every frame is.

All of them are one job: some whole frames are given, with their real time stamps, the others are made. Two given frames
at least on a side carry a velocity; one does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax.sampling.job import CLEAN_LOGSNR, known_frames
from vdiff_jax.types import Array, Known, Latents


class Timeline(NamedTuple):
    """A clip with gaps: `known` (see `Known`) and the time stamps `[f]` of all its frames."""

    known: Known
    times: Array


def spread(latents: Latents, factor: int, spacing: float = 1.0) -> Timeline:
    """Slow motion: `factor - 1` new frames between any two of `latents [b f h w c]`.

    spacing: time between the given frames, in native frame intervals.

    Raises:
        ValueError: a factor below 2, or a clip of one frame.
    """
    if factor < 2 or latents.shape[1] < 2:
        raise ValueError(
            f"interpolation by factor={factor} of {latents.shape[1]} frame(s): it needs a factor of 2 or more and at "
            "least 2 frames"
        )
    count = (latents.shape[1] - 1) * factor + 1
    frames = jnp.zeros((latents.shape[0], count, *latents.shape[2:]), latents.dtype).at[:, ::factor].set(latents)
    known = known_frames(frames, np.arange(0, count, factor))
    return Timeline(known, jnp.arange(count, dtype=jnp.float32) * (spacing / factor))


def bridge(head: Latents, tail: Latents, num_frames: int, spacing: float = 1.0) -> Timeline:
    """A transition: `num_frames` new frames between given ones, `head [b m h w c]` before and `tail [b n h w c]` after.

    Raises:
        ValueError: no new frame, or ends of different sizes.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a transition needs at least 1 new frame")
    if head.shape[2:] != tail.shape[2:]:
        raise ValueError(f"latents of {head.shape[2:]} and {tail.shape[2:]} cannot be joined: bring them to one size")
    middle = jnp.zeros((head.shape[0], num_frames, *head.shape[2:]), head.dtype)
    frames = jnp.concatenate([head, middle, tail], axis=1)
    given = np.ones(frames.shape[1], bool)
    given[head.shape[1] : head.shape[1] + num_frames] = False
    return Timeline(known_frames(frames, given), spacing * jnp.arange(frames.shape[1], dtype=jnp.float32))


def waypoints(given: np.ndarray, window: int, overlap: int) -> list[np.ndarray]:
    """Passes that shorten the gaps between `given` frames (bool `[f]`) until a window reaches over each.

    Every pass is the sorted frames of one call: up to `overlap` known ones on either side of a gap, and new ones spread
    evenly over it. Afterwards no gap is longer than what a window adds before the next known frame.

    Raises:
        ValueError: the known frames fill the window.
    """
    done, passes = np.array(given, bool), []
    if len(done) <= window:
        return passes
    while gaps := [gap for gap in _runs(~done) if len(gap) > max(window - overlap - 1, 1)]:
        for gap in gaps:
            known = np.flatnonzero(done)
            sides = max(overlap, 1)
            around = np.concatenate([known[known < gap[0]][-sides:], known[known > gap[-1]][:sides]])
            count = min(window - len(around), len(gap))
            if count < 1:
                raise ValueError(
                    f"{len(around)} known frames leave no new one in a window of {window}: give a larger window or a "
                    "smaller overlap"
                )
            places = np.arange(1, count + 1) * (len(gap) + 1) / (count + 1) - 1
            passes.append(np.union1d(around, gap[np.rint(places).astype(int)]))
            done[passes[-1]] = True
    return passes


def _runs(where: np.ndarray) -> list[np.ndarray]:
    """Indices of every run of True."""
    index = np.flatnonzero(where)
    return np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []


def continuation(
    context: Latents,
    num_frames: int,
    spacing: float = 1.0,
    anchors: Latents | None = None,
    anchor_times: Array | None = None,
    context_logsnr: float | Array = CLEAN_LOGSNR,
) -> Timeline:
    """The future: `num_frames` new frames after `context [b c h w c]`, which starts at time 0.

    anchors: frames from before `[b a h w c]`, put in front, at the (negative) `anchor_times [a]`.
    context_logsnr: the level at which context and anchors are shown; below 10 for frames that were made themselves.
    """
    front = context if anchors is None else jnp.concatenate([anchors, context], axis=1)
    new = jnp.zeros((context.shape[0], num_frames, *context.shape[2:]), context.dtype)
    frames = jnp.concatenate([front, new], axis=1)
    times = spacing * jnp.arange(context.shape[1] + num_frames, dtype=jnp.float32)
    if anchors is not None:
        assert anchor_times is not None
        times = jnp.concatenate([jnp.asarray(anchor_times, jnp.float32), times])
    return Timeline(known_frames(frames, np.arange(front.shape[1]), context_logsnr), times)


def camera_move(
    frames: np.ndarray, pan: tuple[float, float] = (0.0, 0.0), zoom: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Frames u8 `[f h w 3]` seen by a camera that moves, and the mask `[f h w]` f32 of what it sees for the first time.

    pan: pixels (right, down) that the camera moves over the clip, from its first frame to its last.
    zoom: how much closer the camera is in the last frame than in the first; below 1 it moves away.
    Bilinear; pixels from outside the frame are masked and hold the nearest border pixel.
    """
    count, height, width = frames.shape[:3]
    centre = np.array([height - 1, width - 1]) / 2
    moved, masks = np.empty_like(frames), np.zeros(frames.shape[:3], np.float32)
    for index, part in enumerate(np.linspace(0.0, 1.0, count)):
        scale = 1.0 / zoom**part
        # A pixel p of the new frame shows the old frame at p * scale + offset.
        offset = centre * (1 - scale) + part * np.array([pan[1], pan[0]])
        move: dict[str, Any] = dict(matrix=[scale, scale, 1.0], offset=[*offset, 0.0], order=1, mode="nearest")
        # From further away a pixel shows several of the old ones: without their mean, fine detail would flicker.
        blur = 0.5 * np.sqrt(max(scale**2 - 1.0, 0.0))
        seen = ndimage.gaussian_filter(frames[index].astype(np.float64), (blur, blur, 0), mode="nearest")
        moved[index] = np.rint(ndimage.affine_transform(seen, **move))
        rows, columns = (np.arange(size) * scale + start for size, start in zip((height, width), offset))
        beyond_rows = (rows < -1e-6) | (rows > height - 1 + 1e-6)
        beyond_columns = (columns < -1e-6) | (columns > width - 1 + 1e-6)
        masks[index] = beyond_rows[:, None] | beyond_columns[None]
    return moved, masks
