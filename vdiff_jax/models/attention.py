"""Attention through one function, and the spatial, cross and temporal attention built on it.

`dot_product_attention(q, k, v)` is the only place that computes softmax attention; its implementation is chosen by
name, or by platform with "auto". Temporal positions are real numbers: rotary embeddings (Su et al. 2021) of the time
stamps, so strides, slow motion and gaps are just other numbers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models.layers import Dense
from vdiff_jax.types import Array

IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn")


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    implementation: str = "auto",
    bias: Array | None = None,
) -> Array:
    """`softmax(q k^T / sqrt(d)) v` for `[b n k d]` queries and `[b m k d]` keys and values.

    mask: bool, broadcastable to `[b heads n m]`, True = may attend.
    implementation: "einsum" (batched matmuls, fastest on CPU for short sequences), "xla" or "cudnn"
        (`jax.nn.dot_product_attention`), "auto" = einsum on CPU, XLA's choice elsewhere.
    bias: `[b heads n m]`, each axis full or 1, added to the logits.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is unknown: choose one of {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation = "einsum" if jax.default_backend() == "cpu" else "xla"
    if implementation != "einsum":
        if bias is not None:
            bias = bias.astype(query.dtype)
        return jax.nn.dot_product_attention(query, key, value, bias, mask, implementation=implementation)
    # In float32 from the start: some checkpoints' logits are beyond the range of float16 before they are scaled.
    logits = jnp.einsum("bnkd,bmkd->bknm", query, key, preferred_element_type=jnp.float32)
    logits = logits * (1.0 / math.sqrt(query.shape[-1]))
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, value)


def rotary_embedding(x: Array, position: Array, *, max_period: float = 200.0) -> Array:
    """Rotate feature pairs of `x [b n k d]` by `position [b n] * frequency`; dot products see differences only.

    max_period: the slowest rotation turns once in 2 pi * max_period position units, so it orders everything nearer.
    """
    half = x.shape[-1] // 2
    frequencies = max_period ** -(jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angles = position.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1) if x.shape[-1] % 2 else rotated


def share_attention(query: Array, key: Array, value: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
    """Shared attention (StyleAligned, Hertz et al. 2024) as new queries, keys, values and a bias of the logits.

    Rows come as two halves: row i of the second is the style of row i of the first. Queries and keys of the first half
    get, for every head and channel, the mean and deviation over the tokens that the style's have, and its rows attend
    to the style's tokens beside their own. The second half keeps to itself.

    Args:
        query, key, value: `[b n k d]`. weight: `[b/2]`; w = 0 leaves a row as it is, between 0 and 1 its statistics
            move that far, and every token of the style counts as w tokens of the row's own.
    Returns:
        query `[b n k d]`, key and value `[b 2n k d]`, bias f32 `[b 1 1 2n]`. A row that equals its style attends as
        without this, whatever the weight.
    Raises:
        ValueError: not one weight for every row of the first half.
    """
    rows = len(weight)
    if 2 * rows != len(query):
        raise ValueError(f"{rows} style weights for {len(query)} rows of attention: give one for every row of a half")
    share = jnp.clip(weight, 0.0, 1.0)[:, None, None, None]

    def restyled(x: Array) -> Array:
        """The first half with the style's statistics, the second as it is."""
        own, style = x[:rows].astype(jnp.float32), x[rows:].astype(jnp.float32)
        deviation, wanted = (jnp.sqrt(y.var(axis=1, keepdims=True) + 1e-6) for y in (own, style))
        aligned = (own - own.mean(axis=1, keepdims=True)) / deviation * wanted + style.mean(axis=1, keepdims=True)
        return jnp.concatenate([(own + share * (aligned - own)).astype(x.dtype), x[rows:]])

    def extended(x: Array) -> Array:
        """Own tokens, then the style's; rows of the second half get tokens that they do not look at."""
        return jnp.concatenate([x, jnp.concatenate([x[rows:], x[rows:]])], axis=1)

    count = key.shape[1]
    weights = jnp.concatenate([weight, jnp.zeros_like(weight)])[:, None]
    weights = jnp.concatenate([jnp.ones((2 * rows, count)), jnp.broadcast_to(weights, (2 * rows, count))], axis=1)
    bias = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), jnp.finfo(jnp.float32).min)
    return restyled(query), extended(restyled(key)), extended(value), bias[:, None, None]


class Attention(nnx.Module):
    """Multi-head attention, `x [b n d]` attending to `context [b m d']` (itself by default).

    heads: how many; None = features / head_dim. position: `[b n]` real numbers for rotary self-attention.
    init_scale=0 makes the output zero at the start, so that a residual branch begins as the identity.
    style_weight: `[b/2]`, self-attention is shared between the two halves of the rows, see `share_attention`.
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int | None = None,
        head_dim: int = 32,
        heads: int | None = None,
        use_bias: bool = False,
        init_scale: float = 1.0,
        implementation: str = "auto",
        dtype=jnp.float32,
    ):
        if heads is None and features % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide {features} channels: choose a divisor")
        width = features if heads is None else heads * head_dim
        context_features = context_features or features
        self.to_q = Dense(features, width, use_bias=use_bias, dtype=dtype)
        self.to_k = Dense(context_features, width, use_bias=use_bias, dtype=dtype)
        self.to_v = Dense(context_features, width, use_bias=use_bias, dtype=dtype)
        self.to_out = Dense(width, features, init_scale=init_scale, dtype=dtype)
        self.head_dim, self.implementation = head_dim, implementation

    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        mask: Array | None = None,
        position: Array | None = None,
        style_weight: Array | None = None,
    ) -> Array:
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if position is not None:
            query, key = rotary_embedding(query, position), rotary_embedding(key, position)
        bias = None
        if style_weight is not None:
            query, key, value, bias = share_attention(query, key, value, style_weight)
        out = dot_product_attention(query, key, value, mask, self.implementation, bias)
        return self.to_out(out.reshape(*x.shape[:-1], -1))
