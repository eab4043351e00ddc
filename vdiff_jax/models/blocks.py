"""The blocks of the space-time UNet: residual, temporal convolution, spatial and temporal transformer.

All map `[b f h w c] -> [b f h w c']`. Temporal branches end in a zero-initialised layer, so a network with fresh
temporal branches equals the image model it started from, frame by frame.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from vdiff_jax.models.attention import Attention
from vdiff_jax.models.layers import (
    COORDINATE_FEATURES,
    Dense,
    Feedforward,
    FrameConv,
    GroupNorm,
    LayerNorm,
    TemporalConv,
    coordinate_embedding,
)
from vdiff_jax.types import Array, Conditioning


class ResBlock(nnx.Module):
    """Residual 2-D block; with `embedding_features`, the per-frame embedding `[b f e]` is FiLM on its second norm."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        embedding_features: int | None = None,
        *,
        norm_groups: int,
        epsilon: float = 1e-5,
        dtype=jnp.float32,
    ):
        norm: dict[str, Any] = dict(groups=norm_groups, scope="frame", epsilon=epsilon, dtype=dtype)
        self.norm1 = GroupNorm(in_features, **norm)
        self.conv1 = FrameConv(in_features, out_features, dtype=dtype)
        self.film = Dense(embedding_features, 2 * out_features, init_scale=0.0) if embedding_features else None
        self.norm2 = GroupNorm(out_features, **norm)
        self.conv2 = FrameConv(out_features, out_features, init_scale=0.0, dtype=dtype)
        self.shortcut = Dense(in_features, out_features, dtype=dtype) if in_features != out_features else None

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        scale = shift = None
        if self.film is not None and embedding is not None:
            scale, shift = jnp.split(self.film(jax.nn.silu(embedding)), 2, axis=-1)
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h, scale, shift)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class TemporalConvBlock(nnx.Module):
    """`x + conv(silu(video_norm(x)))` with a 3 x 1 x 1 convolution, FiLM by the frame embedding, zero at the start."""

    def __init__(self, features: int, embedding_features: int, *, norm_groups: int, dtype=jnp.float32):
        self.norm = GroupNorm(features, groups=norm_groups, scope="video", epsilon=1e-5, dtype=dtype)
        self.film = Dense(embedding_features, 2 * features, init_scale=0.0)
        self.conv = TemporalConv(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, embedding: Array) -> Array:
        scale, shift = jnp.split(self.film(jax.nn.silu(embedding)), 2, axis=-1)
        return x + self.conv(jax.nn.silu(self.norm(x, scale, shift)))


class TransformerLayer(nnx.Module):
    """Pre-norm transformer layer on tokens `[b n d]`: self-attention, cross-attention if asked, feed-forward."""

    def __init__(self, features: int, *, text_features: int | None, head_dim: int, implementation: str, dtype):
        attention: dict[str, Any] = dict(head_dim=head_dim, implementation=implementation, dtype=dtype)
        self.norm1 = LayerNorm(features, dtype=dtype)
        self.attn1 = Attention(features, **attention)
        self.norm2 = LayerNorm(features, dtype=dtype) if text_features else None
        self.attn2 = Attention(features, context_features=text_features, **attention) if text_features else None
        self.norm3 = LayerNorm(features, dtype=dtype)
        self.feedforward = Feedforward(features, expansion=2, dtype=dtype)

    def attend(
        self,
        tokens: Array,
        *,
        position: Array | None = None,
        mask: Array | None = None,
        style_weight: Array | None = None,
    ) -> Array:
        normed = self.norm1(tokens)
        return tokens + self.attn1(normed, position=position, mask=mask, style_weight=style_weight)

    def cross(self, tokens: Array, text: Array, text_mask: Array | None) -> Array:
        assert self.attn2 is not None and self.norm2 is not None
        mask = None if text_mask is None else text_mask[:, None, None, :]
        return tokens + self.attn2(self.norm2(tokens), text, mask=mask)

    def feed(self, tokens: Array) -> Array:
        return tokens + self.feedforward(self.norm3(tokens))


class SpatialTransformer(nnx.Module):
    """Self-attention within each frame and cross-attention to the prompt, residual outside.

    coordinates: tokens know where in the frame they stand, see `layers.coordinate_embedding`. Where `cond` has a
    `style_weight`, frame t of a row shares its self-attention with frame t of the row's style.
    """

    def __init__(
        self,
        features: int,
        *,
        text_features: int | None,
        coordinates: bool,
        head_dim: int,
        norm_groups: int,
        implementation: str,
        dtype,
    ):
        self.norm = GroupNorm(features, groups=norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.proj_in = Dense(features, features, dtype=dtype)
        self.position = Dense(COORDINATE_FEATURES, features, use_bias=False, dtype=dtype) if coordinates else None
        self.layer = TransformerLayer(
            features, text_features=text_features, head_dim=head_dim, implementation=implementation, dtype=dtype
        )
        self.proj_out = Dense(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, cond: Conditioning) -> Array:
        batch, num_frames, height, width, _ = x.shape
        tokens = self.proj_in(self.norm(x))
        if self.position is not None:
            tokens = tokens + self.position(coordinate_embedding(height, width))[None, None]
        tokens = rearrange(tokens, "b f h w c -> (b f) (h w) c")
        weight = None if cond.style_weight is None else jnp.repeat(cond.style_weight, num_frames)
        tokens = self.layer.attend(tokens, style_weight=weight)
        if cond.text is not None and self.layer.attn2 is not None:
            # All tokens of a clip share the prompt: one long query instead of a text copy per frame.
            tokens = rearrange(tokens, "(b f) n c -> b (f n) c", b=batch)
            tokens = self.layer.cross(tokens, cond.text, cond.text_mask)
        tokens = self.layer.feed(tokens)
        return x + self.proj_out(tokens.reshape(batch, num_frames, height, width, -1))


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

    def __call__(self, x: Array, times: Array) -> Array:
        _, _, height, width, _ = x.shape
        tokens = rearrange(self.proj_in(self.norm(x)), "b f h w c -> (b h w) f c")
        tokens = self.layer.attend(tokens, position=repeat(times, "b f -> (b n) f", n=height * width))
        tokens = self.layer.feed(tokens)
        return x + self.proj_out(rearrange(tokens, "(b h w) f c -> b f h w c", h=height, w=width))


class SpaceTimeBlock(nnx.Module):
    """Residual block, temporal convolution, then (where `attention`) spatial and temporal transformer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        embedding_features: int,
        text_features: int | None,
        coordinates: bool,
        attention: bool,
        head_dim: int,
        norm_groups: int,
        implementation: str,
        dtype,
    ):
        shared: dict[str, Any] = dict(norm_groups=norm_groups, dtype=dtype)
        self.res = ResBlock(in_features, out_features, embedding_features, **shared)
        self.temporal_conv = TemporalConvBlock(out_features, embedding_features, **shared)
        heads: dict[str, Any] = dict(head_dim=head_dim, implementation=implementation, **shared)
        prompt: dict[str, Any] = dict(text_features=text_features, coordinates=coordinates)
        self.spatial = SpatialTransformer(out_features, **prompt, **heads) if attention else None
        self.temporal = TemporalTransformer(out_features, **heads) if attention else None

    def __call__(self, x: Array, embedding: Array, cond: Conditioning) -> Array:
        x = self.temporal_conv(self.res(x, embedding), embedding)
        if self.spatial is not None and self.temporal is not None:
            x = self.temporal(self.spatial(x, cond), cond.times)
        return x
