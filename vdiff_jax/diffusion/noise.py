"""Unit-variance noise for clips, one key per sample.

gaussian    independent everywhere. The default: what per-frame levels and every sampler's theory rest on.
uniform     independent, uniform on [-sqrt 3, sqrt 3]. Same first two moments; the tails differ, so a model trained
            on it is exact only for itself. Useful to test how much a model relies on Gaussian tails.
correlated  sqrt(correlation) shared over frames + sqrt(1 - correlation) own ("mixed" prior, Ge et al. 2023, PYoCo).
            Helps when an image model is tuned on video; it breaks the independence of frames that per-frame levels
            assume, so autoregressive and ramp plans lose their exactness.
offset      adds one number per frame and channel, strength `offset`, then rescales. Lets models whose first level
            leaks the mean make very dark or bright clips; not needed down to logsnr -10, and it costs fine detail.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vdiff_jax.types import Array

NOISE_KINDS = ("gaussian", "uniform", "correlated", "offset")


def draw_noise(
    keys: Array, shape: tuple[int, ...], kind: str = "gaussian", *, correlation: float = 0.5, offset: float = 0.1
) -> Array:
    """Noise `[b f h w c]`, zero mean and unit variance in every element.

    Args:
        keys: `[b]` keys; sample i depends on key i only.
        shape: (f, h, w, c) of one sample.
        kind: see the module.
        correlation: of "correlated", between any two frames, in [0, 1].
        offset: of "offset", deviation of the shared number before rescaling.
    Raises:
        ValueError: unknown kind.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise kind {kind!r} is unknown; use one of {', '.join(NOISE_KINDS)}.")

    def one(key: Array) -> Array:
        if kind == "gaussian":
            return jax.random.normal(key, shape)
        if kind == "uniform":
            return jax.random.uniform(key, shape, minval=-math.sqrt(3.0), maxval=math.sqrt(3.0))
        own_key, shared_key = jax.random.split(key)
        own = jax.random.normal(own_key, shape)
        if kind == "correlated":
            shared = jax.random.normal(shared_key, (1, *shape[1:]))
            return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        shared = jax.random.normal(shared_key, (shape[0], 1, 1, shape[-1]))
        return (own + offset * shared) / math.sqrt(1 + offset**2)

    return jax.vmap(one)(jnp.asarray(keys))
