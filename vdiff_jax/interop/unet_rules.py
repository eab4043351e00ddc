"""What the layers of public UNets are called in diffusers' checkpoints and in ours, see `interop.weights`.

The tables of one block are data; `unet_rules` sets them at every place that a configuration has.
"""

from __future__ import annotations

import numpy as np

from vdiff_jax.interop.weights import Rule, nested
from vdiff_jax.models.unet_config import UNetConfig

RESNET: list[Rule] = [
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv"),
    ("time_emb_proj", "time", "dense"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv"),
    ("conv_shortcut", "shortcut", "conv1x1"),
]
TEMPORAL_CONV: list[Rule] = [
    ("conv1.0", "norms.0", "norm"),
    ("conv1.2", "convs.0", "temporal_conv"),
    ("conv2.0", "norms.1", "norm"),
    ("conv2.3", "convs.1", "temporal_conv"),
    ("conv3.0", "norms.2", "norm"),
    ("conv3.3", "convs.2", "temporal_conv"),
    ("conv4.0", "norms.3", "norm"),
    ("conv4.3", "convs.3", "temporal_conv"),
]
TEMPORAL_RESNET: list[Rule] = [
    ("temporal_res_block.norm1", "res.norm1", "norm"),
    ("temporal_res_block.conv1", "res.conv1", "temporal_conv"),
    ("temporal_res_block.time_emb_proj", "res.time", "dense"),
    ("temporal_res_block.norm2", "res.norm2", "norm"),
    ("temporal_res_block.conv2", "res.conv2", "temporal_conv"),
    ("time_mixer.mix_factor", "mixer.mix_factor", "tensor"),
]
ATTENTION: list[Rule] = [
    ("to_q", "to_q", "dense"),
    ("to_k", "to_k", "dense"),
    ("to_v", "to_v", "dense"),
    ("to_out.0", "to_out", "dense"),
]
FEEDFORWARD: list[Rule] = [("net.0.proj", "proj_in", "dense"), ("net.2", "proj_out", "dense")]
LAYER: list[Rule] = [
    ("norm1", "norm1", "norm"),
    *nested("attn1", "attn1", ATTENTION),
    ("norm2", "norm2", "norm"),
    *nested("attn2", "attn2", ATTENTION),
    ("norm3", "norm3", "norm"),
    *nested("ff", "feedforward", FEEDFORWARD),
]
MIXED_LAYER: list[Rule] = [
    ("norm_in", "norm_in", "norm"),
    *nested("ff_in", "feedforward_in", FEEDFORWARD),
    *[(theirs, f"layer.{ours}", kind) for theirs, ours, kind in LAYER],
]
MIXED_TRANSFORMER: list[Rule] = [
    ("time_pos_embed.linear_1", "position_in", "dense"),
    ("time_pos_embed.linear_2", "position_out", "dense"),
    ("time_mixer.mix_factor", "mixer.mix_factor", "tensor"),
]
IMAGE_CONTEXT: list[Rule] = [
    ("image_latents_proj_in.0", "input_convs.0", "conv"),
    ("image_latents_proj_in.2", "input_convs.1", "conv"),
    ("image_latents_proj_in.4", "input_convs.2", "conv"),
    ("image_latents_temporal_encoder.norm1", "norm", "norm"),
    *nested("image_latents_temporal_encoder.attn1", "attention", ATTENTION),
    ("image_latents_temporal_encoder.ff.net.0.proj", "proj_in", "dense"),
    ("image_latents_temporal_encoder.ff.net.2", "proj_out", "dense"),
    ("image_latents_context_embedding.0", "token_convs.0", "conv"),
    ("image_latents_context_embedding.3", "token_convs.1", "conv"),
    ("image_latents_context_embedding.5", "token_convs.2", "conv"),
    ("context_embedding.0", "embedding_in", "dense"),
    ("context_embedding.2", "embedding_out", "dense"),
]


def transformer_rules(layers: int, projection: str = "dense") -> list[Rule]:
    """A transformer between two projections, which are stored as "dense" or "conv1x1"."""
    rules: list[Rule] = [("norm", "norm", "norm"), ("proj_in", "proj_in", projection)]
    rules.append(("proj_out", "proj_out", projection))
    for index in range(layers):
        rules += nested(f"transformer_blocks.{index}", f"layers.{index}", LAYER)
        rules += nested(f"temporal_transformer_blocks.{index}", f"temporal_layers.{index}", MIXED_LAYER)
    return rules + MIXED_TRANSFORMER


def unet_rules(config: UNetConfig) -> list[Rule]:
    """The table of a public UNet. Raises ValueError for one of ours, which no other library reads."""
    if not config.reads_timesteps:
        raise ValueError("a UNet of family 'native' has no counterpart in diffusers: save it in our own format")
    added = "fps_embedding" if config.family == "i2vgen" else "add_embedding"
    added_in, added_out = (
        (f"{added}.0", f"{added}.2") if config.family == "i2vgen" else (f"{added}.linear_1", f"{added}.linear_2")
    )
    rules: list[Rule] = [
        ("conv_in", "conv_in", "conv"),
        ("time_embedding.linear_1", "embedding.time_in", "dense"),
        ("time_embedding.linear_2", "embedding.time_out", "dense"),
        (added_in, "embedding.added_in", "dense"),
        (added_out, "embedding.added_out", "dense"),
        ("conv_norm_out", "norm_out", "norm"),
        ("conv_out", "conv_out", "conv"),
        *nested("transformer_in", "transformer_in", transformer_rules(1)),
        *[(theirs, f"image_context.{ours}", kind) for theirs, ours, kind in IMAGE_CONTEXT],
    ]
    levels = len(config.channels)
    for level in range(levels):
        there = f"down_blocks.{level}"
        for layer in range(config.blocks_per_level):
            rules += _block(config, there, layer, f"down.{level * config.blocks_per_level + layer}", level)
        rules.append((f"{there}.downsamplers.0.conv", f"downsamplers.{level}.conv", "conv"))
    rules += _block(config, "mid_block", 0, "mid", levels - 1)
    rules += _block(config, "mid_block", 1, "mid_out", levels - 1)
    for place in range(levels):
        there = f"up_blocks.{place}"
        for layer in range(config.blocks_per_level + 1):
            index = place * (config.blocks_per_level + 1) + layer
            rules += _block(config, there, layer, f"up.{index}", levels - 1 - place)
        rules.append((f"{there}.upsamplers.0.conv", f"upsamplers.{place}.conv", "conv"))
    return rules


def _block(config: UNetConfig, there: str, layer: int, here: str, level: int) -> list[Rule]:
    """All that a `SpaceTimeBlock` may hold; parts that a family lacks name no parameter and are passed over."""
    resnet = f"{there}.resnets.{layer}"
    layers = config.level_layers(level)
    if config.family == "svd":
        rules = nested(f"{resnet}.spatial_res_block", f"{here}.res", RESNET)
        rules += nested(resnet, f"{here}.temporal_conv", TEMPORAL_RESNET)
    else:
        rules = nested(resnet, f"{here}.res", RESNET)
        rules += nested(f"{there}.temp_convs.{layer}", f"{here}.temporal_conv", TEMPORAL_CONV)
    projection = "conv1x1" if config.conv_projection else "dense"
    rules += nested(f"{there}.attentions.{layer}", f"{here}.spatial", transformer_rules(layers, projection))
    temporal = "motion_modules" if config.family == "animatediff" else "temp_attentions"
    motion_layers = config.motion_layers if config.family == "animatediff" else 1
    return rules + nested(f"{there}.{temporal}.{layer}", f"{here}.temporal", transformer_rules(motion_layers))


def motion_buffers(config: UNetConfig) -> dict[str, np.ndarray]:
    """The tables of positions that diffusers keeps beside the weights of every motion module, by name."""
    if config.family != "animatediff" or not config.motion_positions:
        return {}
    buffers = {}
    for ours, theirs in motion_places(config).items():
        width = config.channels[_level_of(config, ours)]
        table = _sinusoids(config.motion_positions, width)
        for index in range(config.motion_layers):
            buffers[f"{theirs}.transformer_blocks.{index}.pos_embed.pe"] = table
    return buffers


def motion_places(config: UNetConfig) -> dict[str, str]:
    """Our name of every block with a motion module -> diffusers' name of the module."""
    places = {}
    for level in range(len(config.channels)):
        for layer in range(config.blocks_per_level):
            places[f"down.{level * config.blocks_per_level + layer}"] = f"down_blocks.{level}.motion_modules.{layer}"
        for layer in range(config.blocks_per_level + 1):
            index = level * (config.blocks_per_level + 1) + layer
            places[f"up.{index}"] = f"up_blocks.{level}.motion_modules.{layer}"
    if config.motion_mid:
        places["mid"] = "mid_block.motion_modules.0"
    return places


def _level_of(config: UNetConfig, place: str) -> int:
    side, _, index = place.partition(".")
    last = len(config.channels) - 1
    if side == "down":
        return int(index) // config.blocks_per_level
    return last if side == "mid" else last - int(index) // (config.blocks_per_level + 1)


def _sinusoids(length: int, features: int) -> np.ndarray:
    """`[1 n d]` f32, see `models.temporal.interleaved_sinusoids`; in the precision in which the buffers are made."""
    frequencies = np.exp(np.arange(0, features, 2, dtype=np.float32) * np.float32(-np.log(10_000.0) / features))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(1, length, features)
