"""Pixels between files and networks: the two converters of range, and the crops, resizes and flips of the host.

    video  = frames / 127.5 - 1          u8 0..255  -> f32 -1..1
    frames = round((video + 1) * 127.5)  f32 -1..1  -> u8 0..255, halves to even, clipped

`to_uint8(to_video(frames)) == frames` for all 256 values. The converters take numpy and JAX arrays of any shape and
answer in kind; everything else here is numpy on u8 frames [f h w c].
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLIP_WORDS = frozenset({"left", "right", "leftward", "leftwards", "rightward", "rightwards"})


def to_video(frames: Any) -> Any:
    """u8 0..255 of any shape -> f32 -1..1 of the same shape; numpy in, numpy out; JAX in, JAX out."""
    xp = jnp if isinstance(frames, jax.Array) else np
    frames = frames if isinstance(frames, jax.Array) else np.asarray(frames)
    if frames.dtype != np.uint8:
        raise ValueError(f"to_video takes uint8 frames, got {frames.dtype}")
    return frames.astype(xp.float32) * xp.float32(1 / 127.5) - xp.float32(1)


def to_uint8(video: Any) -> Any:
    """f32 -1..1 of any shape -> u8 0..255 of the same shape: halves to even, values outside clipped, NaN -> 0."""
    xp = jnp if isinstance(video, jax.Array) else np
    video = video if isinstance(video, jax.Array) else np.asarray(video)
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(f"to_uint8 takes floating point video in -1..1, got {video.dtype}")
    levels = xp.round((video.astype(xp.float32) + xp.float32(1)) * xp.float32(127.5))
    return xp.clip(xp.nan_to_num(levels, nan=0.0), 0, 255).astype(xp.uint8)


def centre_crop_resize(frames: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """u8 [f h w 3] -> u8 [f size size 3] or [f *size 3]: the largest centred part of that shape, resized.

    Lanczos with its support widened when shrinking (no aliasing). Frames that already fit are returned as they are.
    """
    out_h, out_w = (size, size) if isinstance(size, int) else size
    if out_h < 1 or out_w < 1:
        raise ValueError(f"size must be positive, got {size}")
    h, w = frames.shape[1:3]
    if (h, w) == (out_h, out_w):
        return frames
    scale = min(h / out_h, w / out_w)
    crop_h, crop_w = max(1, round(out_h * scale)), max(1, round(out_w * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = frames[:, top : top + crop_h, left : left + crop_w]
    return resize_frames(cropped, out_h, out_w)


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """u8 [f h w 3] -> u8 [f height width 3], stretched to that shape; frames that already fit are returned as they are.

    Lanczos with its support widened when shrinking (no aliasing).
    """
    from PIL import Image

    if frames.shape[1:3] == (height, width):
        return frames
    lanczos = Image.Resampling.LANCZOS
    resized = [Image.fromarray(image).resize((width, height), lanczos, reducing_gap=3.0) for image in frames]
    return np.stack([np.asarray(image) for image in resized])


def random_crop(frames: np.ndarray, size: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """u8 [f h w 3] -> u8 [f size size 3] or [f *size 3]: one window for all frames, its place uniform."""
    out_h, out_w = (size, size) if isinstance(size, int) else size
    h, w = frames.shape[1:3]
    if out_h > h or out_w > w:
        raise ValueError(f"cannot crop {out_h} x {out_w} from frames of {h} x {w}; read them larger or crop less")
    top, left = int(rng.integers(h - out_h + 1)), int(rng.integers(w - out_w + 1))
    return frames[:, top : top + out_h, left : left + out_w]


def can_flip(caption: str, flip_words: frozenset[str] = FLIP_WORDS) -> bool:
    """False where the caption names a side (one of `flip_words`): a mirrored clip would contradict it."""
    return flip_words.isdisjoint(re.findall(r"\w+", caption.lower()))


def random_flip(
    record: dict[str, Any],
    rng: np.random.Generator,
    probability: float = 0.5,
    flip_words: frozenset[str] = FLIP_WORDS,
) -> dict[str, Any]:
    """Mirror a record's frames left to right with `probability`, never where the caption names a side."""
    if rng.random() >= probability or not can_flip(record["caption"], flip_words):
        return record
    return {**record, "frames": record["frames"][:, :, ::-1]}
