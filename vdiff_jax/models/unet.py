"""`VideoUNet`: the factorised space-time UNet, ours and, by `UNetConfig.family`, the public ones.

Ours has a noise level per frame and knows its context. Its input channels are `concat(z, known_mask,
known_mask * context_logsnr / 10, coordinates, layout, nearest known)`; each frame has its own embedding made of its
noise level, its time stamp, the gaps to its neighbours and the pooled prompt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models import frame_axis
from vdiff_jax.models.blocks import ResBlock
from vdiff_jax.models.embeddings import FrameEmbedding, ImageContext, PromptLayout, StepEmbedding
from vdiff_jax.models.layers import (
    COORDINATE_FEATURES,
    Dense,
    Downsample,
    FrameConv,
    GroupNorm,
    Upsample,
    coordinate_embedding,
)
from vdiff_jax.models.space_time import SpaceTimeBlock
from vdiff_jax.models.temporal import MotionTransformer
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.types import Array, Conditioning, KnownMask, Latents, LogSNR


class VideoUNet(nnx.Module):
    """`prediction = unet(z, logsnr, known_mask, context_logsnr, cond)`, see `types.PredictFn`.

    Public families are told their checkpoint's own timesteps in the place of `logsnr`, and nothing of what is known;
    `interop.diffusers` and `LatentModel` see to that.
    """

    def __init__(self, config: UNetConfig):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        native = config.family == "native"
        self.embedding = FrameEmbedding(config) if native else StepEmbedding(config)
        self.layout = PromptLayout(config) if config.text_features and config.layout_features else None
        self.image_context = ImageContext(config) if config.family == "i2vgen" else None
        self.conv_in = FrameConv(_input_channels(config), config.channels[0], dtype=dtype)
        self.transformer_in = _transformer_in(config) if config.family in ("modelscope", "i2vgen") else None

        skips = [config.channels[0]]
        width = config.channels[0]
        down, downsamplers = [], []
        for level, features in enumerate(config.channels):
            for _ in range(config.blocks_per_level):
                attention = config.attention[level]
                epsilon = 1e-6 if config.family == "svd" and attention else 1e-5
                down.append(SpaceTimeBlock(config, width, features, level=level, attention=attention, epsilon=epsilon))
                width = features
                skips.append(width)
            if level < len(config.channels) - 1:
                downsamplers.append(Downsample(width, dtype=dtype))
                skips.append(width)
        self.down, self.downsamplers = nnx.List(down), nnx.List(downsamplers)

        middle: dict[str, Any] = dict(level=len(config.channels) - 1)
        attention = config.attention[-1] if native else True
        self.mid = SpaceTimeBlock(config, width, width, attention=attention, motion=config.motion_mid, **middle)
        if native:
            self.mid_out = ResBlock(
                width, width, config.embedding_features, norm_groups=config.norm_groups, dtype=dtype
            )  # fmt: skip
        else:
            self.mid_out = SpaceTimeBlock(config, width, width, attention=False, motion=False, **middle)

        up, upsamplers = [], []
        epsilon = 1e-6 if config.family == "svd" else 1e-5
        for level, features in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks_per_level + 1):
                wide = width + skips.pop()
                attention = config.attention[level]
                up.append(SpaceTimeBlock(config, wide, features, level=level, attention=attention, epsilon=epsilon))
                width = features
            if level > 0:
                # Ours narrows before the wide grid: the convolution there is the dearest of the level.
                narrow = config.channels[level - 1] if native else width
                upsamplers.append(Upsample(width, narrow, dtype=dtype))
                width = narrow
        self.up, self.upsamplers = nnx.List(up), nnx.List(upsamplers)

        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope=config.resnet_norm, epsilon=1e-5, dtype=dtype)
        self.conv_out = FrameConv(width, config.latent_channels, init_scale=0.0)
        self.linear_path = LinearPath(config) if config.linear_path else None

    def __call__(
        self, z: Latents, logsnr: LogSNR, known_mask: KnownMask, context_logsnr: LogSNR, cond: Conditioning
    ) -> Latents:
        config = self.config
        block_size = 2 ** (len(config.channels) - 1)
        if z.shape[2] % block_size or z.shape[3] % block_size:
            raise ValueError(
                f"latents are {z.shape[2]}x{z.shape[3]}, but {len(config.channels)} levels need multiples "
                f"of {block_size}"
            )
        near = None
        if config.reads_timesteps:
            inputs, embedding, cond = self._public_inputs(z, logsnr, cond)
        else:
            inputs, embedding, near = self._native_inputs(z, logsnr, known_mask, context_logsnr, cond)
        x = self.conv_in(inputs)
        if self.transformer_in is not None:
            x = self.transformer_in(x, cond.times, cond.valid)

        skips = [x]
        down, downsamplers = iter(self.down), iter(self.downsamplers)
        for level_index in range(len(config.channels)):
            for _ in range(config.blocks_per_level):
                x = self._run(next(down), x, embedding, cond)
                skips.append(x)
            if level_index < len(config.channels) - 1:
                x = next(downsamplers)(x)
                skips.append(x)

        x = self._run(self.mid, x, embedding, cond)
        if isinstance(self.mid_out, ResBlock):
            x = self.mid_out(x, embedding, valid=cond.valid)
        else:
            x = self.mid_out(x, embedding, cond)

        up, upsamplers = iter(self.up), iter(self.upsamplers)
        for level_index in reversed(range(len(config.channels))):
            for _ in range(config.blocks_per_level + 1):
                x = self._run(next(up), jnp.concatenate([x, skips.pop()], axis=-1), embedding, cond)
            if level_index > 0:
                x = next(upsamplers)(x)
        x = self.conv_out(jax.nn.silu(self.norm_out(x, valid=cond.valid))).astype(jnp.float32)
        return x if self.linear_path is None else x + self.linear_path(embedding, z, near)

    def _native_inputs(
        self, z: Latents, logsnr: LogSNR, known_mask: KnownMask, context_logsnr: LogSNR, cond: Conditioning
    ) -> tuple[Array, Array, Array | None]:
        """Input channels `[b f h w i]`, embedding `[b f e]`, and what `nearest_known` found."""
        level = known_mask * context_logsnr[:, :, None, None, None] / 10.0
        # A frame known in all its tokens is at its context level, whatever the level of the others.
        whole = known_mask.min(axis=(2, 3, 4)) > 0.5
        embedding = self.embedding(jnp.where(whole, context_logsnr, logsnr), cond)
        inputs = [z, known_mask, level]
        if self.config.coordinates:
            where = coordinate_embedding(z.shape[2], z.shape[3])
            inputs.append(jnp.broadcast_to(where[None, None], (*z.shape[:-1], where.shape[-1])))
        if self.layout is not None:
            inputs.append(self.layout(cond, z.shape))
        near = None
        if self.config.nearest_known:
            near = self._nearest_known(jnp.concatenate([z, level], axis=-1), known_mask, cond)
            inputs.append(near)
        return jnp.concatenate(inputs, axis=-1), embedding, near

    def _nearest_known(self, tokens: Array, known_mask: KnownMask, cond: Conditioning) -> Array:
        if cond.valid is not None:
            known_mask = jnp.where(frame_axis.here(cond.valid)[:, :, None, None, None], known_mask, 0.0)
        found = nearest_known(frame_axis.all_frames(tokens), frame_axis.all_frames(known_mask), cond.times)
        return frame_axis.own_frames(found, tokens)

    def _public_inputs(self, z: Latents, timestep: Array, cond: Conditioning) -> tuple[Array, Array, Conditioning]:
        """Input channels, embedding, and the conditioning with what the image adds to it."""
        embedding = self.embedding(timestep, cond)
        if self.image_context is not None:
            channels, cond = self.image_context(cond)
            return jnp.concatenate([z, channels], axis=-1), embedding, cond
        if not self.config.conditioning_channels:
            return z, embedding, cond
        if cond.image_latents is None:
            raise ValueError("this network animates an image: it needs cond.image_latents")
        return jnp.concatenate([z, cond.image_latents], axis=-1), embedding, cond

    def _run(self, block: SpaceTimeBlock, x: Array, embedding: Array, cond: Conditioning) -> Array:
        if self.config.remat == "none":
            return block(x, embedding, cond)
        policy = jax.checkpoint_policies.dots_saveable if self.config.remat == "dots" else None
        return jax.checkpoint(lambda b, *args: b(*args), policy=policy)(block, x, embedding, cond)


def _transformer_in(config: UNetConfig) -> MotionTransformer:
    """Eight heads of the common size, whatever the width of the first level."""
    return MotionTransformer(
        config.channels[0],
        heads=8,
        head_dim=config.head_dim,
        norm_groups=config.norm_groups,
        implementation=config.attention_implementation,
        dtype=jnp.dtype(config.dtype),
    )


def _input_channels(config: UNetConfig) -> int:
    if config.family == "i2vgen":
        return 2 * config.latent_channels
    if config.reads_timesteps:
        return config.latent_channels + config.conditioning_channels
    inputs = config.latent_channels + 2
    inputs += COORDINATE_FEATURES if config.coordinates else 0
    inputs += config.layout_features if config.text_features else 0
    return inputs + (config.latent_channels + 2 if config.nearest_known else 0)


class LinearPath(nnx.Module):
    """`[b f h w c]`: the part of a prediction that is linear in what the network is shown.

        sum_ij k_ij(frame) * scale_i * term_j,    scales: 1, nearness, level / 10;    terms: z, nearest known tokens

    with one coefficient per channel from the frame's embedding, zero at first; nearness and context level are those of
    the nearest known token (without `nearest_known` the only term is `k z`). The norms before the last convolution take
    scale and mean from a frame; what stays as it was need not find its way around them. The preconditioning of Karras
    et al. (2022) is the term in `z` with a fixed coefficient.
    """

    def __init__(self, config: UNetConfig):
        self.terms = 6 if config.nearest_known else 1
        self.coefficients = Dense(config.embedding_features, self.terms * config.latent_channels, init_scale=0.0)

    def __call__(self, embedding: Array, z: Latents, near: Array | None) -> Latents:
        """near: what `nearest_known` found for tokens made of the channels of `z` and the level."""
        k = self.coefficients(jax.nn.silu(embedding)).astype(jnp.float32)
        k = k.reshape(*k.shape[:2], 1, 1, self.terms, -1)
        if near is None:
            return k[..., 0, :] * z
        values, level, nearness = near[..., :-2], near[..., -2:-1], near[..., -1:]
        terms = [scale * term for term in (z, values) for scale in (1.0, nearness, level)]
        return sum((k[..., index, :] * term for index, term in enumerate(terms)), jnp.zeros_like(z))


def nearest_known(tokens: Array, known_mask: KnownMask, times: Array) -> Array:
    """`[b f h w c] -> [b f h w c + 1]`: what is known at that place in the nearest frame in time, and how near.

    Of two equally near frames the earlier one counts. The last channel is `1 / (1 + gap)`, the gap in units of `times`
    (`[b f]`); where nothing is known at that place, all channels are 0.
    """
    times = times.astype(jnp.float32)[:, :, None, None]
    known = known_mask[..., 0] > 0.5
    gap = jnp.abs(times[:, :, None] - times[:, None])  # [b f (to) f (from) 1 1]
    source = jnp.where(known[:, None], gap, jnp.inf).argmin(axis=2)
    nearness = 1.0 / (1.0 + jnp.abs(times - jnp.take_along_axis(times, source, axis=1)))
    found = jnp.concatenate([jnp.take_along_axis(tokens, source[..., None], axis=1), nearness[..., None]], axis=-1)
    return jnp.where(known.any(axis=1)[:, None, ..., None], found, 0.0)
