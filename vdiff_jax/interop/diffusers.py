"""One network of a public checkpoint as a plain function, for those who bring their own pipeline.

    apply, params = load_unet("text-to-video-ms-1.7b/unet")
    prediction = jax.jit(apply)(params, z, timestep, context)

Arrays are `[b f h w c]`; timesteps, predictions and scales are the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vdiff_jax.interop import autoencoders, transformers, unets
from vdiff_jax.types import Array, Conditioning, Latents, Params

Loaded = tuple[Callable[..., Any], Params]


def load_unet(folder: str | Path, dtype: str | None = None, *, shardings: Any = None, **options: Any) -> Loaded:
    """A UNet folder -> `(apply, params)`.

        apply(params, z [b f h w c], timestep [b], context [b n d], *, image_latents=None [b f h w c],
              image_embedding=None [b d], added=None [b k]) -> prediction [b f h w c] f32

    z: what the checkpoint's scheduler hands to its network (`scale_model_input`), on the variance-preserving scale.
    timestep: the checkpoint's: 0..999, or `ln(sigma) / 4` for Stable Video Diffusion. context: tokens of a prompt, or
        the image's embedding as one token. The others are read by image-to-video networks, see `types.Conditioning`.
    dtype: of parameters and computation; None = float32. shardings: see `interop.weights.Reading`. options: `variant`
        and fields of `UNetConfig`, see `interop.unets.load_unet`.

    Raises FileNotFoundError for a missing file, ValueError for a network that is not built or weights that do not fit.
    """
    component, params = unets.load_unet(folder, dtype, reading={"shardings": shardings}, **options)

    def apply(
        params: Params,
        z: Latents,
        timestep: Array,
        context: Array,
        *,
        image_latents: Array | None = None,
        image_embedding: Array | None = None,
        added: Array | None = None,
    ) -> Latents:
        shape = z.shape[:2]
        times = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.float32)[None], shape)
        cond = Conditioning(context, None, times, None, image_latents, image_embedding, added)
        level = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32).reshape(-1, 1), shape)
        unread = jnp.zeros((*z.shape[:4], 1)), jnp.zeros(shape)  # of what is known, these networks read nothing
        return component.apply(params, z, level, *unread, cond)

    return apply, params


def load_autoencoder(folder: str | Path, dtype: str | None = None, **options: Any) -> tuple[Loaded, Loaded]:
    """An autoencoder folder -> `((encode, params), (decode, params))`, the same parameters twice.

        encode(params, video [b f h w 3], noise=None) -> latents [b f h/8 w/8 c], scaled as the UNet reads them
        decode(params, latents) -> video [b f h w 3]

    video is f32 in [-1, 1]; noise of unit variance draws from the posterior, None takes its mean.
    """
    component, params = autoencoders.load_autoencoder(folder, dtype, **options)

    def encode(params: Params, video: Array, noise: Array | None = None) -> Latents:
        return component.apply(params, video, noise, method="encode")

    def decode(params: Params, latents: Latents) -> Array:
        return component.apply(params, latents, method="decode")

    return (encode, params), (decode, params)


def load_text_encoder(folder: str | Path, dtype: str | None = None, **options: Any) -> Loaded:
    """A CLIP, T5 or BERT folder -> `(apply, params)`: `apply(params, tokens [b n] i32, mask [b n]) -> [b n d] f32`."""
    component, params = transformers.load_text_encoder(folder, dtype, **options)
    return component.apply, params


def load_image_encoder(folder: str | Path, dtype: str | None = None, **options: Any) -> Loaded:
    """A CLIP vision folder -> `(apply, params)`: `apply(params, pixels [b h w 3]) -> embedding [b d]`.

    pixels: as `models.clip_pixels.clip_pixels` makes them.
    """
    component, params = transformers.load_image_encoder(folder, dtype, **options)
    return component.apply, params
