"""One transformer text encoder, parameterised: CLIP-class (pre-norm, causal or not) and BERT-class (post-norm).

`tokens [b n] i32, mask [b n] bool -> features [b n d] f32`, the last hidden states that cross-attention reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models.attention import Attention
from vdiff_jax.models.functional import parameter
from vdiff_jax.models.layers import Dense, LayerNorm
from vdiff_jax.types import Array

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a `TextEncoder`.

    norm: "pre" (CLIP: norm before each sub-layer, one more at the end) or "post" (BERT: norm after each residual and
        after the embeddings). causal: tokens see earlier tokens only (CLIP). token_types: rows of BERT's segment
        table, of which row 0 is used; 0 = no such table.
    """

    vocab_size: int = 128
    context_length: int = 32
    features: int = 64
    hidden_features: int = 256
    layers: int = 2
    head_dim: int = 32
    norm: Literal["pre", "post"] = "pre"
    causal: bool = False
    activation: str = "gelu"
    token_types: int = 0
    epsilon: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text_encoder.activation={self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"text_encoder.norm={self.norm!r}: choose pre or post")

    @classmethod
    def minilm(cls, **overrides: Any) -> TextEncoderConfig:
        """all-MiniLM-L6-v2, a BERT-class sentence encoder (Wang et al. 2020): 6 layers of width 384."""
        settings = dict(vocab_size=30522, context_length=512, features=384, hidden_features=1536, layers=6)
        return cls(**{**settings, "norm": "post", "token_types": 2, "epsilon": 1e-12, **overrides})


class EncoderLayer(nnx.Module):
    """Self-attention and a two-layer perceptron, norms before ("pre") or after ("post") each residual."""

    def __init__(self, config: TextEncoderConfig):
        dtype = jnp.dtype(config.dtype)
        self.attention = Attention(config.features, head_dim=config.head_dim, use_bias=True, dtype=dtype)
        self.norm1 = LayerNorm(config.features, epsilon=config.epsilon, dtype=dtype)
        self.proj_in = Dense(config.features, config.hidden_features, dtype=dtype)
        self.proj_out = Dense(config.hidden_features, config.features, dtype=dtype)
        self.norm2 = LayerNorm(config.features, epsilon=config.epsilon, dtype=dtype)
        self.config = config

    def __call__(self, x: Array, mask: Array) -> Array:
        if self.config.norm == "pre":
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self._perceptron(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self._perceptron(x))

    def _perceptron(self, x: Array) -> Array:
        return self.proj_out(ACTIVATIONS[self.config.activation](self.proj_in(x)))


class TextEncoder(nnx.Module):
    """See the module docstring."""

    def __init__(self, config: TextEncoderConfig):
        self.config = config
        # As large as what the layers add, so that words of one kind are told apart from the first step.
        self.token_embedding = parameter((config.vocab_size, config.features), std=1.0)
        self.position_embedding = parameter((config.context_length, config.features), std=0.02)
        self.type_embedding = parameter((config.token_types, config.features)) if config.token_types else None
        self.embedding_norm = LayerNorm(config.features, epsilon=config.epsilon) if config.norm == "post" else None
        self.layers = nnx.List([EncoderLayer(config) for _ in range(config.layers)])
        self.final_norm = LayerNorm(config.features, epsilon=config.epsilon) if config.norm == "pre" else None

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Raises ValueError if the tokens are longer than the context."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"prompt has {length} tokens, the text encoder's context is {self.config.context_length}")
        x = self.token_embedding[...][tokens] + self.position_embedding[...][None, :length]
        if self.type_embedding is not None:
            x = x + self.type_embedding[...][None, :1]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        attend = mask.astype(bool)[:, None, None, :]
        if self.config.causal:
            attend = attend & jnp.tril(jnp.ones((length, length), bool))[None, None]
        x = x.astype(jnp.dtype(self.config.dtype))
        for layer in self.layers:
            x = layer(x, attend)
        x = self.final_norm(x) if self.final_norm is not None else x
        return x.astype(jnp.float32)
