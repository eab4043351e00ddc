"""From our pixels to what CLIP's image encoder reads: Stable Video Diffusion's antialiased resize, and the scale.

The resize is linear and separable, so it is one matrix an axis, made once for a size.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from vdiff_jax.types import Array

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(video: Array, size: int = 224) -> Array:
    """Pictures `[b h w 3]` f32 in [-1, 1] -> `[b size size 3]` f32 as the image encoder reads them."""
    return normalize_pixels(resize_antialiased(video, size, size))


def normalize_pixels(video: Array) -> Array:
    """[-1, 1] -> CLIP's zero mean and unit deviation, channel by channel (last axis)."""
    shape = (1,) * (video.ndim - 1) + (3,)
    mean, std = (jnp.asarray(value, jnp.float32).reshape(shape) for value in (CLIP_MEAN, CLIP_STD))
    return ((video + 1.0) / 2.0 - mean) / std


def resize_antialiased(video: Array, height: int, width: int) -> Array:
    """`[b h w c] -> [b height width c]` as Stable Video Diffusion does before CLIP: a Gaussian blur whose width follows
    from the factor, borders reflected, then bicubic interpolation with the corners kept in place."""
    rows = jnp.asarray(resize_matrix(video.shape[1], height))
    columns = jnp.asarray(resize_matrix(video.shape[2], width))
    return jnp.einsum("oh,bhwc,pw->bopc", rows, video.astype(jnp.float32), columns, precision="highest")


@functools.lru_cache(maxsize=32)
def resize_matrix(size: int, new_size: int) -> np.ndarray:
    """f32 [new_size size]: blur and interpolation along one axis."""
    return (_bicubic_matrix(size, new_size) @ _blur_matrix(size, size / new_size)).astype(np.float32)


def _blur_matrix(size: int, factor: float) -> np.ndarray:
    sigma = max((factor - 1.0) / 2.0, 0.001)
    width = int(max(4.0 * sigma, 3)) // 2 * 2 + 1
    reach = width // 2
    if reach >= size:
        raise ValueError(f"a side of {size} pixels is too short to be made {factor:.0f} times smaller: crop it less")
    tap = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    matrix = np.zeros((size, size))
    for offset, weight in zip(range(-reach, reach + 1), tap / tap.sum()):
        source = np.abs(np.arange(size) + offset)
        source = np.where(source >= size, 2 * (size - 1) - source, source)  # reflected, the edge itself once
        matrix[np.arange(size), source] += weight
    return matrix


def _bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Keys' cubic convolution with a = -0.75, beyond the border its last pixel."""
    position = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
    floor = np.floor(position).astype(int)
    matrix = np.zeros((new_size, size))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(position - (floor + offset))
        near = (1.25 * distance - 2.25) * distance**2 + 1.0
        far = -0.75 * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
        weight = np.where(distance <= 1.0, near, np.where(distance < 2.0, far, 0.0))
        np.add.at(matrix, (np.arange(new_size), np.clip(floor + offset, 0, size - 1)), weight)
    return matrix
