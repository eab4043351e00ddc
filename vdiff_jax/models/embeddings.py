"""What a UNet is told beside `z`, as features: levels, time stamps, prompts, images.

`FrameEmbedding` and `PromptLayout` are those of our own networks; `StepEmbedding` and `ImageContext` of public ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from vdiff_jax.models import frame_axis
from vdiff_jax.models.attention import Attention
from vdiff_jax.models.layers import (
    COORDINATE_FEATURES,
    Dense,
    FrameConv,
    LayerNorm,
    coordinate_embedding,
    sinusoidal_embedding,
)
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.types import Array, Conditioning, Latents, LogSNR

TIME_FEATURES = 64


def time_embedding(cond: Conditioning) -> Array:
    """`[b f 3 * 64]`: sinusoids of the time from the middle of the window and of the gaps to both neighbours.

    Shifting a clip in time changes nothing. A single frame has gaps of zero. Of a clip split over devices (see
    `frame_axis`), only the frames that are here.
    """
    times = jnp.asarray(cond.times, jnp.float32)
    gaps = jnp.diff(times, axis=1)
    first, last = (gaps[:, :1], gaps[:, -1:]) if times.shape[1] > 1 else (jnp.zeros_like(times),) * 2
    stamps = jnp.stack(
        [
            times - times.mean(axis=1, keepdims=True, where=cond.valid),
            jnp.concatenate([first, gaps], axis=1),
            jnp.concatenate([gaps, last], axis=1),
        ],
        axis=-1,
    )
    stamps = frame_axis.here(stamps)
    return sinusoidal_embedding(stamps, TIME_FEATURES, max_period=200.0).reshape(*stamps.shape[:2], -1)


def pool_text(text: Array, text_mask: Array | None) -> Array:
    """`[b n d] -> [b d]`: sum over the tokens by the root of their number, so one word is not lost in a long prompt."""
    mask = jnp.ones(text.shape[:2]) if text_mask is None else text_mask.astype(jnp.float32)
    return (text * mask[..., None]).sum(1) / jnp.sqrt(jnp.maximum(mask.sum(1, keepdims=True), 1.0))


class FrameEmbedding(nnx.Module):
    """`[b f e]`: noise level, time stamp, gaps to the neighbour frames, pooled prompt.

    The level enters as `u = 2/pi atan(exp(-logsnr/2))` in [0, 1] (the angle of the VP process), times 1000.
    """

    def __init__(self, config: UNetConfig):
        features, hidden = 64, config.embedding_features
        self.level = Dense(features, hidden)
        self.time = Dense(3 * TIME_FEATURES, hidden)
        self.text = Dense(config.text_features, hidden) if config.text_features else None
        self.hidden = Dense(hidden, hidden)
        self.features = features

    def __call__(self, logsnr: LogSNR, cond: Conditioning) -> Array:
        angle = jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -40.0, 40.0))) * (2.0 / jnp.pi)
        hidden = self.level(sinusoidal_embedding(1000.0 * angle, self.features)) + self.time(time_embedding(cond))
        if self.text is not None and cond.text is not None:
            hidden = hidden + self.text(pool_text(cond.text, cond.text_mask))[:, None]
        return self.hidden(jax.nn.silu(hidden))


class PromptLayout(nnx.Module):
    """`[b f h w r]`: what the prompt says about where things are when, as input channels.

        layout_r(t, y, x) = prompt_r * time_r(t) * place_r(y, x)

    "Moving left" means right of the middle early and left of it late. Prompt, time and place say nothing about that
    one by one or two by two, so a network that is given them one by one starts without a slope towards their product:
    ours saw 93 thousand clips and never followed a direction. Given products to choose from, it does so first of all.
    """

    def __init__(self, config: UNetConfig):
        assert config.text_features is not None
        self.prompt = Dense(config.text_features, config.layout_features)
        self.time = Dense(3 * TIME_FEATURES, config.layout_features)
        self.place = Dense(COORDINATE_FEATURES, config.layout_features)
        self.features = config.layout_features

    def __call__(self, cond: Conditioning, shape: tuple[int, ...]) -> Array:
        """shape: `(b, f, h, w, ...)` of the latents. Zero without a prompt."""
        if cond.text is None:
            return jnp.zeros((*shape[:4], self.features))
        wanted = self.prompt(pool_text(cond.text, cond.text_mask))[:, None] * self.time(time_embedding(cond))
        return wanted[:, :, None, None] * self.place(coordinate_embedding(shape[2], shape[3]))[None, None]


class StepEmbedding(nnx.Module):
    """`[b f e]`: the checkpoint's own timestep, and the numbers in `cond.added`, each as sinusoids through an MLP."""

    def __init__(self, config: UNetConfig):
        dtype, hidden = jnp.dtype(config.dtype), config.embedding_features
        self.features, self.added_features = config.channels[0], config.added_features
        self.time_in = Dense(self.features, hidden, dtype=dtype)
        self.time_out = Dense(hidden, hidden, dtype=dtype)
        added = config.added_count * config.added_features
        self.added_in = Dense(added, hidden, dtype=dtype) if added else None
        self.added_out = Dense(hidden, hidden, dtype=dtype) if added else None
        self.added_count = config.added_count

    def __call__(self, timestep: Array, cond: Conditioning) -> Array:
        """timestep: `[b f]`. Raises ValueError if the network wants numbers that `cond.added` does not hold."""
        embedding = self.time_out(jax.nn.silu(self.time_in(sinusoidal_embedding(timestep, self.features))))
        if self.added_in is None or self.added_out is None:
            return embedding
        if cond.added is None or cond.added.shape[1] != self.added_count:
            raise ValueError(f"this network needs {self.added_count} numbers per clip in cond.added (fps and the like)")
        added = sinusoidal_embedding(cond.added, self.added_features).reshape(len(cond.added), -1)
        return embedding + self.added_out(jax.nn.silu(self.added_in(added)))[:, None]


class ImageContext(nnx.Module):
    """The image to animate as I2VGen-XL reads it (Zhang et al. 2023): input channels, tokens beside the prompt's."""

    def __init__(self, config: UNetConfig):
        assert config.text_features is not None
        c, text, dtype = config.latent_channels, config.text_features, jnp.dtype(config.dtype)
        self.features, self.text_features = c, text
        self.input_convs = nnx.List(
            [
                FrameConv(i, o, dtype=dtype)
                for i, o in ((config.conditioning_channels, 4 * c), (4 * c, 4 * c), (4 * c, c))
            ]
        )
        self.norm = LayerNorm(c, dtype=dtype)
        self.attention = Attention(c, heads=2, head_dim=c, implementation=config.attention_implementation, dtype=dtype)
        self.proj_in = Dense(c, 4 * c, dtype=dtype)
        self.proj_out = Dense(4 * c, c, dtype=dtype)
        self.token_convs = nnx.List(
            [
                FrameConv(config.conditioning_channels, 8 * c, dtype=dtype),
                FrameConv(8 * c, 16 * c, stride=2, dtype=dtype),
                FrameConv(16 * c, text, stride=2, dtype=dtype),
            ]
        )
        self.embedding_in = Dense(text, config.embedding_features, dtype=dtype)
        self.embedding_out = Dense(config.embedding_features, text * c, dtype=dtype)

    def __call__(self, cond: Conditioning) -> tuple[Array, Conditioning]:
        """Input channels `[b f h w c]`, and the conditioning with the image's tokens after those of the prompt.

        Raises ValueError without `cond.image_latents`, `cond.image_embedding` or a prompt.
        """
        if cond.image_latents is None or cond.image_embedding is None or cond.text is None:
            raise ValueError("this network animates an image: it needs cond.text, .image_latents and .image_embedding")
        channels = self._channels(cond.image_latents, cond.valid)
        first, second, third = self.token_convs
        x = jax.nn.silu(first(frame_axis.first_frame(cond.image_latents)))
        x = third(jax.nn.silu(second(adaptive_mean(x, 32))))
        tokens = rearrange(x, "b 1 h w c -> b (h w) c")
        extra = self.embedding_out(jax.nn.silu(self.embedding_in(cond.image_embedding)))
        extra = extra.reshape(len(extra), self.features, self.text_features)
        text = jnp.concatenate([cond.text, tokens, extra], axis=1)
        mask = cond.text_mask
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, text.shape[1] - mask.shape[1])), constant_values=True)
        return channels, dataclasses.replace(cond, text=text, text_mask=mask)

    def _channels(self, image_latents: Latents, valid: Array | None) -> Array:
        first, second, third = self.input_convs
        x = third(jax.nn.silu(second(jax.nn.silu(first(image_latents)))))
        tokens = frame_axis.to_pixels(x)
        tokens = tokens + self.attention(self.norm(tokens), mask=frame_axis.attention_mask(valid, tokens))
        tokens = tokens + self.proj_out(jax.nn.gelu(self.proj_in(tokens), approximate=False))
        return frame_axis.to_frames(tokens, x)


def adaptive_mean(x: Array, size: int) -> Array:
    """`[b f h w c] -> [b f size size c]`: means over windows that cover the frame evenly, overlapping where they must.

    Window i of n over a side of m tokens is floor(i m / n) .. ceil((i + 1) m / n), as torch pools adaptively.
    """

    def windows(length: int) -> Array:
        index = np.arange(size)
        start, stop = index * length // size, -((-(index + 1) * length) // size)
        inside = (np.arange(length) >= start[:, None]) & (np.arange(length) < stop[:, None])
        return jnp.asarray(inside / (stop - start)[:, None], x.dtype)

    return jnp.einsum("bfhwc,yh,xw->bfyxc", x, windows(x.shape[2]), windows(x.shape[3]))
