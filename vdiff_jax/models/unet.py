"""`VideoUNet`: the factorised space-time UNet whose noise level is per frame.

Input channels are `concat(z, known_mask, known_mask * context_logsnr / 10, coordinates, layout, nearest known)`; each
frame has its own embedding made of its noise level, its time stamp, the gaps to its neighbours and the pooled prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models.blocks import ResBlock, SpaceTimeBlock
from vdiff_jax.models.layers import (
    COORDINATE_FEATURES,
    Dense,
    Downsample,
    FrameConv,
    GroupNorm,
    Upsample,
    coordinate_embedding,
    sinusoidal_embedding,
)
from vdiff_jax.types import Array, Conditioning, KnownMask, Latents, LogSNR

Remat = Literal["none", "blocks", "dots"]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a `VideoUNet`.

    latent_channels: channels of `z` and of the prediction.
    channels: width of each level, full resolution first; each further level halves height and width.
    attention: per level, whether its blocks carry spatial and temporal transformers.
    text_features: width of the prompt tokens, None for an unconditional model.
    coordinates: tell every token where in the frame it stands. Convolutions find that out from their zero padding
        alone, slowly; words like "left" in a prompt need it at once.
    layout_features: input channels that say where and when things shall be, see `PromptLayout`; 0 for none.
    nearest_known: show every token what is known at its place in the nearest frame in time, see `nearest_known`. Most
        of a frame to predict or fill in is already there.
    linear_path: add to the prediction what is linear in `z` and the nearest known tokens, see `LinearPath`.
    dtype: compute type, "float32" or "bfloat16"; parameters and norms are fp32 always.
    remat: "none", "blocks" (recompute each block in the backward pass) or "dots" (as blocks, but keep matmuls).
    """

    latent_channels: int = 4
    channels: tuple[int, ...] = (64, 128)
    blocks_per_level: int = 1
    attention: tuple[bool, ...] = (True, True)
    text_features: int | None = 64
    coordinates: bool = True
    layout_features: int = 32
    nearest_known: bool = False
    linear_path: bool = False
    embedding_features: int = 256
    head_dim: int = 32
    norm_groups: int = 8
    dtype: str = "float32"
    remat: Remat = "none"
    attention_implementation: str = "auto"

    def __post_init__(self):
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"unet.attention has {len(self.attention)} entries for {len(self.channels)} levels in unet.channels: "
                "give one True or False per level"
            )
        if self.remat not in ("none", "blocks", "dots"):
            raise ValueError(f"unet.remat={self.remat!r} is unknown: choose none, blocks or dots")

    @classmethod
    def native(cls, size: str = "1M", **overrides: Any) -> UNetConfig:
        """Presets by approximate parameter count: "1M", "3M", "10M", "100M", "500M", "1B"."""
        presets: dict[str, dict[str, Any]] = {
            "1M": dict(channels=(32, 64), attention=(False, True), embedding_features=128),
            "3M": dict(channels=(32, 96), attention=(False, True), embedding_features=192),
            "10M": dict(channels=(64, 128, 160), attention=(False, True, True), embedding_features=256),
            "100M": dict(channels=(128, 256, 384), attention=(True,) * 3, embedding_features=512),
            "500M": dict(channels=(256, 512, 768, 768), attention=(True,) * 4, embedding_features=1024),
            "1B": dict(channels=(320, 640, 1280, 1280), attention=(True, True, True, False), embedding_features=1280),
        }
        wide = dict(blocks_per_level=2, head_dim=64, norm_groups=32) if size in ("100M", "500M", "1B") else {}
        if size not in presets:
            raise ValueError(f"UNet size {size!r} is unknown: choose one of {', '.join(presets)}")
        return cls(**{**presets[size], **wide, **overrides})


class VideoUNet(nnx.Module):
    """`prediction = unet(z, logsnr, known_mask, context_logsnr, cond)`, see `types.PredictFn`."""

    def __init__(self, config: UNetConfig):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        block: dict[str, Any] = dict(
            embedding_features=config.embedding_features,
            text_features=config.text_features,
            coordinates=config.coordinates,
            head_dim=config.head_dim,
            norm_groups=config.norm_groups,
            implementation=config.attention_implementation,
            dtype=dtype,
        )
        self.embedding = FrameEmbedding(config)
        self.layout = PromptLayout(config) if config.text_features and config.layout_features else None
        inputs = config.latent_channels + 2
        inputs += COORDINATE_FEATURES if config.coordinates else 0
        inputs += config.layout_features if self.layout else 0
        inputs += config.latent_channels + 2 if config.nearest_known else 0
        self.conv_in = FrameConv(inputs, config.channels[0], dtype=dtype)

        skips = [config.channels[0]]
        width = config.channels[0]
        down, downsamplers = [], []
        for level, features in enumerate(config.channels):
            for _ in range(config.blocks_per_level):
                down.append(SpaceTimeBlock(width, features, attention=config.attention[level], **block))
                width = features
                skips.append(width)
            if level < len(config.channels) - 1:
                downsamplers.append(Downsample(width, dtype=dtype))
                skips.append(width)
        self.down, self.downsamplers = nnx.List(down), nnx.List(downsamplers)

        self.mid = SpaceTimeBlock(width, width, attention=config.attention[-1], **block)
        self.mid_out = ResBlock(
            width, width, config.embedding_features, norm_groups=config.norm_groups, dtype=dtype
        )  # fmt: skip

        up, upsamplers = [], []
        for level, features in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks_per_level + 1):
                up.append(SpaceTimeBlock(width + skips.pop(), features, attention=config.attention[level], **block))
                width = features
            if level > 0:  # narrow before the wide grid: the convolution there is the dearest of the level
                upsamplers.append(Upsample(width, config.channels[level - 1], dtype=dtype))
                width = config.channels[level - 1]
        self.up, self.upsamplers = nnx.List(up), nnx.List(upsamplers)

        self.norm_out = GroupNorm(width, groups=config.norm_groups, scope="frame", epsilon=1e-5, dtype=dtype)
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
        level = known_mask * context_logsnr[:, :, None, None, None] / 10.0
        # A frame known in all its tokens is at its context level, whatever the level of the others.
        whole = known_mask.min(axis=(2, 3, 4)) > 0.5
        embedding = self.embedding(jnp.where(whole, context_logsnr, logsnr), cond)
        inputs = [z, known_mask, level]
        if config.coordinates:
            where = coordinate_embedding(z.shape[2], z.shape[3])
            inputs.append(jnp.broadcast_to(where[None, None], (*z.shape[:-1], where.shape[-1])))
        if self.layout is not None:
            inputs.append(self.layout(cond, z.shape))
        near = None
        if config.nearest_known:
            near = nearest_known(jnp.concatenate([z, level], axis=-1), known_mask, cond.times)
            inputs.append(near)
        x = self.conv_in(jnp.concatenate(inputs, axis=-1))

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
        x = self.mid_out(x, embedding)

        up, upsamplers = iter(self.up), iter(self.upsamplers)
        for level_index in reversed(range(len(config.channels))):
            for _ in range(config.blocks_per_level + 1):
                x = self._run(next(up), jnp.concatenate([x, skips.pop()], axis=-1), embedding, cond)
            if level_index > 0:
                x = next(upsamplers)(x)
        x = self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)
        return x if self.linear_path is None else x + self.linear_path(embedding, z, near)

    def _run(self, block: SpaceTimeBlock, x: Array, embedding: Array, cond: Conditioning) -> Array:
        if self.config.remat == "none":
            return block(x, embedding, cond)
        policy = jax.checkpoint_policies.dots_saveable if self.config.remat == "dots" else None
        return jax.checkpoint(lambda b, *args: b(*args), policy=policy)(block, x, embedding, cond)


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


TIME_FEATURES = 64


def time_embedding(times: Array) -> Array:
    """`[b f] -> [b f 3 * 64]`: sinusoids of the time from the middle of the window and of the gaps to both neighbours.

    Shifting a clip in time changes nothing. A single frame has gaps of zero.
    """
    times = times.astype(jnp.float32)
    gaps = jnp.diff(times, axis=1)
    first, last = (gaps[:, :1], gaps[:, -1:]) if times.shape[1] > 1 else (jnp.zeros_like(times),) * 2
    stamps = jnp.stack(
        [
            times - times.mean(axis=1, keepdims=True),
            jnp.concatenate([first, gaps], axis=1),
            jnp.concatenate([gaps, last], axis=1),
        ],
        axis=-1,
    )
    return sinusoidal_embedding(stamps, TIME_FEATURES, max_period=200.0).reshape(*times.shape, -1)


def pool_text(text: Array, text_mask: Array | None) -> Array:
    """`[b n d] -> [b d]`: sum over the tokens by the root of their number, so one word is not lost in a long prompt."""
    mask = jnp.ones(text.shape[:2]) if text_mask is None else text_mask.astype(jnp.float32)
    return (text * mask[..., None]).sum(1) / jnp.sqrt(jnp.maximum(mask.sum(1, keepdims=True), 1.0))


class FrameEmbedding(nnx.Module):
    """`[b f e]`: noise level, time stamp, gaps to the neighbour frames, pooled prompt.

    The level enters as `u = 2/pi atan(exp(-logsnr/2))` in [0, 1] (the angle of the VP process), times 1000.
    """

    def __init__(self, config: UNetConfig):
        features, hidden = 64, config.embedding_features
        self.level = Dense(features, hidden)
        self.time = Dense(3 * TIME_FEATURES, hidden)
        self.text = Dense(config.text_features, hidden) if config.text_features else None
        self.hidden = Dense(hidden, hidden)
        self.features = features

    def __call__(self, logsnr: LogSNR, cond: Conditioning) -> Array:
        angle = jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -40.0, 40.0))) * (2.0 / jnp.pi)
        hidden = self.level(sinusoidal_embedding(1000.0 * angle, self.features)) + self.time(time_embedding(cond.times))
        if self.text is not None and cond.text is not None:
            hidden = hidden + self.text(pool_text(cond.text, cond.text_mask))[:, None]
        return self.hidden(jax.nn.silu(hidden))


class PromptLayout(nnx.Module):
    """`[b f h w r]`: what the prompt says about where things are when, as input channels.

        layout_r(t, y, x) = prompt_r * time_r(t) * place_r(y, x)

    "Moving left" means right of the middle early and left of it late. Prompt, time and place say nothing about that
    one by one or two by two, so a network that is given them one by one starts without a slope towards their product:
    ours saw 93 thousand clips and never followed a direction. Given products to choose from, it does so first of all.
    """

    def __init__(self, config: UNetConfig):
        assert config.text_features is not None
        self.prompt = Dense(config.text_features, config.layout_features)
        self.time = Dense(3 * TIME_FEATURES, config.layout_features)
        self.place = Dense(COORDINATE_FEATURES, config.layout_features)
        self.features = config.layout_features

    def __call__(self, cond: Conditioning, shape: tuple[int, ...]) -> Array:
        """shape: `(b, f, h, w, ...)` of the latents. Zero without a prompt."""
        if cond.text is None:
            return jnp.zeros((*shape[:4], self.features))
        wanted = self.prompt(pool_text(cond.text, cond.text_mask))[:, None] * self.time(time_embedding(cond.times))
        return wanted[:, :, None, None] * self.place(coordinate_embedding(shape[2], shape[3]))[None, None]
