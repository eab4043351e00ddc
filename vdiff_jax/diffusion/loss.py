"""The training loss: a weighted error of the noise estimate on the tokens that are not known.

    loss = mean over unknown tokens and channels of  w(logsnr) q_c (eps_hat_c - eps_c)^2

with channel weights q of mean 1, all the same by default.

All weightings are one function of the level on this scale (Kingma & Gao 2023), whatever the network predicts:

    eps      1                          x0       e^-logsnr
    v        1 + e^-logsnr              flow     (alpha + sigma)^2 / alpha^2
    min_snr  min(1, gamma e^-logsnr)    sigmoid  sigmoid(bias - logsnr)

The noise error follows from the network's own error without a division by a vanishing alpha:

    |d eps|^2 = e^logsnr |d x0|^2 = alpha^2 |d v|^2 = alpha^2 / (alpha + sigma)^2 |d velocity|^2

Weight and factor are joined in the log domain, so their product is right where each alone would over- or underflow.
Runs with different kinds and weightings are compared by the unweighted error, reported beside the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.prediction import KINDS, target
from vdiff_jax.diffusion.process import EXTREME_LOGSNR, alpha_sigma
from vdiff_jax.types import Array

WEIGHTINGS = ("eps", "x0", "v", "flow", "min_snr", "sigmoid")


def _finite(logsnr: Array) -> Array:
    return jnp.clip(logsnr, -EXTREME_LOGSNR, EXTREME_LOGSNR)


def log_weight(name: str, logsnr: Array, *, bias: float = 2.0, gamma: float = 5.0) -> Array:
    """Logarithm of `weight`; finite for every level, infinite ones included."""
    logsnr = _finite(logsnr)
    if name == "eps":
        return jnp.zeros_like(logsnr)
    if name == "x0":
        return -logsnr
    if name == "v":
        return -jax.nn.log_sigmoid(logsnr)
    if name == "flow":
        alpha, sigma = alpha_sigma(logsnr)
        return 2 * jnp.log(alpha + sigma) - jax.nn.log_sigmoid(logsnr)
    if name == "min_snr":
        return jnp.minimum(0.0, float(np.log(gamma)) - logsnr)
    if name == "sigmoid":
        return jax.nn.log_sigmoid(bias - logsnr)
    raise ValueError(f"loss weighting {name!r} is unknown; use one of {', '.join(WEIGHTINGS)}.")


def weight(name: str, logsnr: Array, *, bias: float = 2.0, gamma: float = 5.0) -> Array:
    """Loss weight on the scale of the noise error.

    Args:
        name: "eps", "x0", "v", "flow", "min_snr" (Hang et al. 2023) or "sigmoid" (Kingma & Gao 2023).
        logsnr: any shape.
        bias: of "sigmoid"; min-SNR-gamma is its hard version with bias = log(gamma).
        gamma: of "min_snr".
    Raises:
        ValueError: unknown name.
    """
    return jnp.exp(log_weight(name, logsnr, bias=bias, gamma=gamma))


def log_eps_factor(kind: str, logsnr: Array) -> Array:
    """Logarithm of the factor that turns a kind's squared error into that of the noise estimate."""
    logsnr = _finite(logsnr)
    if kind == "eps":
        return jnp.zeros_like(logsnr)
    if kind == "x0":
        return logsnr
    if kind == "v":
        return jax.nn.log_sigmoid(logsnr)
    if kind == "velocity":
        alpha, sigma = alpha_sigma(logsnr)
        return jax.nn.log_sigmoid(logsnr) - 2 * jnp.log(alpha + sigma)
    raise ValueError(f"prediction kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")


class DiffusionLoss(NamedTuple):
    """What `diffusion_loss` measures, fp32.

    loss: `[b]`, the weighted loss of every sample. eps_loss: `[b]`, its unweighted noise error, for the record.
    frame_eps_loss: `[b f]`, the same frame by frame, as frames of one clip may have different levels.
    frame_unknown: `[b f]`, share of the frame's tokens that is unknown; where it is 0, frame_eps_loss is 0 as well.
    """

    loss: Array
    eps_loss: Array
    frame_eps_loss: Array
    frame_unknown: Array


def diffusion_loss(
    prediction: Array,
    kind: str,
    x: Array,
    eps: Array,
    z: Array,
    logsnr: Array,
    known_mask: Array,
    *,
    weighting: str = "sigmoid",
    bias: float = 2.0,
    gamma: float = 5.0,
    channel_weights: Array | None = None,
) -> DiffusionLoss:
    """Loss of every sample, and the unweighted noise error for the record, by sample and by frame.

    Args:
        prediction: `[b f h w c]` network output of prediction kind `kind`.
        x, eps, z: `[b f h w c]` clean latents, the noise that was added, and `z = alpha x + sigma eps`.
        logsnr: `[b f]` or `[b f h w 1]`, level of the unknown tokens (values at known tokens do not matter).
        known_mask: `[b f h w 1]`, 1 = known; known tokens take no part. At least one must be unknown.
        channel_weights: `[c]` with mean 1, or None for all 1; the unweighted error stays without them.
    Raises:
        ValueError: the network changed the shape of its input.
    Returns:
        Means over unknown tokens and channels, and the share of such tokens, see `DiffusionLoss`.
    """
    if prediction.shape != z.shape:
        raise ValueError(f"prediction has shape {prediction.shape} but z has {z.shape}; a network keeps the shape.")
    error = (prediction - target(kind, x, eps, logsnr)).astype(jnp.float32)
    squared = jnp.mean(jnp.square(error), axis=-1, keepdims=True)
    balanced = squared
    if channel_weights is not None:
        weights = channel_weights.reshape((1,) * (error.ndim - 1) + (-1,))
        balanced = jnp.mean(jnp.square(error) * weights, axis=-1, keepdims=True)
    logsnr = jnp.broadcast_to(logsnr.reshape(logsnr.shape + (1,) * (squared.ndim - logsnr.ndim)), squared.shape)
    factor = log_eps_factor(kind, logsnr)
    weighted = jnp.exp(factor + log_weight(weighting, logsnr, bias=bias, gamma=gamma)) * balanced
    unknown = known_mask < 0.5
    plain = jnp.exp(factor) * squared
    every, inner = tuple(range(1, plain.ndim)), tuple(range(2, plain.ndim))
    return DiffusionLoss(
        loss=_mean_where(weighted, unknown, every),
        eps_loss=_mean_where(plain, unknown, every),
        frame_eps_loss=_mean_where(plain, unknown, inner),
        frame_unknown=jnp.mean(unknown.astype(jnp.float32), inner),
    )


def _mean_where(values: Array, where: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.where(where, values, 0.0), axes) / jnp.maximum(jnp.sum(where, axes), 1)


def stratified_u(key: Array, batch: int) -> Array:
    """`batch` values in [0, 1), each uniform, together evenly spread: `(u_0 + i / b) mod 1` (Kingma et al. 2021)."""
    return jnp.mod(jax.random.uniform(key) + jnp.arange(batch) / batch, 1.0)


def loss_by_bin(logsnr: Array, eps_loss: Array, edges: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Sums losses by level, so that runs with different training levels can be compared.

    Args:
        logsnr, eps_loss: equal shapes, for example `[b]` or `[b f]`.
        edges: `[n + 1]` increasing bin edges; levels outside fall in the first or last bin.
        weights: how much each counts, of the same shape; 1 by default.
    Returns:
        sum `[n]`, count `[n]` f32, both weighted: add them over steps, then divide.
    """
    bins = edges.shape[0] - 1
    index = jnp.clip(jnp.searchsorted(edges, logsnr.ravel(), side="right") - 1, 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32)
    if weights is not None:
        member = member * weights.ravel()[:, None]
    return jnp.sum(member * eps_loss.ravel()[:, None], axis=0), jnp.sum(member, axis=0)
