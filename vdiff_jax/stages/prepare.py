"""From raw batches to what the diffusion loss reads: latents, features of prompts, the picture a clip begins with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vdiff_jax import parallel
from vdiff_jax.components import Component
from vdiff_jax.lora_stage import shifted
from vdiff_jax.models.autoencoder import latents_from_moments, sample_moments
from vdiff_jax.models.clip_pixels import clip_pixels
from vdiff_jax.recipe import PictureConfig
from vdiff_jax.stages.networks import Networks
from vdiff_jax.training.step import sample_keys
from vdiff_jax.types import Array, Batch, Params

Prepare = Callable[[Params, Batch, Array], Batch]
SHIFT_STREAM, PICTURE_STREAM = 1, 2


def make_prepare(networks: Networks, picture: PictureConfig, fps: float, shift: int = 0) -> Prepare:
    """`(fixed params, batch, keys [b]) -> batch`, jitted.

    Pixels (or cached moments) become final latents; prompts features where the text encoder is fixed; the first frame,
    where there is an image encoder, what Stable Video Diffusion reads of it. fps: of frames a native interval apart.
    shift: see `lora_stage.shifted`.
    """
    autoencoder = networks.components["autoencoder"]
    text = networks.components.get("text_encoder") if "text_encoder" in networks.fixed else None
    encoder = networks.components.get("image_encoder")

    @jax.jit
    def prepare(fixed: Params, batch: Batch, keys: Array) -> Batch:
        batch = dict(batch)
        moments = batch.pop("moments", None)
        if moments is None:
            video = batch.pop("video")
            if shift:
                video = shifted(video, _stream(keys, SHIFT_STREAM), shift)
            moments = autoencoder.apply(fixed["autoencoder"], video, method="encode_moments")
            if encoder is not None:
                shown = video[:, 0], _rate(batch["times"], fps), _stream(keys, PICTURE_STREAM)
                batch |= first_frame(autoencoder, encoder, fixed, *shown, picture)
        shape = (*moments.shape[1:-1], moments.shape[-1] // 2)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        batch["latents"] = latents_from_moments(moments, autoencoder.config, noise)
        if text is not None:
            batch["text"] = text.apply(fixed["text_encoder"], batch.pop("tokens"), batch["token_mask"])
        return batch

    return prepare


def first_frame(
    autoencoder: Component,
    encoder: Component,
    fixed: Params,
    image: Array,
    fps: Array,
    keys: Array,
    config: PictureConfig,
) -> dict[str, Array]:
    """What Stable Video Diffusion is told of pictures `[b h w 3]` in -1..1.

    fps: `[b]`, of the clips. Returns `image_latents [b h w c]`, the mode in raw scale of the picture with noise of a
    random deviation; `image_embedding [b d]` of the picture without; `added [b 3]`: fps - 1, motion bucket, deviation.
    """
    parts = jax.vmap(jax.random.split)(keys)
    deviation = jnp.exp(config.noise_mean + config.noise_std * jax.vmap(jax.random.normal)(parts[:, 0]))
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(parts[:, 1])
    noisy = image + deviation[:, None, None, None] * noise
    moments = autoencoder.apply(fixed["autoencoder"], noisy[:, None], method="encode_moments")
    embedding = encoder.apply(fixed["image_encoder"], clip_pixels(image, encoder.config.image_size))
    bucket = jnp.full_like(deviation, config.motion_bucket)
    return {
        "image_latents": sample_moments(moments)[:, 0],
        "image_embedding": embedding,
        "added": jnp.stack([fps - 1.0, bucket, deviation], axis=1),
    }


def _rate(times: Array, fps: float) -> Array:
    """Frames a second `[b]` of windows with time stamps `times [b f]` in native intervals; of images, `fps`."""
    if times.shape[1] == 1:
        return jnp.full(len(times), fps)
    gap = times[:, 1] - times[:, 0]  # 0 where an image was filled up
    return jnp.where(gap > 0, fps / jnp.where(gap > 0, gap, 1.0), fps)


def _stream(keys: Array, number: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def batch_keys(key: Array, batch_size: int, mesh: Mesh) -> Array:
    """`[batch_size]`, split as the batch is."""
    return _make_batch_keys(batch_size, parallel.batch_sharding(mesh))(key)


@functools.lru_cache(maxsize=16)
def _make_batch_keys(batch_size: int, sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda key: sample_keys(key, batch_size), out_shardings=sharding)
