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
    query: Array, key: Array, value: Array, mask: Array | None = None, implementation: str = "auto"
) -> Array:
    """`softmax(q k^T / sqrt(d)) v` for `[b n k d]` queries and `[b m k d]` keys and values.

    mask: bool, broadcastable to `[b heads n m]`, True = may attend.
    implementation: "einsum" (batched matmuls, fastest on CPU for short sequences), "xla" or "cudnn"
        (`jax.nn.dot_product_attention`), "auto" = einsum on CPU, XLA's choice elsewhere.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is unknown: choose one of {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation = "einsum" if jax.default_backend() == "cpu" else "xla"
    if implementation != "einsum":
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
    logits = jnp.einsum("bnkd,bmkd->bknm", query, key) * (1.0 / math.sqrt(query.shape[-1]))
    logits = logits.astype(jnp.float32)
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


class Attention(nnx.Module):
    """Multi-head attention, `x [b n d]` attending to `context [b m d']` (itself by default).

    position: `[b n]` real numbers for rotary self-attention. init_scale=0 makes the output zero at the start, so
    that a residual branch begins as the identity.
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int | None = None,
        head_dim: int = 32,
        use_bias: bool = False,
        init_scale: float = 1.0,
        implementation: str = "auto",
        dtype=jnp.float32,
    ):
        if features % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide {features} channels: choose a divisor")
        context_features = context_features or features
        self.to_q = Dense(features, features, use_bias=use_bias, dtype=dtype)
        self.to_k = Dense(context_features, features, use_bias=use_bias, dtype=dtype)
        self.to_v = Dense(context_features, features, use_bias=use_bias, dtype=dtype)
        self.to_out = Dense(features, features, init_scale=init_scale, dtype=dtype)
        self.head_dim, self.implementation = head_dim, implementation

    def __call__(
        self, x: Array, context: Array | None = None, *, mask: Array | None = None, position: Array | None = None
    ) -> Array:
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if position is not None:
            query, key = rotary_embedding(query, position), rotary_embedding(key, position)
        out = dot_product_attention(query, key, value, mask, self.implementation)
        return self.to_out(out.reshape(x.shape))
