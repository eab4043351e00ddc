"""The encoder of T5 (Raffel et al. 2020) and T5 v1.1 (Shazeer 2020): relative positions, no biases, norms without mean.

`tokens [b n] i32, mask [b n] bool -> features [b n d] f32`, as `TextEncoder`, with which it shares no layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vdiff_jax.models.attention import dot_product_attention
from vdiff_jax.models.functional import parameter
from vdiff_jax.models.layers import Dense
from vdiff_jax.models.text_encoder import ACTIVATIONS, check_activation
from vdiff_jax.types import Array


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """Shape of a `T5Encoder`.

    heads, head_dim: their product need not be `features`. buckets, max_distance: rows of the table of relative
    positions, and the distance from which all share a row. gated: the perceptron has a gate (v1.1) or none.
    attend_padding: the mask is not looked at.
    """

    vocab_size: int = 128
    features: int = 64
    hidden_features: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 32
    buckets: int = 32
    max_distance: int = 128
    gated: bool = True
    activation: str = "gelu_tanh"
    attend_padding: bool = False
    epsilon: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self):
        check_activation(self.activation, "text_encoder")

    @classmethod
    def v1_1_xxl(cls, **overrides: Any) -> T5EncoderConfig:
        """T5 v1.1 XXL, the largest: 24 layers of width 4096."""
        settings = dict(vocab_size=32128, features=4096, hidden_features=10240, layers=24, heads=64, head_dim=64)
        return cls(**{**settings, **overrides})


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """i32 [n n]: the row of the position table for query i and key j.

    Half of the rows are for keys after the query. In each half the first rows stand for one distance each, the others
    for ranges that grow geometrically up to `max_distance`.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32 as in the networks that were trained: powers of two fall on the edges of buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis (Zhang & Sennrich 2019), statistics in fp32."""

    def __init__(self, features: int, *, epsilon: float):
        self.scale = parameter((features,), fill=1.0)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return normed * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


class T5Layer(nnx.Module):
    """Self-attention with a bias for relative positions, and a perceptron; each behind a norm, added to its input.

    The sum is carried in fp32: in the large models it leaves the range of float16.
    """

    def __init__(self, config: T5EncoderConfig):
        dtype = jnp.dtype(config.dtype)
        inner = config.heads * config.head_dim

        def dense(inputs: int, outputs: int, init_scale: float = 1.0) -> Dense:
            return Dense(inputs, outputs, use_bias=False, init_scale=init_scale, dtype=dtype)

        self.norm1 = RMSNorm(config.features, epsilon=config.epsilon)
        self.to_q = dense(config.features, inner, config.head_dim**-0.5)  # in place of the scale in the softmax
        self.to_k = dense(config.features, inner)
        self.to_v = dense(config.features, inner)
        self.to_out = dense(inner, config.features)
        self.norm2 = RMSNorm(config.features, epsilon=config.epsilon)
        self.gate = dense(config.features, config.hidden_features) if config.gated else None
        self.proj_in = dense(config.features, config.hidden_features)
        self.proj_out = dense(config.hidden_features, config.features)
        self.config = config

    def __call__(self, x: Array, mask: Array | None, bias: Array) -> Array:
        """mask: bool `[b 1 1 n]`. bias: `[1 heads n n]`, added to the logits."""
        x = x + self._attention(self.norm1(x), mask, bias).astype(jnp.float32)
        return x + self._perceptron(self.norm2(x)).astype(jnp.float32)

    def _attention(self, x: Array, mask: Array | None, bias: Array) -> Array:
        query, key, value = (
            layer(x).reshape(*x.shape[:-1], -1, self.config.head_dim) for layer in (self.to_q, self.to_k, self.to_v)
        )
        # The logits are not scaled; `dot_product_attention` scales them.
        out = dot_product_attention(query * math.sqrt(self.config.head_dim), key, value, mask, bias=bias)
        return self.to_out(out.reshape(*x.shape[:-1], -1))

    def _perceptron(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return self.proj_out(activation(self.proj_in(x)))
        return self.proj_out(activation(self.gate(x)) * self.proj_in(x))


class T5Encoder(nnx.Module):
    """See the module docstring."""

    def __init__(self, config: T5EncoderConfig):
        self.config = config
        self.token_embedding = parameter((config.vocab_size, config.features), std=1.0)
        self.position_bias = parameter((config.buckets, config.heads), std=config.features**-0.5)
        self.layers = nnx.List([T5Layer(config) for _ in range(config.layers)])
        self.final_norm = RMSNorm(config.features, epsilon=config.epsilon)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        return self.final_norm(self.hidden_states(tokens, mask)[-1])

    def hidden_states(self, tokens: Array, mask: Array) -> list[Array]:
        """The embeddings and what each layer makes of them, f32 `[b n d]` each; the final norm is not yet applied."""
        rows = relative_buckets(tokens.shape[1], self.config.buckets, self.config.max_distance)
        bias = self.position_bias[...].astype(jnp.float32)[rows].transpose(2, 0, 1)[None]
        attend = None if self.config.attend_padding else mask.astype(bool)[:, None, None, :]
        states = [self.token_embedding[...][tokens].astype(jnp.float32)]
        for layer in self.layers:
            states.append(layer(states[-1], attend, bias))
        return states
