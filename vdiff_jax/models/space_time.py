"""`SpaceTimeBlock`: one step of a `VideoUNet` on its way down or up, for every family."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from vdiff_jax.models.blocks import ResBlock, SpatialTransformer
from vdiff_jax.models.temporal import (
    MixedConvBlock,
    MixedTransformer,
    MotionTransformer,
    TemporalConvBlock,
    TemporalConvStack,
    TemporalTransformer,
)
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.types import Array, Conditioning


class SpaceTimeBlock(nnx.Module):
    """Residual block, temporal convolution, then (where `attention`) spatial and temporal transformer.

    Which temporal parts there are is the family's matter:

        native      one convolution and, where `attention`, a transformer over real time stamps
        modelscope  four convolutions and, where `attention`, a transformer of two self-attentions
        svd         a temporal residual block and, where `attention`, temporal layers among the spatial ones, all mixed
        animatediff a motion module, whatever `attention` says
        image       none

    level: index of the level of the UNet. motion: False leaves the motion module out.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_features: int,
        out_features: int,
        *,
        level: int,
        attention: bool,
        epsilon: float = 1e-5,
        motion: bool = True,
    ):
        family, embedding = config.family, config.embedding_features
        shared: dict[str, Any] = dict(norm_groups=config.norm_groups, dtype=jnp.dtype(config.dtype))
        heads: dict[str, Any] = dict(
            head_dim=config.level_head_dim(level), implementation=config.attention_implementation, **shared
        )
        self.res = ResBlock(
            in_features,
            out_features,
            embedding,
            epsilon=epsilon,
            modulation="film" if family == "native" else "add",
            scope=config.resnet_norm,
            **shared,
        )
        self.temporal_conv = _temporal_conv(config, out_features, epsilon, shared)
        self.spatial = _spatial(config, out_features, level, heads) if attention else None
        self.temporal = _temporal(config, out_features, attention, motion, heads)

    def __call__(self, x: Array, embedding: Array, cond: Conditioning) -> Array:
        x = self.res(x, embedding, valid=cond.valid)
        if self.temporal_conv is not None:
            x = self.temporal_conv(x, embedding, valid=cond.valid)
        if self.spatial is not None:
            x = self.spatial(x, cond)
        return x if self.temporal is None else self.temporal(x, cond.times, cond.valid)


def _temporal_conv(config: UNetConfig, features: int, epsilon: float, shared: dict[str, Any]) -> Any:
    if config.family == "native":
        return TemporalConvBlock(features, config.embedding_features, **shared)
    if config.family in ("modelscope", "i2vgen"):
        return TemporalConvStack(features, **shared)
    if config.family == "svd":
        return MixedConvBlock(features, config.embedding_features, epsilon=epsilon, **shared)
    return None


def _spatial(config: UNetConfig, features: int, level: int, heads: dict[str, Any]) -> Any:
    text, layers = config.text_features, config.level_layers(level)
    if config.family == "svd":
        return MixedTransformer(features, text_features=text, layers=layers, **heads)
    extent = dict(layers=0, expansion=2) if config.family == "native" else dict(layers=layers, expansion=4)
    return SpatialTransformer(features, text_features=text, coordinates=config.coordinates, **extent, **heads)


def _temporal(config: UNetConfig, features: int, attention: bool, motion: bool, heads: dict[str, Any]) -> Any:
    if config.family == "native" and attention:
        return TemporalTransformer(features, **heads)
    if config.family in ("modelscope", "i2vgen") and attention:
        return MotionTransformer(features, heads=features // heads["head_dim"], **heads)
    if config.family == "animatediff" and motion:
        return MotionTransformer(
            features,
            heads=config.motion_heads,
            layers=config.motion_layers,
            positions=config.motion_positions,
            scope=config.motion_norm,
            **{**heads, "head_dim": features // config.motion_heads},
        )
    return None
