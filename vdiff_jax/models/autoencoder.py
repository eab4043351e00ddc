"""`VideoAutoencoder`: the KL autoencoder of latent diffusion (Rombach et al. 2022), frame by frame.

Three representations, and one place where each arrow lives:

    video [-1, 1]  --encode_moments-->  raw moments (mean, log-variance)  --latents_from_moments-->  final latents
    final latents  --decode-->  video

Raw is what the network emits and what a latent cache stores; final has zero mean and unit variance per channel
(`latent_mean`, `latent_std` of the config, measured on the training set after training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from vdiff_jax.models.attention import Attention
from vdiff_jax.models.blocks import ResBlock
from vdiff_jax.models.layers import Dense, Downsample, FrameConv, GroupNorm, Upsample
from vdiff_jax.types import Array, Latents, Video

LOGVAR_RANGE = (-30.0, 20.0)
LINEAR_PATH_LOGVAR = -6.0  # silent convolutions would start it at 0, where unit noise drowns the principal components


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
    latent_mean, latent_std: per-channel statistics of the raw latents, empty = 0 and 1 (not measured yet).
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

    def __post_init__(self):
        for name in ("latent_mean", "latent_std"):
            length = len(getattr(self, name))
            if length not in (0, self.latent_channels):
                raise ValueError(f"autoencoder.{name} has {length} values for {self.latent_channels} latent channels")

    @property
    def factor(self) -> int:
        """Pixels per latent cell on each side."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


def to_squares(video: Array, size: int) -> Array:
    """`[b f h*k w*k c] -> [b f h w k*k*c]`: squares of `size` pixels a side become channels."""
    return rearrange(video, "b f (h p) (w q) c -> b f h w (p q c)", p=size, q=size)


def from_squares(x: Array, size: int) -> Array:
    """Undo `to_squares`."""
    return rearrange(x, "b f h w (p q c) -> b f (h p) (w q) c", p=size, q=size)


class MidBlock(nnx.Module):
    """Residual block, single-head attention over the pixels of each frame, residual block."""

    def __init__(self, features: int, *, attention: bool, norm_groups: int, dtype):
        norm: dict[str, Any] = dict(norm_groups=norm_groups, epsilon=1e-6, dtype=dtype)
        self.resnets = nnx.List([ResBlock(features, features, **norm) for _ in range(2)])
        self.norm = GroupNorm(features, groups=norm_groups, scope="frame", epsilon=1e-6) if attention else None
        self.attention = Attention(features, head_dim=features, use_bias=True, dtype=dtype) if attention else None

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        if self.attention is not None and self.norm is not None:
            batch, num_frames, height, width, features = x.shape
            tokens = self.norm(x).reshape(batch * num_frames, height * width, features)
            x = x + self.attention(tokens).reshape(x.shape)
        return self.resnets[1](x)


class Encoder(nnx.Module):
    """`[b f h w 3] -> [b f h/k w/k 2c]`."""

    def __init__(self, config: AutoencoderConfig):
        dtype = jnp.dtype(config.dtype)
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
        self.mid = MidBlock(width, attention=config.mid_attention, norm_groups=config.norm_groups, dtype=dtype)
        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.conv_out = FrameConv(width, 2 * config.latent_channels, init_scale=_output_scale(config), dtype=dtype)
        self.layers_per_block = config.layers_per_block
        self.patch_size = config.patch_size

    def __call__(self, video: Video) -> Array:
        x = self.conv_in(to_squares(video, self.patch_size))
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            level, layer = divmod(index, self.layers_per_block)
            if layer == self.layers_per_block - 1 and level < len(self.downsamplers):
                x = self.downsamplers[level](x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


def _output_scale(config: AutoencoderConfig) -> float:
    return 0.0 if config.linear_path else 1.0


class Decoder(nnx.Module):
    """`[b f h w c] -> [b f h*k w*k 3]`, one residual block more per level than the encoder."""

    def __init__(self, config: AutoencoderConfig):
        dtype = jnp.dtype(config.dtype)
        norm: dict[str, Any] = dict(norm_groups=config.norm_groups, epsilon=1e-6, dtype=dtype)
        width = config.channels[-1]
        self.conv_in = FrameConv(config.latent_channels, width, dtype=dtype)
        self.mid = MidBlock(width, attention=config.mid_attention, norm_groups=config.norm_groups, dtype=dtype)
        resnets, upsamplers = [], []
        for level, features in enumerate(reversed(config.channels)):
            for _ in range(config.layers_per_block + 1):
                resnets.append(ResBlock(width, features, **norm))
                width = features
            if level < len(config.channels) - 1:
                upsamplers.append(Upsample(width, dtype=dtype))
        self.resnets, self.upsamplers = nnx.List(resnets), nnx.List(upsamplers)
        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope="frame", epsilon=1e-6, dtype=dtype)
        self.conv_out = FrameConv(width, 3 * config.patch_size**2, init_scale=_output_scale(config), dtype=dtype)
        self.layers_per_block = config.layers_per_block + 1
        self.patch_size = config.patch_size

    def __call__(self, raw_latents: Array) -> Video:
        x = self.mid(self.conv_in(raw_latents))
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            level, layer = divmod(index, self.layers_per_block)
            if layer == self.layers_per_block - 1 and level < len(self.upsamplers):
                x = self.upsamplers[level](x)
        return from_squares(self.conv_out(jax.nn.silu(self.norm_out(x))), self.patch_size).astype(jnp.float32)


class VideoAutoencoder(nnx.Module):
    """See the module docstring. Every frame is coded by itself, so any number of frames works."""

    def __init__(self, config: AutoencoderConfig):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.encoder = Encoder(config)
        self.quant_conv = Dense(2 * config.latent_channels, 2 * config.latent_channels, dtype=dtype)
        self.post_quant_conv = Dense(config.latent_channels, config.latent_channels, dtype=dtype)
        self.decoder = Decoder(config)
        square = 3 * config.factor**2
        self.linear_in = Dense(square, config.latent_channels, dtype=dtype) if config.linear_path else None
        self.linear_out = Dense(config.latent_channels, square, dtype=dtype) if config.linear_path else None

    def encode_moments(self, video: Video) -> Array:
        """`video [b f h w 3]` in [-1, 1] -> raw moments `[b f h/k w/k 2c]` f32: mean, then clamped log-variance.

        Raises ValueError if height or width is not a multiple of the downsampling factor.
        """
        factor = self.config.factor
        if video.shape[2] % factor or video.shape[3] % factor:
            raise ValueError(
                f"video is {video.shape[2]}x{video.shape[3]}, but this autoencoder needs multiples of {factor}: "
                "resize or crop it first"
            )
        moments = self.quant_conv(self.encoder(video)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        if self.linear_in is not None:
            mean = mean + self.linear_in(to_squares(video, factor)).astype(jnp.float32)
            logvar = logvar + LINEAR_PATH_LOGVAR
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=-1)

    def encode(self, video: Video, noise: Array | None = None) -> Latents:
        """`video [b f h w 3]` -> final latents; the posterior mean, or a sample with unit `noise`."""
        return latents_from_moments(self.encode_moments(video), self.config, noise)

    def decode(self, latents: Latents) -> Video:
        """Final latents `[b f h w c]` -> video `[b f h*k w*k 3]`, nominally in [-1, 1] (not clipped)."""
        return self.decode_raw(raw_from_final(latents, self.config))

    def decode_raw(self, raw_latents: Array) -> Video:
        video = self.decoder(self.post_quant_conv(raw_latents))
        if self.linear_out is not None:
            video = video + from_squares(self.linear_out(raw_latents), self.config.factor).astype(jnp.float32)
        return video


def principal_components(videos: Iterable[Array], config: AutoencoderConfig) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of the linear path that code squares of pixels by their principal components, in unit variance.

    videos: `[b f h w 3]` in [-1, 1]. Returns {"linear_in": {kernel, bias}, "linear_out": {kernel, bias}}, the best
    linear autoencoder of these videos in squared error (Baldi & Hornik 1989).
    """
    squares = np.concatenate(
        [np.asarray(to_squares(jnp.asarray(v), config.factor)).reshape(-1, 3 * config.factor**2) for v in videos]
    ).astype(np.float64)
    mean = squares.mean(0)
    variance, axes = np.linalg.eigh(np.cov(squares.T))
    order = np.argsort(variance)[::-1][: config.latent_channels]
    scale, axes = np.sqrt(np.maximum(variance[order], 1e-8)), axes[:, order]
    values = {
        "linear_in": {"kernel": axes / scale, "bias": -mean @ (axes / scale)},
        "linear_out": {"kernel": (axes * scale).T, "bias": mean},
    }
    return jax.tree.map(lambda value: value.astype(np.float32), values)


def pixel_weights(decode: Callable[[Array], Array], latents: Latents) -> Array:
    """`[c]` with mean 1: how much the decoded pixels move with each latent channel, squared, to first order.

        q_c  proportional to  E |J e|^2,  e = random signs in channel c,  J = d decode / d latents

    which is the squared Frobenius norm of that channel's part of J (Hutchinson 1990). latents: typical ones,
    `[b f h w c]`. With these weights a small squared error in latents is in proportion to the squared error in pixels,
    as far as errors of different channels and tokens are independent.
    """
    signs = jax.random.rademacher(jax.random.key(0), (*latents.shape[:-1], 1), jnp.float32)
    channels = jnp.arange(latents.shape[-1]).reshape((1,) * (latents.ndim - 1) + (-1,))

    def moved(channel: Array) -> Array:
        direction = jnp.where(channels == channel, signs, 0.0)
        return jnp.mean(jnp.square(jax.jvp(decode, (latents,), (direction,))[1]))

    moves = jax.lax.map(moved, jnp.arange(latents.shape[-1]))
    return moves / moves.mean()


def sample_moments(moments: Array, noise: Array | None = None) -> Array:
    """Raw latents from raw moments `[... 2c]`: the mean, or `mean + exp(logvar / 2) * noise`."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise


def latents_from_moments(moments: Array, config: AutoencoderConfig, noise: Array | None = None) -> Latents:
    """Final latents `[... c]` from raw moments `[... 2c]`: posterior mean, or a sample with unit `noise`."""
    raw = sample_moments(moments, noise)
    mean, std = _statistics(config, raw.ndim)
    return (raw - mean) / std


def raw_from_final(latents: Latents, config: AutoencoderConfig) -> Array:
    """Undo the per-channel standardisation."""
    mean, std = _statistics(config, latents.ndim)
    return latents * std + mean


def _statistics(config: AutoencoderConfig, ndim: int) -> tuple[Array, Array]:
    shape = (1,) * (ndim - 1) + (-1,)
    mean = config.latent_mean or (0.0,) * config.latent_channels
    std = config.latent_std or (1.0,) * config.latent_channels
    return jnp.asarray(mean, jnp.float32).reshape(shape), jnp.asarray(std, jnp.float32).reshape(shape)
