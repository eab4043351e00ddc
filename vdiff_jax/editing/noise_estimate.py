"""How noisy a clip is, from the clip alone."""

from __future__ import annotations

import jax.numpy as jnp
from scipy import special

from vdiff_jax.types import Array, Video

_CUT = 2.0
_MEDIAN_BELOW_CUT = float(special.ndtri(0.5 + special.ndtr(_CUT) / 2 - 0.25))
"""Median of |x| over the unit normal x with |x| < 2."""


def estimate_noise(video: Video) -> Array:
    """Standard deviation of white noise in every clip, `[b]` f32, in the units of `video [b f h w c]`.

    The residual of every frame under the mask [1 -2 1]^T [1 -2 1] / 6 (Immerkaer 1996), which no gradient of brightness
    and no straight edge along the grid survives, has the noise's own deviation. It is read from the median of its size
    over all pixels and channels (Donoho & Johnstone 1994), those larger than twice the deviation left out and the rest
    taken as a normal law cut there: corners and slanted edges do not move it.

    Noise that is not white is judged by its highest frequencies: compressed or rescaled clips by less than they
    carry. Fine texture counts as noise. Where many pixels are clipped to black or white, it is too small.

    Raises:
        ValueError: frames below 3 x 3.
    """
    if video.ndim != 5 or min(video.shape[2:4]) < 3:
        raise ValueError(f"noise is estimated from video [b f h w c] of at least 3 x 3 pixels, got {video.shape}.")
    video = jnp.asarray(video)
    lines = video[:, :, 2:] - 2 * video[:, :, 1:-1] + video[:, :, :-2]
    residual = (lines[:, :, :, 2:] - 2 * lines[:, :, :, 1:-1] + lines[:, :, :, :-2]) / 6
    size = jnp.sort(jnp.abs(residual).reshape(len(video), -1), axis=1)
    std = jnp.median(size, axis=1) / special.ndtri(0.75)
    for _ in range(8):  # each turn takes off more than half of what edges had added
        below = jnp.sum(size < _CUT * std[:, None], axis=1, keepdims=True)
        std = jnp.take_along_axis(size, below // 2, axis=1)[:, 0] / _MEDIAN_BELOW_CUT
    return std
