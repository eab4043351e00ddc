"""CLIP's image encoder (Radford et al. 2021): a vision transformer whose class token stands for the picture.

`pixels [b h w 3] f32, normalised as CLIP wants them -> embedding [b d] f32`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models.functional import parameter
from vdiff_jax.models.layers import Dense, LayerNorm
from vdiff_jax.models.text_encoder import check_activation, encoder_layers
from vdiff_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Shape of an `ImageEncoder`.

    image_size: pixels per side, a multiple of patch_size. projection: width of the linear layer on the class token's
    last state, which is the embedding; 0 = none, the embedding is `features` wide.
    """

    image_size: int = 32
    patch_size: int = 8
    channels: int = 3
    features: int = 64
    hidden_features: int = 256
    layers: int = 2
    head_dim: int = 32
    projection: int = 0
    activation: str = "gelu"
    epsilon: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        check_activation(self.activation, "image_encoder")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_encoder.patch_size={self.patch_size} does not divide image_size={self.image_size}: "
                "choose a divisor"
            )

    @classmethod
    def openclip_h14(cls, **overrides: Any) -> ImageEncoderConfig:
        """OpenCLIP ViT-H/14 (Cherti et al. 2023), as Stable Video Diffusion and I2VGen-XL use it."""
        settings = dict(image_size=224, patch_size=14, features=1280, hidden_features=5120, layers=32, head_dim=80)
        return cls(**{**settings, "projection": 1024, **overrides})


class PatchEmbedding(nnx.Module):
    """A linear layer on square patches, `[b h w c] -> [b n d]`, row by row; kernel `[p p c d]`, as a convolution's."""

    def __init__(self, channels: int, features: int, *, patch_size: int, dtype=jnp.float32):
        std = 1 / math.sqrt(channels * patch_size**2)
        self.kernel = parameter((patch_size, patch_size, channels, features), std=std)
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        size, _, channels, features = self.kernel.shape
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.kernel[...].astype(self.dtype).reshape(-1, features)
        y = x.reshape(-1, kernel.shape[0]).astype(self.dtype) @ kernel
        return y.reshape(batch, -1, features)


class ImageEncoder(nnx.Module):
    """See the module docstring."""

    def __init__(self, config: ImageEncoderConfig):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        count = (config.image_size // config.patch_size) ** 2 + 1
        self.patch_embedding = PatchEmbedding(
            config.channels, config.features, patch_size=config.patch_size, dtype=dtype
        )
        self.class_embedding = parameter((config.features,), std=config.features**-0.5)
        self.position_embedding = parameter((count, config.features), std=0.02)
        self.pre_norm = LayerNorm(config.features, epsilon=config.epsilon, dtype=dtype)
        self.layers = encoder_layers(config)
        self.post_norm = LayerNorm(config.features, epsilon=config.epsilon)
        self.projection = Dense(config.features, config.projection, use_bias=False) if config.projection else None

    def __call__(self, pixels: Array) -> Array:
        """Raises ValueError for pictures of another size."""
        x = self.post_norm(self.last_states(pixels)[:, 0])
        return x if self.projection is None else self.projection(x)

    def last_states(self, pixels: Array) -> Array:
        """The class token and the patches after the last layer, `[b 1+n d]` f32, not normalised."""
        return self.hidden_states(pixels)[-1].astype(jnp.float32)

    def hidden_states(self, pixels: Array) -> list[Array]:
        """What the first layer reads and each layer writes, `[b 1+n d]` each."""
        config = self.config
        if pixels.shape[1:] != (config.image_size, config.image_size, config.channels):
            wanted = f"{config.image_size} x {config.image_size} x {config.channels}"
            raise ValueError(f"pixels of the image encoder are {pixels.shape[1:]}, it takes {wanted}: resize them")
        patches = self.patch_embedding(pixels).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (len(pixels), 1, config.features))
        x = jnp.concatenate([first.astype(jnp.float32), patches], axis=1) + self.position_embedding[...][None]
        states = [self.pre_norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states
