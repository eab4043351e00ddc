"""The blocks that mix frames: convolutions, attention over time, and mixtures of both with what one frame says.

All map `[b f h w c] -> [b f h w c]`; frames that are not `valid [b f]` change nothing in the others (`frame_axis`).
Temporal branches of new networks end in a zero-initialised layer, so a network with fresh ones equals the image model
it started from, frame by frame.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vdiff_jax.models import frame_axis
from vdiff_jax.models.blocks import TransformerLayer, spatial_layer
from vdiff_jax.models.functional import parameter
from vdiff_jax.models.layers import (
    Dense,
    Feedforward,
    GroupNorm,
    LayerNorm,
    Scope,
    TemporalConv,
    sinusoidal_embedding,
)
from vdiff_jax.types import Array, Conditioning


class TemporalConvBlock(nnx.Module):
    """`x + conv(silu(video_norm(x)))` with a 3 x 1 x 1 convolution, FiLM by the frame embedding, zero at the start."""

    def __init__(self, features: int, embedding_features: int, *, norm_groups: int, dtype=jnp.float32):
        self.norm = GroupNorm(features, groups=norm_groups, scope="video", epsilon=1e-5, dtype=dtype)
        self.film = Dense(embedding_features, 2 * features, init_scale=0.0)
        self.conv = TemporalConv(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, embedding: Array, *, valid: Array | None = None) -> Array:
        scale, shift = jnp.split(self.film(jax.nn.silu(embedding)), 2, axis=-1)
        return x + self.conv(jax.nn.silu(self.norm(x, scale, shift, valid=valid)), valid)


class TemporalConvStack(nnx.Module):
    """`x + conv4(conv3(conv2(conv1(x))))`, each `conv(silu(video_norm(x)))`, the last zero at the start.

    ModelScope's temporal convolution (Wang et al. 2023): the embedding of the frame does not enter it.
    """

    def __init__(self, features: int, *, norm_groups: int, dtype=jnp.float32):
        norm: dict[str, Any] = dict(groups=norm_groups, scope="video", epsilon=1e-5, dtype=dtype)
        self.norms = nnx.List([GroupNorm(features, **norm) for _ in range(4)])
        scales = (1.0, 1.0, 1.0, 0.0)
        self.convs = nnx.List([TemporalConv(features, features, init_scale=scale, dtype=dtype) for scale in scales])

    def __call__(self, x: Array, embedding: Array, *, valid: Array | None = None) -> Array:
        h = x
        for norm, conv in zip(self.norms, self.convs):
            h = conv(jax.nn.silu(norm(h, valid=valid)), valid)
        return x + h


class TemporalResBlock(nnx.Module):
    """Residual block of 3 x 1 x 1 convolutions and norms over the whole clip; the frame's embedding is added."""

    def __init__(
        self,
        features: int,
        embedding_features: int | None = None,
        *,
        norm_groups: int,
        epsilon: float,
        dtype=jnp.float32,
    ):
        norm: dict[str, Any] = dict(groups=norm_groups, scope="video", epsilon=epsilon, dtype=dtype)
        self.norm1 = GroupNorm(features, **norm)
        self.conv1 = TemporalConv(features, features, dtype=dtype)
        self.time = Dense(embedding_features, features, dtype=dtype) if embedding_features else None
        self.norm2 = GroupNorm(features, **norm)
        self.conv2 = TemporalConv(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, embedding: Array | None = None, *, valid: Array | None = None) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x, valid=valid)), valid)
        if self.time is not None and embedding is not None:
            h = h + self.time(jax.nn.silu(embedding))[:, :, None, None]
        return x + self.conv2(jax.nn.silu(self.norm2(h, valid=valid)), valid)


class FrameMixer(nnx.Module):
    """`s * spatial + (1 - s) * temporal` with a learned share s = sigmoid(mix_factor) (Blattmann et al. 2023).

    reverse: the share is that of the temporal branch, as in the decoder of Stable Video Diffusion.
    """

    def __init__(self, *, initial: float = 0.5, reverse: bool = False):
        self.mix_factor = parameter((1,), fill=initial)
        self.reverse = reverse

    def __call__(self, spatial: Array, temporal: Array) -> Array:
        share = jax.nn.sigmoid(self.mix_factor[...].astype(jnp.float32))[0]
        share = 1.0 - share if self.reverse else share
        return (share * spatial + (1.0 - share) * temporal).astype(spatial.dtype)


class MixedConvBlock(nnx.Module):
    """What follows a residual block in Stable Video Diffusion: a temporal one, mixed with what came in."""

    def __init__(
        self,
        features: int,
        embedding_features: int | None = None,
        *,
        norm_groups: int,
        epsilon: float,
        initial: float = 0.5,
        reverse: bool = False,
        dtype=jnp.float32,
    ):
        self.res = TemporalResBlock(features, embedding_features, norm_groups=norm_groups, epsilon=epsilon, dtype=dtype)
        self.mixer = FrameMixer(initial=initial, reverse=reverse)

    def __call__(self, x: Array, embedding: Array | None = None, *, valid: Array | None = None) -> Array:
        return self.mixer(x, self.res(x, embedding, valid=valid))


class TemporalTransformer(nnx.Module):
    """Self-attention over frames at each pixel, positions are the real time stamps `[b f]`; zero at the start.

    It is not shared with a style: what it carries is motion, and a style image stands still.
    """

    def __init__(self, features: int, *, head_dim: int, norm_groups: int, implementation: str, dtype):
        self.norm = GroupNorm(features, groups=norm_groups, scope="video", epsilon=1e-6, dtype=dtype)
        self.proj_in = Dense(features, features, dtype=dtype)
        self.layer = TransformerLayer(
            features, text_features=None, head_dim=head_dim, implementation=implementation, dtype=dtype
        )
        self.proj_out = Dense(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, times: Array, valid: Array | None = None) -> Array:
        tokens = frame_axis.to_pixels(self.proj_in(self.norm(x, valid=valid)))
        mask = frame_axis.attention_mask(valid, tokens)
        tokens = self.layer.attend(tokens, position=frame_axis.per_pixel(times, tokens), mask=mask)
        tokens = self.layer.feed(tokens)
        return x + self.proj_out(frame_axis.to_frames(tokens, x))


class MotionTransformer(nnx.Module):
    """The temporal transformer of ModelScope (Wang et al. 2023) and AnimateDiff (Guo et al. 2024): two self-attentions.

    features: of the input; its tokens have heads * head_dim. positions: length of the sinusoidal table of frame numbers
    that is added before each attention, 0 for none. scope: of the norm; diffusers takes its statistics over the clip,
    AnimateDiff's own code over each frame, with the same weights.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_dim: int,
        norm_groups: int,
        implementation: str,
        dtype,
        layers: int = 1,
        positions: int = 0,
        scope: Scope = "video",
    ):
        width = heads * head_dim
        self.norm = GroupNorm(features, groups=norm_groups, scope=scope, epsilon=1e-6, dtype=dtype)
        self.proj_in = Dense(features, width, dtype=dtype)
        self.layers = nnx.List(
            [
                TransformerLayer(
                    width,
                    text_features=None,
                    head_dim=head_dim,
                    implementation=implementation,
                    self_attentions=2,
                    expansion=4,
                    dtype=dtype,
                )
                for _ in range(layers)
            ]
        )
        self.proj_out = Dense(width, features, init_scale=0.0, dtype=dtype)
        self.positions = positions

    def __call__(self, x: Array, times: Array, valid: Array | None = None) -> Array:
        """times is not read: these networks know the number of a frame only.

        Raises ValueError for more frames than the table of positions has.
        """
        num_frames = times.shape[1]
        if self.positions and num_frames > self.positions:
            raise ValueError(
                f"{num_frames} frames are more than the {self.positions} that this motion module has positions for: "
                "generate fewer at once, and longer clips in windows (extend)"
            )
        tokens = frame_axis.to_pixels(self.proj_in(self.norm(x, valid=valid)))
        mask = frame_axis.attention_mask(valid, tokens)
        position = None
        if self.positions:
            position = interleaved_sinusoids(num_frames, tokens.shape[-1])[None].astype(tokens.dtype)
        for layer in self.layers:
            tokens = layer.attend(tokens, added_position=position, mask=mask)
            tokens = layer.feed(layer.attend_again(tokens, added_position=position, mask=mask))
        return x + self.proj_out(frame_axis.to_frames(tokens, x))


def interleaved_sinusoids(length: int, features: int) -> Array:
    """`[n d]`: sine and cosine in turn, `sin(n / 10000^(2i/d)), cos(...)` (Vaswani et al. 2017)."""
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, features)


class MixedLayer(nnx.Module):
    """A transformer layer over frames: feed-forward, self-attention, attention to the prompt, feed-forward."""

    def __init__(self, features: int, *, text_features: int | None, head_dim: int, implementation: str, dtype):
        self.norm_in = LayerNorm(features, dtype=dtype)
        self.feedforward_in = Feedforward(features, dtype=dtype)
        self.layer = TransformerLayer(
            features,
            text_features=text_features,
            head_dim=head_dim,
            implementation=implementation,
            expansion=4,
            dtype=dtype,
        )

    def __call__(self, tokens: Array, cond: Conditioning) -> Array:
        """`[(b n) f d]`, n pixels of a clip; every one reads the same prompt."""
        batch = cond.times.shape[0]
        tokens = tokens + self.feedforward_in(self.norm_in(tokens))
        return spatial_layer(self.layer, tokens, cond, batch, mask=frame_axis.attention_mask(cond.valid, tokens))


class MixedTransformer(nnx.Module):
    """Spatial and temporal transformer layers in turn, mixed, between one pair of projections (Stable Video Diffusion).

    Frames are known by their number, through a small network of its sinusoid.
    """

    def __init__(
        self,
        features: int,
        *,
        text_features: int | None,
        head_dim: int,
        norm_groups: int,
        implementation: str,
        dtype,
        layers: int = 1,
    ):
        heads: dict[str, Any] = dict(
            text_features=text_features, head_dim=head_dim, implementation=implementation, dtype=dtype
        )
        self.norm = GroupNorm(features, groups=norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.proj_in = Dense(features, features, dtype=dtype)
        self.layers = nnx.List([TransformerLayer(features, expansion=4, **heads) for _ in range(layers)])
        self.temporal_layers = nnx.List([MixedLayer(features, **heads) for _ in range(layers)])
        self.position_in = Dense(features, 4 * features, dtype=dtype)
        self.position_out = Dense(4 * features, features, dtype=dtype)
        self.mixer = FrameMixer()
        self.proj_out = Dense(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, cond: Conditioning) -> Array:
        batch, num_frames, height, width, features = x.shape
        tokens = rearrange(self.proj_in(self.norm(x)), "b f h w c -> (b f) (h w) c")
        position = frame_axis.here(jnp.arange(cond.times.shape[1])[None])
        position = sinusoidal_embedding(position[0], features)
        position = self.position_out(jax.nn.silu(self.position_in(position)))
        position = jnp.tile(position, (batch, 1))[:, None]
        weight = None if cond.style_weight is None else jnp.repeat(cond.style_weight, num_frames)
        for layer, temporal_layer in zip(self.layers, self.temporal_layers):
            tokens = spatial_layer(layer, tokens, cond, batch, weight)
            over_time = frame_axis.to_pixels((tokens + position).reshape(x.shape))
            over_time = frame_axis.to_frames(temporal_layer(over_time, cond), x)
            tokens = self.mixer(tokens, over_time.reshape(tokens.shape))
        return x + self.proj_out(tokens.reshape(batch, num_frames, height, width, features))
