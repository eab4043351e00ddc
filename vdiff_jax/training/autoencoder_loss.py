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
    """loss_fn(params, batch {"video" [b f h w 3]}, keys [b]) -> (loss, metrics), for `training.step`."""

    def loss_fn(params: Params, batch: dict[str, Array], keys: Array) -> tuple[Array, dict[str, Array]]:
        video = batch["video"]
        mean, logvar = jnp.split(encode_moments(params, video), 2, axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        output = decode_raw(params, mean + jnp.exp(0.5 * logvar) * noise)
        mse = jnp.mean(jnp.square(output - video))
        l1 = jnp.mean(jnp.abs(output - video))
        edge = jnp.mean(jnp.abs(jnp.diff(output - video, axis=2))) + jnp.mean(jnp.abs(jnp.diff(output - video, axis=3)))
        kl = 0.5 * jnp.mean(jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3, 4)))
        kl = kl / video[0].size  # per value of the clip, so that the weight does not depend on sizes
        loss = mse + config.l1_weight * l1 + config.edge_weight * edge + config.kl_weight * kl
        # Pixels span 2 units in [-1, 1].
        return loss, {"mse": mse, "kl": kl, "psnr": 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))}

    return loss_fn
