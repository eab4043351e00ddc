"""Exact effects in time, and those that join clips: speed, cut, fades, concatenation, overlay. No model.

Frame i of a clip is shown from i / fps to (i + 1) / fps. At any time the newest frame is the one seen, so frames are
picked, never mixed, except where one clip fades into another. Sound follows the frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vdiff_jax.data.effects_pixels import check_range, masks_like, recorded, to_levels, to_unit
from vdiff_jax.data.sound import concatenate_sounds
from vdiff_jax.data.video_io import Clip, Limits

_SLACK = 1e-6  # of a frame: times that are equal but for rounding are equal


def _picks(effect: str, clip: Clip, step: float, count: int | None = None) -> np.ndarray:
    """Numbers of the frames seen at the times 0, `step`, 2 `step`, ... (in frames of the clip), i64 [count].

    count: None = as many as begin within the clip. Past the end the last frame stays.
    """
    count = count or max(1, math.ceil(clip.num_frames / step - _SLACK))
    limits = Limits()
    if count > limits.max_frames or count * clip.frames[0].nbytes > limits.max_bytes:
        raise ValueError(f"{effect}: this would make {count} frames, which is too much; cut the clip first")
    return np.minimum(np.floor(np.arange(count) * step + _SLACK).astype(int), clip.num_frames - 1)


def _at_rate(effect: str, clip: Clip, fps: float) -> Clip:
    """The clip at another frame rate; its frames are picked by time."""
    if fps == clip.fps:
        return clip
    return dataclasses.replace(clip, frames=clip.frames[_picks(effect, clip, clip.fps / fps)], fps=float(fps))


def _check_sizes(effect: str, clips: Sequence[Clip]) -> None:
    sizes = [clip.frames.shape[1:3] for clip in clips]
    for h, w in sizes[1:]:
        if (h, w) != sizes[0]:
            height, width = sizes[0]
            raise ValueError(
                f"{effect}: the clips have {height} x {width} and {h} x {w} pixels; "
                f"bring them to one size first, as with resize={height},{width}"
            )


# ---- one clip ---------------------------------------------------------------------------------------------------


@recorded
def speed(clip: Clip, factor: float) -> Clip:
    """Play factor (0.01..100) times as fast; fps stays, the pitch of the sound changes with the speed."""
    check_range("speed", "factor", factor, 0.01, 100)
    if factor == 1:
        return clip
    heard = clip.sound and clip.sound.change_speed(factor)
    return dataclasses.replace(clip, frames=clip.frames[_picks("speed", clip, factor)], sound=heard)


@recorded
def reverse(clip: Clip) -> Clip:
    """Last frame first; sound too."""
    heard = clip.sound and clip.sound.fit(clip.duration_s).reverse()
    return dataclasses.replace(clip, frames=clip.frames[::-1].copy(), sound=heard)


@recorded
def cut(clip: Clip, start: float, stop: float | None = None) -> Clip:
    """Keep the time from start to stop in seconds (without stop: to the end), to the nearest frame."""
    check_range("cut", "start", start, 0, clip.duration_s)
    end = clip.duration_s if stop is None else min(stop, clip.duration_s)
    check_range("cut", "stop", end, start, clip.duration_s)
    first, last = math.floor(start * clip.fps + 0.5 + _SLACK), math.floor(end * clip.fps + 0.5 + _SLACK)
    if first >= last:
        raise ValueError(f"cut: no frame lies between {start:g} s and {end:g} s at {clip.fps:g} fps; cut a longer part")
    heard = clip.sound and clip.sound.cut(first / clip.fps, last / clip.fps)
    return dataclasses.replace(clip, frames=clip.frames[first:last].copy(), sound=heard)


@recorded
def set_fps(clip: Clip, fps: float) -> Clip:
    """Another frame rate at the same duration: frames are repeated or left out, each picked by its time."""
    check_range("set_fps", "fps", fps, 0.01, 1000)
    return _at_rate("set_fps", clip, fps)


@recorded
def fade(clip: Clip, in_s: float, out_s: float = 0.0) -> Clip:
    """Rise from black and silence in the first in_s seconds, fall to them in the last out_s; 0 = no fade there."""
    check_range("fade", "in_s", in_s, 0, 3600)
    check_range("fade", "out_s", out_s, 0, 3600)
    times = np.arange(clip.num_frames) / clip.fps
    gain = np.ones(clip.num_frames, np.float32)
    for seconds, since in ((in_s, times), (out_s, times[::-1])):
        gain *= np.minimum(since / seconds, 1).astype(np.float32) if seconds else np.float32(1)
    frames = [image if g == 1 else to_levels(to_unit(image) * g) for image, g in zip(clip.frames, gain)]
    heard = clip.sound and clip.sound.fit(clip.duration_s).fade(in_s, out_s)
    return dataclasses.replace(clip, frames=np.stack(frames), sound=heard)


# ---- several clips ----------------------------------------------------------------------------------------------


@recorded
def concatenate(clips: Sequence[Clip]) -> Clip:
    """One clip after the other, of one size; all get the frame rate of the first.

    The sound of each stays with its frames: it is cut or filled with silence to their duration.
    """
    if not clips:
        raise ValueError("concatenate: give at least one clip")
    _check_sizes("concatenate", clips)
    timed = [_at_rate("concatenate", clip, clips[0].fps) for clip in clips]
    heard = concatenate_sounds([(clip.sound, clip.duration_s) for clip in timed])
    return dataclasses.replace(timed[0], frames=np.concatenate([clip.frames for clip in timed]), sound=heard)


@recorded
def crossfade(clip: Clip, other: Clip, duration_s: float) -> Clip:
    """The other clip follows; for duration_s both overlap and one melts into the other, picture and sound.

    The other clip gets this one's frame rate; both must have one size. The result is shorter than both together by
    the overlap, which is rounded to whole frames.
    """
    _check_sizes("crossfade", [clip, other])
    timed = _at_rate("crossfade", other, clip.fps)
    most = min(clip.duration_s, timed.duration_s)
    check_range("crossfade", "duration_s", duration_s, 0, most)
    count = min(round(duration_s * clip.fps), clip.num_frames, timed.num_frames)
    last = clip.num_frames - count
    shares = (np.arange(1, count + 1) / (count + 1)).astype(np.float32)
    mixed = [
        to_levels(to_unit(a) + share * (to_unit(b) - to_unit(a)))
        for a, b, share in zip(clip.frames[last:], timed.frames[:count], shares)
    ]
    frames = np.concatenate([clip.frames[:last], *(image[None] for image in mixed), timed.frames[count:]])
    parts = [(clip.sound, clip.duration_s), (timed.sound, timed.duration_s)]
    return dataclasses.replace(clip, frames=frames, sound=concatenate_sounds(parts, overlap_s=count / clip.fps))


@recorded
def overlay(
    clip: Clip, other: Clip, x: int = 0, y: int = 0, opacity: float = 1.0, mask: np.ndarray | None = None
) -> Clip:
    """Paste the other clip or image with its top left corner at column x, row y, as strongly as opacity (0..1).

    What lies outside the frames is cropped (x and y may be negative). The other clip runs at its own speed; after its
    end its last frame stays, so an image is seen throughout. Its sound is not heard.
    mask: 0..1, [h w] or [f h w] of the other clip, white where it shows.
    """
    check_range("overlay", "opacity", opacity, 0, 1)
    white = masks_like("overlay", mask, other) * np.float32(opacity)
    picks = _picks("overlay", other, other.fps / clip.fps, clip.num_frames)
    (height, width), (h, w) = clip.frames.shape[1:3], other.frames.shape[1:3]
    rows, columns = slice(max(0, y), max(0, min(height, y + h))), slice(max(0, x), max(0, min(width, x + w)))
    part = (slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return clip
    frames = clip.frames.copy()
    for image, pick in zip(frames, picks):
        below, above = to_unit(image[rows, columns]), to_unit(other.frames[pick][part])
        image[rows, columns] = to_levels(below + white[pick][part][..., None] * (above - below))
    return dataclasses.replace(clip, frames=frames)
