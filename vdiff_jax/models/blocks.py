"""The blocks that see one frame at a time: residual block, transformer layer, spatial transformer.

All map `[b f h w c] -> [b f h w c']`; `temporal.py` has their counterparts over frames.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vdiff_jax.models.attention import Attention
from vdiff_jax.models.layers import (
    COORDINATE_FEATURES,
    Dense,
    Feedforward,
    FrameConv,
    GroupNorm,
    LayerNorm,
    Scope,
    coordinate_embedding,
)
from vdiff_jax.types import Array, Conditioning

Modulation = Literal["film", "add"]


class ResBlock(nnx.Module):
    """Residual 2-D block (He et al. 2016, as in Rombach et al. 2022).

    With `embedding_features` a per-frame embedding `[b f e]` acts on it: "film" scales and shifts what the second norm
    gives, "add" is added to what goes into it, as public image and video UNets have it. scope: of both norms.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        embedding_features: int | None = None,
        *,
        norm_groups: int,
        epsilon: float = 1e-5,
        modulation: Modulation = "film",
        scope: Scope = "frame",
        dtype=jnp.float32,
    ):
        norm: dict[str, Any] = dict(groups=norm_groups, scope=scope, epsilon=epsilon, dtype=dtype)
        film, add = (embedding_features if modulation == kind else None for kind in ("film", "add"))
        self.norm1 = GroupNorm(in_features, **norm)
        self.conv1 = FrameConv(in_features, out_features, dtype=dtype)
        self.film = Dense(film, 2 * out_features, init_scale=0.0) if film else None
        self.time = Dense(add, out_features, dtype=dtype) if add else None
        self.norm2 = GroupNorm(out_features, **norm)
        self.conv2 = FrameConv(out_features, out_features, init_scale=0.0, dtype=dtype)
        self.shortcut = Dense(in_features, out_features, dtype=dtype) if in_features != out_features else None

    def __call__(self, x: Array, embedding: Array | None = None, *, valid: Array | None = None) -> Array:
        scale = shift = None
        if self.film is not None and embedding is not None:
            scale, shift = jnp.split(self.film(jax.nn.silu(embedding)), 2, axis=-1)
        h = self.conv1(jax.nn.silu(self.norm1(x, valid=valid)))
        if self.time is not None and embedding is not None:
            h = h + self.time(jax.nn.silu(embedding))[:, :, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h, scale, shift, valid=valid)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class TransformerLayer(nnx.Module):
    """Pre-norm transformer layer on tokens `[b n d]`: self-attention, a second attention if asked, feed-forward.

    text_features: the second attention reads tokens of this width. self_attentions=2: it is self-attention again, as in
    the temporal layers of ModelScope and AnimateDiff. expansion: width of the feed-forward in units of `features`.
    """

    def __init__(
        self,
        features: int,
        *,
        text_features: int | None,
        head_dim: int,
        implementation: str,
        dtype,
        self_attentions: int = 1,
        expansion: int = 2,
    ):
        attention: dict[str, Any] = dict(head_dim=head_dim, implementation=implementation, dtype=dtype)
        second = text_features is not None or self_attentions == 2
        self.norm1 = LayerNorm(features, dtype=dtype)
        self.attn1 = Attention(features, **attention)
        self.norm2 = LayerNorm(features, dtype=dtype) if second else None
        self.attn2 = Attention(features, context_features=text_features, **attention) if second else None
        self.norm3 = LayerNorm(features, dtype=dtype)
        self.feedforward = Feedforward(features, expansion=expansion, dtype=dtype)

    def attend(
        self,
        tokens: Array,
        *,
        position: Array | None = None,
        added_position: Array | None = None,
        mask: Array | None = None,
        style_weight: Array | None = None,
    ) -> Array:
        """position: real numbers for rotary embedding. added_position: `[1 n d]`, added to what attention sees."""
        normed = self.norm1(tokens)
        normed = normed if added_position is None else normed + added_position
        return tokens + self.attn1(normed, position=position, mask=mask, style_weight=style_weight)

    def attend_again(self, tokens: Array, *, added_position: Array | None = None, mask: Array | None = None) -> Array:
        assert self.attn2 is not None and self.norm2 is not None
        normed = self.norm2(tokens)
        return tokens + self.attn2(normed if added_position is None else normed + added_position, mask=mask)

    def cross(self, tokens: Array, text: Array, text_mask: Array | None) -> Array:
        assert self.attn2 is not None and self.norm2 is not None
        mask = None if text_mask is None else text_mask[:, None, None, :]
        return tokens + self.attn2(self.norm2(tokens), text, mask=mask)

    def feed(self, tokens: Array) -> Array:
        return tokens + self.feedforward(self.norm3(tokens))


class SpatialTransformer(nnx.Module):
    """Self-attention within each frame and cross-attention to the prompt, residual outside.

    coordinates: tokens know where in the frame they stand, see `layers.coordinate_embedding`. Where `cond` has a
    `style_weight`, frame t of a row shares its self-attention with frame t of the row's style. layers: how many
    transformer layers stand between `proj_in` and `proj_out`; with more than one they are a list, `layers.0`, ...
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
        layers: int = 0,
        expansion: int = 2,
    ):
        def layer() -> TransformerLayer:
            return TransformerLayer(
                features,
                text_features=text_features,
                head_dim=head_dim,
                implementation=implementation,
                expansion=expansion,
                dtype=dtype,
            )

        self.norm = GroupNorm(features, groups=norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.proj_in = Dense(features, features, dtype=dtype)
        self.position = Dense(COORDINATE_FEATURES, features, use_bias=False, dtype=dtype) if coordinates else None
        self.layer = layer() if layers == 0 else None
        self.layers = nnx.List([layer() for _ in range(layers)])
        self.proj_out = Dense(features, features, init_scale=0.0, dtype=dtype)

    def __call__(self, x: Array, cond: Conditioning) -> Array:
        batch, num_frames, height, width, _ = x.shape
        tokens = self.proj_in(self.norm(x))
        if self.position is not None:
            tokens = tokens + self.position(coordinate_embedding(height, width))[None, None]
        tokens = rearrange(tokens, "b f h w c -> (b f) (h w) c")
        weight = None if cond.style_weight is None else jnp.repeat(cond.style_weight, num_frames)
        for layer in self.layers if self.layer is None else (self.layer,):
            tokens = spatial_layer(layer, tokens, cond, batch, weight)
        return x + self.proj_out(tokens.reshape(batch, num_frames, height, width, -1))


def spatial_layer(
    layer: TransformerLayer,
    tokens: Array,
    cond: Conditioning,
    batch: int,
    style_weight: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """One transformer layer over the tokens of each frame, `[(b f) n d]`, with cross-attention to the prompt."""
    tokens = layer.attend(tokens, style_weight=style_weight, mask=mask)
    if cond.text is not None and layer.attn2 is not None:
        # All tokens of a clip share the prompt: one long query instead of a text copy per frame.
        flat = rearrange(tokens, "(b f) n c -> b (f n) c", b=batch)
        tokens = layer.cross(flat, cond.text, cond.text_mask).reshape(tokens.shape)
    return layer.feed(tokens)
