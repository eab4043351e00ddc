"""What a training stage measures on its data: before it starts, and when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax import parallel
from vdiff_jax.components import Component
from vdiff_jax.models.autoencoder import latents_from_moments, pixel_weights, principal_components
from vdiff_jax.streams import Stream
from vdiff_jax.types import Array, Batch, Params


def linear_path_start(autoencoder: Component, stream: Stream, batches: int = 32) -> Params:
    """The principal components of the first batches where the autoencoder has a linear path, else nothing."""
    if not autoencoder.config.linear_path:
        return {}
    with parallel.on_this_process():
        videos = (stream.device_batch(step)["video"] for step in range(batches))
        linear = principal_components(videos, autoencoder.config)
    return _alike(linear)


def _alike(values: Params) -> Params:
    """The first process's values on every process: all must start alike to the last bit, whatever their machines."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return jax.tree.map(np.asarray, broadcast_one_to_all(values))


def channel_weights(kind: str, autoencoder: Component, params: Params, stream: Stream) -> Array | None:
    """`diffusion.channel_weighting`, measured on the first clips."""
    if kind == "equal":
        return None

    @jax.jit
    def measure(params: Params, batch: Batch) -> Array:
        moments = batch.get("moments")
        if moments is None:
            moments = autoencoder.apply(params, batch["video"], method="encode_moments")
        latents = latents_from_moments(moments, autoencoder.config)
        return pixel_weights(lambda values: autoencoder.apply(params, values, method="decode"), latents)

    with parallel.on_this_process():
        few = {name: value[:4] for name, value in stream.device_batch(0).items()}  # a whole batch may not fit decoded
        weights = np.asarray(measure(parallel.to_host(params), few))
    weights = _alike({"weights": weights})["weights"]
    if not np.isfinite(weights).all():
        raise ValueError("diffusion.channel_weighting=pixels: the autoencoder decodes all latents to the same pixels")
    print(f"latent channels count as {', '.join(f'{weight:.2f}' for weight in weights)}", file=sys.stderr)
    return jnp.asarray(weights)


def latent_statistics(encode: Callable[[Array], Array], stream: Stream, batches: int) -> tuple[list, list]:
    """Mean and standard deviation of the raw latents per channel, over the first batches of the stream."""
    count, total, square = 0, np.zeros(()), np.zeros(())
    for step in range(batches):
        raw = np.asarray(encode(stream.device_batch(step)["video"]), np.float64)
        flat = raw.reshape(-1, raw.shape[-1])
        count, total, square = count + len(flat), total + flat.sum(0), square + np.square(flat).sum(0)
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 1e-12)).tolist()
