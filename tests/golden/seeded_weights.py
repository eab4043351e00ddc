"""Weights made from their names, so that golden files need not hold them.

Numpy only. Both sides of a parity test call this with the checkpoint's own keys and shapes (torch layouts) and get the
same bits on every machine: raw bits of PCG64, whose stream numpy promises to keep, and exact fp32 products; no normal
numbers, whose algorithm may change.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np


def seeded_tensor(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """f32 tensor for `key`, uniform around its mean.

    Two and more axes `[out in ...]`: deviation 1.2 / sqrt(fan in), so that activations stay near 1. One axis: around 1
    with deviation 0.2 for a norm's `weight`, deviation 0.1 for a `bias`, 0.5 for anything else (a mixing factor).
    """
    size = math.prod(shape)
    bits = np.random.PCG64([zlib.crc32(key.encode()), seed]).random_raw(size)
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)
    if len(shape) >= 2:
        mean, deviation = 0.0, 1.2 / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("weight"):
        mean, deviation = 1.0, 0.2
    else:
        mean, deviation = 0.0, 0.1 if key.endswith("bias") else 0.5
    return (np.float32(mean) + np.float32(deviation * math.sqrt(12.0)) * unit).reshape(shape)


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """A whole checkpoint: every tensor of `shapes` by its name."""
    return {key: seeded_tensor(key, tuple(shape), seed) for key, shape in shapes.items()}


def seeded_input(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """f32 in [-1, 1): a video, latents or the input of a block."""
    bits = np.random.PCG64([zlib.crc32(name.encode()), seed]).random_raw(math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)).reshape(shape)
