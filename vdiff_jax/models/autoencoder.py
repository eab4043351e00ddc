"""`VideoAutoencoder`: the KL autoencoder of latent diffusion (Rombach et al. 2022), on videos.

Three representations, and one place where each arrow lives:

    video [-1, 1]  --encode_moments-->  raw moments (mean, log-variance)  --latents_from_moments-->  final latents
    final latents  --decode-->  video

Raw is what the network emits and what a latent cache stores; final has zero mean and unit variance per channel
(`latent_mean`, `latent_std` of the config, measured on the training set after training). Networks that condition on a
picture want its raw mean, `sample_moments(moments)`.

With other settings it is AutoencoderKL of Stable Diffusion or AutoencoderKLTemporalDecoder of Stable Video Diffusion
(Blattmann et al. 2023), see `interop/autoencoders.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vdiff_jax.models.coders import AutoencoderConfig, Decoder, Encoder, from_squares, to_squares
from vdiff_jax.models.layers import Dense
from vdiff_jax.types import Array, Latents, Video

LOGVAR_RANGE = (-30.0, 20.0)
LINEAR_PATH_LOGVAR = -6.0  # silent convolutions would start it at 0, where unit noise drowns the principal components


class VideoAutoencoder(nnx.Module):
    """See the module docstring. Frames are encoded each by itself; `config.decodes_frames_alone` tells of decoding."""

    def __init__(self, config: AutoencoderConfig):
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        channels, square = config.latent_channels, 3 * config.factor**2
        self.encoder = Encoder(config)
        self.quant_conv = Dense(2 * channels, 2 * channels, dtype=dtype) if config.use_quant_conv else None
        self.post_quant_conv = Dense(channels, channels, dtype=dtype) if config.use_post_quant_conv else None
        self.decoder = Decoder(config)
        self.linear_in = Dense(square, channels, dtype=dtype) if config.linear_path else None
        self.linear_out = Dense(channels, square, dtype=dtype) if config.linear_path else None

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
        moments = self.encoder(video)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        moments = moments.astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        if self.linear_in is not None:
            mean = mean + self.linear_in(to_squares(video, factor)).astype(jnp.float32)
            logvar = logvar + LINEAR_PATH_LOGVAR
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=-1)

    def encode(self, video: Video, noise: Array | None = None) -> Latents:
        """`video [b f h w 3]` -> final latents; the posterior mean, or a sample with unit `noise`."""
        return latents_from_moments(self.encode_moments(video), self.config, noise)

    def decode(self, latents: Latents) -> Video:
        """Final latents `[b f h w c]` -> video `[b f h*k w*k 3]`, nominally in [-1, 1] (not clipped).

        A temporal decoder sees these frames only: a long clip decoded in pieces changes a little at their ends.
        """
        return self.decode_raw(raw_from_final(latents, self.config))

    def decode_raw(self, raw_latents: Array) -> Video:
        latents = raw_latents if self.post_quant_conv is None else self.post_quant_conv(raw_latents)
        video = self.decoder(latents)
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
    """Raw latents from raw moments `[... 2c]`: the mean (the mode too), or `mean + exp(logvar / 2) * noise`."""
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
