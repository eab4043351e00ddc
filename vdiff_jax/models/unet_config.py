"""`UNetConfig`: the shape of a `VideoUNet`, ours by size and the public networks by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from vdiff_jax.models.layers import Scope

Remat = Literal["none", "blocks", "dots"]
Family = Literal["native", "image", "animatediff", "modelscope", "i2vgen", "svd"]


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

    Public networks, by `family`; the three fields of inputs above do not apply to them:

    family: "native" (ours), "image" (Stable Diffusion's 2-D UNet on every frame), "animatediff" (the same with motion
        modules), "modelscope" (ModelScope, ZeroScope), "i2vgen" (I2VGen-XL) or "svd" (Stable Video Diffusion).
    heads: attention heads of each level; empty = `channels / head_dim`.
    transformer_layers: layers of each level's spatial transformers; empty = 1 everywhere.
    conditioning_channels: channels of `cond.image_latents`, which are input beside `z`.
    added_features: sinusoids per number in `cond.added` (SVD: 256); added_count: how many numbers.
    motion_*: AnimateDiff's modules: heads, layers, whether one stands in the middle, length of their table of
        positions, scope of their norm ("video" as diffusers computes it, "frame" as AnimateDiff's own code).
    resnet_norm: scope of the residual blocks' norms and the last one; "video" in the first version of AnimateDiff only.
    conv_projection: the projections around the spatial transformers are stored as 1 x 1 convolutions (SD 1.x). Same
        numbers, another layout of the file.
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
    family: Family = "native"
    heads: tuple[int, ...] = ()
    transformer_layers: tuple[int, ...] = ()
    conditioning_channels: int = 0
    added_features: int = 0
    added_count: int = 0
    motion_heads: int = 8
    motion_layers: int = 1
    motion_mid: bool = True
    motion_positions: int = 32
    motion_norm: Scope = "video"
    resnet_norm: Scope = "frame"
    conv_projection: bool = False

    def __post_init__(self):
        if self.family not in get_args(Family):
            raise ValueError(f"unet.family={self.family!r} is unknown: choose one of {', '.join(get_args(Family))}")
        for name in ("heads", "transformer_layers"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"unet.{name} has {len(getattr(self, name))} entries for {len(self.channels)} levels")
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"unet.attention has {len(self.attention)} entries for {len(self.channels)} levels in unet.channels: "
                "give one True or False per level"
            )
        if self.remat not in ("none", "blocks", "dots"):
            raise ValueError(f"unet.remat={self.remat!r} is unknown: choose none, blocks or dots")

    @property
    def reads_timesteps(self) -> bool:
        """Whether the network is told its checkpoint's timesteps, not log-SNR, and nothing of what is known."""
        return self.family != "native"

    def level_head_dim(self, level: int) -> int:
        """Channels of an attention head at a level."""
        return self.channels[level] // self.heads[level] if self.heads else self.head_dim

    def level_layers(self, level: int) -> int:
        """Transformer layers of a level's spatial transformers."""
        return self.transformer_layers[level] if self.transformer_layers else 1

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

    @classmethod
    def modelscope(cls, **overrides: Any) -> UNetConfig:
        """ModelScope text-to-video 1.7B and ZeroScope: diffusers' `UNet3DConditionModel`, 1.41 B parameters."""
        return cls(**{**_public("modelscope"), **dict(head_dim=64, text_features=1024), **overrides})

    @classmethod
    def animatediff_sd15(cls, version: int = 3, **overrides: Any) -> UNetConfig:
        """Stable Diffusion 1.5 with a motion adapter, diffusers' `UNetMotionModel`; version 1, 2 or 3 of the adapter.

        Raises ValueError for another version.
        """
        if version not in (1, 2, 3):
            raise ValueError(f"AnimateDiff version {version} is unknown: choose 1, 2 or 3")
        motion = dict(motion_mid=version == 2, motion_positions=24 if version == 1 else 32)
        return cls(**{**_public("animatediff"), **_SD15, **motion, **overrides})

    @classmethod
    def image_sd15(cls, **overrides: Any) -> UNetConfig:
        """Stable Diffusion 1.5's `UNet2DConditionModel`, 860 M parameters, on every frame by itself."""
        return cls(**{**_public("image"), **_SD15, **overrides})

    @classmethod
    def svd(cls, **overrides: Any) -> UNetConfig:
        """Stable Video Diffusion: diffusers' `UNetSpatioTemporalConditionModel`, 1.52 B parameters."""
        svd = dict(heads=(5, 10, 20, 20), text_features=1024, conditioning_channels=4)
        return cls(**{**_public("svd"), **svd, **dict(added_features=256, added_count=3), **overrides})

    @classmethod
    def i2vgen_xl(cls, **overrides: Any) -> UNetConfig:
        """I2VGen-XL: diffusers' `I2VGenXLUNet`, 1.42 B parameters."""
        i2v = dict(head_dim=64, text_features=1024, conditioning_channels=4, added_count=1)
        return cls(**{**_public("i2vgen"), **i2v, **dict(added_features=320), **overrides})


def _public(family: str) -> dict[str, Any]:
    return dict(
        family=family,
        channels=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        blocks_per_level=2,
        norm_groups=32,
        embedding_features=1280,
        coordinates=False,
        layout_features=0,
    )


_SD15: dict[str, Any] = dict(heads=(8, 8, 8, 8), text_features=768, conv_projection=True)
