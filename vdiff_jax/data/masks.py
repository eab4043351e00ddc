"""Masks of a clip: `[f h w]` f32, 1 (white) = change this, 0 = keep. From files, boxes with key frames, or a colour.

mask.png  mask.mp4  folder/        white on black; one image counts for all frames; any size, scaled to the clip
box:4,6,12,10                      x, y, width, height in pixels
box:0:4,6,12,10;15:16,6,12,10      key frames, FRAME:BOX; straight lines between them
colour:#f27373,0.2                 pixels within a distance of 0.2 (RGB in 0..1) of a colour
!SPEC                              everything but that
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from scipy import ndimage

from vdiff_jax.data.video_io import read_video

USAGE = "give a file, box:X,Y,W,H, box:FRAME:X,Y,W,H;FRAME:X,Y,W,H, or colour:#RRGGBB,DISTANCE"


def make_mask(spec: str, frames: np.ndarray, grow: int = 0) -> np.ndarray:
    """The mask a text asks for, `[f h w]` f32 in 0..1, for `frames` u8 `[f h w 3]`.

    grow: pixels by which the mask is widened on all sides.

    Raises:
        ValueError: a text that is none of the forms above, or a mask that covers nothing.
    """
    text = spec.strip()
    inverse, text = text.startswith("!"), text.removeprefix("!").strip()
    kind, _, rest = text.partition(":")
    if kind == "box":
        mask = box_mask(_key_frames(rest, spec), frames.shape[:3])
    elif kind == "colour":
        mask = _colour_mask(rest, frames, spec)
    else:
        mask = read_mask(text, frames.shape[:3])
    mask = 1 - mask if inverse else mask
    mask = grow_mask(mask, grow)
    if not (mask > 0.5).any():
        raise ValueError(f"the mask {spec!r} covers nothing of the clip: {USAGE}")
    return mask


def grow_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`[f h w]` widened by `pixels` on all sides."""
    side = 2 * pixels + 1
    return ndimage.maximum_filter(mask, size=(1, side, side)) if pixels > 0 else mask


def read_mask(path: str | os.PathLike, shape: tuple[int, ...]) -> np.ndarray:
    """A mask file as `[f h w]` f32 in 0..1: brightness, scaled to `shape`; one image stands for all frames.

    Raises VideoError for a file that cannot be read, ValueError for a video shorter than the clip.
    """
    num_frames, height, width = shape[:3]
    clip = read_video(Path(path))
    if 1 < clip.num_frames < num_frames:
        raise ValueError(f"the mask {path} has {clip.num_frames} frames, the clip {num_frames}: give one or as many")
    levels = clip.frames.astype(np.float32).mean(axis=-1) / 255.0
    rows = ((np.arange(height) + 0.5) * levels.shape[1] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * levels.shape[2] / width).astype(int)
    scaled = levels[:num_frames, rows][:, :, columns]
    return np.broadcast_to(scaled, (num_frames, height, width)).copy()


def box_mask(key_frames: dict[int, tuple[float, float, float, float]], shape: tuple[int, ...]) -> np.ndarray:
    """Boxes (x, y, width, height) at key frames, straight lines between, held before and after; `[f h w]` f32 0 or 1.

    A pixel is inside if its cell [x, x + 1) x [y, y + 1) touches the box.
    """
    num_frames, height, width = shape[:3]
    stamps = sorted(key_frames)
    values = np.array([key_frames[stamp] for stamp in stamps], np.float64)
    x, y, w, h = (np.interp(np.arange(num_frames), stamps, column)[:, None] for column in values.T)
    rows, columns = np.arange(height)[None], np.arange(width)[None]
    inside_rows = (rows + 1 > y) & (rows < y + h)
    inside_columns = (columns + 1 > x) & (columns < x + w)
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).astype(np.float32)


def colour_mask(frames: np.ndarray, colour: tuple[float, float, float], distance: float) -> np.ndarray:
    """Pixels of u8 `[f h w 3]` within `distance` of `colour` (RGB in 0..1, Euclidean); `[f h w]` f32, 0 or 1."""
    gap = frames.astype(np.float32) / 255.0 - np.asarray(colour, np.float32)
    return (np.sqrt(np.square(gap).sum(axis=-1)) <= distance).astype(np.float32)


def _key_frames(text: str, spec: str) -> dict[int, tuple[float, float, float, float]]:
    found: dict[int, tuple[float, float, float, float]] = {}
    for part in text.split(";"):
        frame, _, box = part.rpartition(":")
        try:
            x, y, w, h = (float(number) for number in box.split(","))
            stamp = int(frame or 0)
        except ValueError as error:
            raise ValueError(f"the mask {spec!r} has no box in {part!r}: {USAGE}") from error
        if stamp in found:
            raise ValueError(f"the mask {spec!r} has two boxes for frame {stamp}: {USAGE}")
        if w <= 0 or h <= 0:
            raise ValueError(f"the mask {spec!r} has a box without area in {part!r}: {USAGE}")
        found[stamp] = (x, y, w, h)
    return found


def _colour_mask(text: str, frames: np.ndarray, spec: str) -> np.ndarray:
    code, _, distance = text.partition(",")
    digits = code.strip().lstrip("#")
    try:
        if len(digits) != 6:
            raise ValueError(digits)
        red, green, blue = (int(digits[i : i + 2], 16) / 255.0 for i in (0, 2, 4))
        reach = float(distance or 0.15)
    except ValueError as error:
        raise ValueError(f"the mask {spec!r} is no colour: {USAGE}") from error
    return colour_mask(frames, (red, green, blue), reach)
