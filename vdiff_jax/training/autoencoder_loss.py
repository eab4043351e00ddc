"""The autoencoder's objective: reconstruction, edges, and a light KL term (Rombach et al. 2022).

    loss = |y - x|^2 + l1_weight |y - x| + edge_weight |grad y - grad x| + kl_weight KL(q(z|x) || N(0, 1))

The edge term stands where image models put a perceptual network: it asks for sharp borders without any extra weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vdiff_jax.types import Array, Params, Video


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms; see the module docstring."""

    l1_weight: float = 0.1
    edge_weight: float = 0.1
    kl_weight: float = 1e-6


def make_autoencoder_loss(
    encode_moments: Callable[[Params, Video], Array],
    decode_raw: Callable[[Params, Array], Video],
    config: AutoencoderLossConfig,
):
    """loss_fn(params, batch, keys [b]) -> (loss, metrics), for `training.step`.

    batch: `video [b f h w 3]`, optional `valid [b f]`: frames that count.
    """

    def loss_fn(params: Params, batch: dict[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        video = batch["video"]
        mean, logvar = jnp.split(encode_moments(params, video), 2, axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        output = decode_raw(params, mean + jnp.exp(0.5 * logvar) * noise)
        error, valid = output - video, batch.get("valid")
        mse = _mean(jnp.square(error), valid)
        l1 = _mean(jnp.abs(error), valid)
        edge = _mean(jnp.abs(jnp.diff(error, axis=2)), valid) + _mean(jnp.abs(jnp.diff(error, axis=3)), valid)
        kl = 0.5 * _mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, valid)
        kl = kl * (mean[0].size / video[0].size)  # per value of the clip, so that the weight does not depend on sizes
        loss = mse + config.l1_weight * l1 + config.edge_weight * edge + config.kl_weight * kl
        # Pixels span 2 units in [-1, 1].
        return loss, {"mse": mse, "kl": kl, "psnr": 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))}

    return loss_fn


def _mean(values: Array, valid: Array | None) -> Array:
    """Over all values `[b f h w c]` of the frames that count."""
    if valid is None:
        return jnp.mean(values)
    real = jnp.broadcast_to(valid[:, :, None, None, None], values.shape)
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.sum(real)
