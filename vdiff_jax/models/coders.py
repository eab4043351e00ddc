"""Encoder and decoder of `VideoAutoencoder`: levels of residual blocks, each halving or doubling the frame.

The decoder works frame by frame, or over all frames it is given, as that of Stable Video Diffusion: then every residual
block is followed by a temporal one, mixed in by a learned share, and the pixels by a convolution over frames.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vdiff_jax.models.attention import Attention
from vdiff_jax.models.blocks import ResBlock
from vdiff_jax.models.layers import Downsample, FrameConv, GroupNorm, TemporalConv, Upsample
from vdiff_jax.models.temporal import MixedConvBlock
from vdiff_jax.types import Array, Video

DecoderKind = Literal["frames", "temporal"]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a `VideoAutoencoder`.

    channels: width per level, pixels first; each further level halves height and width.
    patch_size: pixels per side of the squares that the first level works on, each square one position with all its
        pixels as channels. 2 saves three quarters of the work at the dearest level. The downsampling factor is
        `patch_size * 2 ** (len(channels) - 1)`.
    linear_path: a linear map between squares of factor x factor pixels and latents, beside the convolutions, which
        then start at zero. Training starts it at the principal components of the data (`principal_components`), so a
        small network does not spend its first hour on getting that far. Not in the Stable Diffusion autoencoders.
    latent_mean, latent_std: per-channel statistics of the raw latents, empty = 0 and 1 (not measured yet). Public
        autoencoders have one factor for all channels instead, which is the inverse of their deviation.
    use_quant_conv, use_post_quant_conv: a linear map of the moments, and of the latents before they are decoded.
    decoder: "frames" decodes every frame by itself; "temporal" all that it is given together, and neighbours matter.
    sample_size: height and width of the training pictures as a public checkpoint states it, 0 = not stated.
    force_upcast: activations of this checkpoint leave the range of float16, so it is run in float32 instead.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_groups: int = 8
    mid_attention: bool = True
    patch_size: int = 1
    linear_path: bool = False
    dtype: str = "float32"
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    decoder: DecoderKind = "frames"
    sample_size: int | tuple[int, ...] = 0
    force_upcast: bool = False

    def __post_init__(self):
        for name in ("latent_mean", "latent_std"):
            length = len(getattr(self, name))
            if length not in (0, self.latent_channels):
                raise ValueError(f"autoencoder.{name} has {length} values for {self.latent_channels} latent channels")
        if self.decoder not in get_args(DecoderKind):
            raise ValueError(
                f"autoencoder.decoder={self.decoder!r} is unknown: use one of {', '.join(get_args(DecoderKind))}"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent cell on each side."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def decodes_frames_alone(self) -> bool:
        """Whether a clip may be decoded one frame at a time. Encoding always may."""
        return self.decoder == "frames"

    @property
    def compute_dtype(self) -> str:
        """`dtype`, or float32 where that would overflow."""
        return "float32" if self.force_upcast and self.dtype == "float16" else self.dtype


def to_squares(video: Array, size: int) -> Array:
    """`[b f h*k w*k c] -> [b f h w k*k*c]`: squares of `size` pixels a side become channels."""
    return rearrange(video, "b f (h p) (w q) c -> b f h w (p q c)", p=size, q=size)


def from_squares(x: Array, size: int) -> Array:
    """Undo `to_squares`."""
    return rearrange(x, "b f h w (p q c) -> b f (h p) (w q) c", p=size, q=size)


def _temporal_half(features: int, config: AutoencoderConfig) -> MixedConvBlock:
    """What follows a residual block of the temporal decoder; its epsilon is not that of the spatial half."""
    return MixedConvBlock(
        features,
        norm_groups=config.norm_groups,
        epsilon=1e-5,
        initial=0.0,
        reverse=True,
        dtype=jnp.dtype(config.compute_dtype),
    )


class MidBlock(nnx.Module):
    """Residual block, single-head attention over the pixels of each frame, residual block.

    temporal: a temporal half follows each residual block.
    """

    def __init__(self, features: int, config: AutoencoderConfig, *, temporal: bool = False):
        dtype = jnp.dtype(config.compute_dtype)
        norm: dict[str, Any] = dict(norm_groups=config.norm_groups, epsilon=1e-6, dtype=dtype)
        attention = config.mid_attention
        self.resnets = nnx.List([ResBlock(features, features, **norm) for _ in range(2)])
        self.mixed = nnx.List([_temporal_half(features, config) for _ in range(2)]) if temporal else None
        self.norm = GroupNorm(features, groups=config.norm_groups, scope="frame", epsilon=1e-6) if attention else None
        self.attention = Attention(features, head_dim=features, use_bias=True, dtype=dtype) if attention else None

    def __call__(self, x: Array) -> Array:
        x = self._residual(x, 0)
        if self.attention is not None and self.norm is not None:
            batch, num_frames, height, width, features = x.shape
            tokens = self.norm(x).reshape(batch * num_frames, height * width, features)
            x = x + self.attention(tokens).reshape(x.shape)
        return self._residual(x, 1)

    def _residual(self, x: Array, index: int) -> Array:
        x = self.resnets[index](x)
        return x if self.mixed is None else self.mixed[index](x)


class Encoder(nnx.Module):
    """`[b f h w 3] -> [b f h/k w/k 2c]`."""

    def __init__(self, config: AutoencoderConfig):
        dtype = jnp.dtype(config.compute_dtype)
        norm: dict[str, Any] = dict(norm_groups=config.norm_groups, epsilon=1e-6, dtype=dtype)
        width = config.channels[0]
        self.conv_in = FrameConv(3 * config.patch_size**2, width, dtype=dtype)
        resnets, downsamplers = [], []
        for level, features in enumerate(config.channels):
            for _ in range(config.layers_per_block):
                resnets.append(ResBlock(width, features, **norm))
                width = features
            if level < len(config.channels) - 1:
                downsamplers.append(Downsample(width, padding=(0, 1), dtype=dtype))
        self.resnets, self.downsamplers = nnx.List(resnets), nnx.List(downsamplers)
        self.mid = MidBlock(width, config)
        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.conv_out = FrameConv(width, 2 * config.latent_channels, init_scale=_output_scale(config), dtype=dtype)
        self.layers_per_block = config.layers_per_block
        self.patch_size = config.patch_size

    def __call__(self, video: Video) -> Array:
        x = self.conv_in(to_squares(video, self.patch_size))
        for level in range(len(self.downsamplers) + 1):
            x = self.down(x, level)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))

    def down(self, x: Array, level: int) -> Array:
        """The residual blocks of a level, then half the size, except after the last."""
        for index in range(level * self.layers_per_block, (level + 1) * self.layers_per_block):
            x = self.resnets[index](x)
        return self.downsamplers[level](x) if level < len(self.downsamplers) else x


def _output_scale(config: AutoencoderConfig) -> float:
    return 0.0 if config.linear_path else 1.0


class Decoder(nnx.Module):
    """`[b f h w c] -> [b f h*k w*k 3]`, one residual block more per level than the encoder."""

    def __init__(self, config: AutoencoderConfig):
        dtype = jnp.dtype(config.compute_dtype)
        norm: dict[str, Any] = dict(norm_groups=config.norm_groups, epsilon=1e-6, dtype=dtype)
        temporal = not config.decodes_frames_alone
        width = config.channels[-1]
        self.conv_in = FrameConv(config.latent_channels, width, dtype=dtype)
        self.mid = MidBlock(width, config, temporal=temporal)
        resnets, mixed, upsamplers = [], [], []
        for level, features in enumerate(reversed(config.channels)):
            for _ in range(config.layers_per_block + 1):
                resnets.append(ResBlock(width, features, **norm))
                mixed += [_temporal_half(features, config)] if temporal else []
                width = features
            if level < len(config.channels) - 1:
                upsamplers.append(Upsample(width, dtype=dtype))
        self.resnets, self.upsamplers = nnx.List(resnets), nnx.List(upsamplers)
        self.mixed = nnx.List(mixed) if temporal else None
        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.conv_out = FrameConv(width, 3 * config.patch_size**2, init_scale=_output_scale(config), dtype=dtype)
        self.time_conv_out = TemporalConv(3, 3, dtype=dtype) if temporal else None
        self.layers_per_block = config.layers_per_block + 1
        self.patch_size = config.patch_size

    def __call__(self, raw_latents: Array) -> Video:
        x = self.mid(self.conv_in(raw_latents))
        for level in range(len(self.upsamplers) + 1):
            x = self.up(x, level)
        video = from_squares(self.conv_out(jax.nn.silu(self.norm_out(x))), self.patch_size)
        if self.time_conv_out is not None:
            video = self.time_conv_out(video)
        return video.astype(jnp.float32)

    def up(self, x: Array, level: int) -> Array:
        """The residual blocks of a level, smallest first, then twice the size, except after the last."""
        for index in range(level * self.layers_per_block, (level + 1) * self.layers_per_block):
            x = self.resnets[index](x)
            x = x if self.mixed is None else self.mixed[index](x)
        return self.upsamplers[level](x) if level < len(self.upsamplers) else x
