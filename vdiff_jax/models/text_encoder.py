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
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def check_activation(name: str, where: str) -> None:
    """Raises ValueError for a name that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{where}.activation={name!r}: choose one of {', '.join(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a `TextEncoder`.

    norm: "pre" (CLIP: norm before each sub-layer, one more at the end) or "post" (BERT: norm after each residual and
        after the embeddings). causal: tokens see earlier tokens only (CLIP). attend_padding: the mask is not looked at,
        as in the diffusion models that were trained on CLIP's features of whole contexts. token_types: rows of BERT's
        segment table, of which row 0 is used; 0 = no such table.
    skip_last: layers at the end whose states are left aside ("clip skip"): kept in files, not computed.
    projection: width of the linear layer on the pooled state; 0 = none. pooled_token: the id whose state, at its first
        place, stands for the prompt; -1 = the largest id of the prompt, which is where CLIP has its end token.
    """

    vocab_size: int = 128
    context_length: int = 32
    features: int = 64
    hidden_features: int = 256
    layers: int = 2
    head_dim: int = 32
    norm: Literal["pre", "post"] = "pre"
    causal: bool = False
    attend_padding: bool = False
    activation: str = "gelu"
    token_types: int = 0
    projection: int = 0
    pooled_token: int = -1
    skip_last: int = 0
    epsilon: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        check_activation(self.activation, "text_encoder")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"text_encoder.norm={self.norm!r}: choose pre or post")

    @classmethod
    def minilm(cls, **overrides: Any) -> TextEncoderConfig:
        """all-MiniLM-L6-v2, a BERT-class sentence encoder (Wang et al. 2020): 6 layers of width 384."""
        settings = dict(vocab_size=30522, context_length=512, features=384, hidden_features=1536, layers=6)
        return cls(**{**settings, "norm": "post", "token_types": 2, "epsilon": 1e-12, **overrides})

    @classmethod
    def clip_l14(cls, **overrides: Any) -> TextEncoderConfig:
        """CLIP ViT-L/14's text tower (Radford et al. 2021), as Stable Diffusion 1 uses it: 12 layers of width 768."""
        settings = dict(vocab_size=49408, context_length=77, features=768, hidden_features=3072, layers=12, head_dim=64)
        flags = dict(causal=True, attend_padding=True, activation="quick_gelu")
        return cls(**{**settings, **flags, **overrides})

    @classmethod
    def openclip_h14(cls, **overrides: Any) -> TextEncoderConfig:
        """OpenCLIP ViT-H/14's text tower (Cherti et al. 2023) without its last layer, as Stable Diffusion 2 and
        ModelScope use it: 23 layers of width 1024."""
        settings = dict(features=1024, hidden_features=4096, layers=23, activation="gelu")
        return cls.clip_l14(**{**settings, **overrides})


class EncoderLayer(nnx.Module):
    """Self-attention and a two-layer perceptron on `[b n d]`, norms before ("pre") or after ("post") each residual."""

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        head_dim: int,
        norm: Literal["pre", "post"] = "pre",
        activation: str = "gelu",
        epsilon: float = 1e-5,
        dtype=jnp.float32,
    ):
        self.attention = Attention(features, head_dim=head_dim, use_bias=True, dtype=dtype)
        self.norm1 = LayerNorm(features, epsilon=epsilon, dtype=dtype)
        self.proj_in = Dense(features, hidden_features, dtype=dtype)
        self.proj_out = Dense(hidden_features, features, dtype=dtype)
        self.norm2 = LayerNorm(features, epsilon=epsilon, dtype=dtype)
        self.norm, self.activation = norm, activation

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """mask: bool, broadcastable to `[b heads n n]`."""
        if self.norm == "pre":
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self._perceptron(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self._perceptron(x))

    def _perceptron(self, x: Array) -> Array:
        return self.proj_out(ACTIVATIONS[self.activation](self.proj_in(x)))


def encoder_layers(config: Any, norm: Literal["pre", "post"] = "pre") -> nnx.List:
    """All layers of an encoder of text or images. config: a `TextEncoderConfig` or an `ImageEncoderConfig`."""

    def layer() -> EncoderLayer:
        return EncoderLayer(
            config.features,
            config.hidden_features,
            head_dim=config.head_dim,
            norm=norm,
            activation=config.activation,
            epsilon=config.epsilon,
            dtype=jnp.dtype(config.dtype),
        )

    return nnx.List([layer() for _ in range(config.layers)])


class TextEncoder(nnx.Module):
    """See the module docstring."""

    def __init__(self, config: TextEncoderConfig):
        self.config = config
        # As large as what the layers add, so that words of one kind are told apart from the first step.
        self.token_embedding = parameter((config.vocab_size, config.features), std=1.0)
        self.position_embedding = parameter((config.context_length, config.features), std=0.02)
        self.type_embedding = parameter((config.token_types, config.features)) if config.token_types else None
        self.embedding_norm = LayerNorm(config.features, epsilon=config.epsilon) if config.norm == "post" else None
        self.layers = encoder_layers(config, norm=config.norm)
        self.final_norm = LayerNorm(config.features, epsilon=config.epsilon) if config.norm == "pre" else None
        self.projection = Dense(config.features, config.projection, use_bias=False) if config.projection else None

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Raises ValueError if the tokens are longer than the context."""
        x = self.hidden_states(tokens, mask)[-1 - self.config.skip_last]
        x = self.final_norm(x) if self.final_norm is not None else x
        return x.astype(jnp.float32)

    def hidden_states(self, tokens: Array, mask: Array) -> list[Array]:
        """The embeddings and what each layer makes of them, `[b n d]` each; the final norm is not yet applied."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"prompt has {length} tokens, the text encoder's context is {self.config.context_length}")
        x = self.token_embedding[...][tokens] + self.position_embedding[...][None, :length]
        if self.type_embedding is not None:
            x = x + self.type_embedding[...][None, :1]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        attend = None if self.config.attend_padding else mask.astype(bool)[:, None, None, :]
        if self.config.causal:
            past = jnp.tril(jnp.ones((length, length), bool))[None, None]
            attend = past if attend is None else attend & past
        states = [x.astype(jnp.dtype(self.config.dtype))]
        for layer in self.layers:
            states.append(layer(states[-1], attend))
        return states

    def pooled(self, tokens: Array, mask: Array) -> Array:
        """One vector a prompt, `[b d]` f32: the state of the end token, `[b projection]` where there is a projection.

        Compared between prompts, and with images by CLIP's image encoder.
        """
        wanted = tokens if self.config.pooled_token < 0 else tokens == self.config.pooled_token
        index = jnp.argmax(wanted, axis=1)  # the first, if there are several: CLIP pads with its end token
        x = jnp.take_along_axis(self(tokens, mask), index[:, None, None], axis=1)[:, 0]
        return x if self.projection is None else self.projection(x)
