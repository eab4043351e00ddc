"""The UNets of the parity tests: small configurations of every public family, and their inputs. Numpy only.

Widths are multiples of 32, which diffusers' hard-wired group norms need; every case has an odd number of frames, a
non-square size and two clips.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from golden.seeded_weights import seeded_input

TEXT = 24
GRADIENT_OF = "mid_block."
STRIDES = {"blocks": 5, "gradients": 37}
"""Of block outputs and gradients, every n-th number is kept."""

_SMALL: dict[str, Any] = dict(block_out_channels=[32, 64], layers_per_block=1, cross_attention_dim=TEXT)


def _types(plain: str) -> dict[str, list[str]]:
    return {
        "down_block_types": [f"CrossAttnDown{plain}", f"Down{plain}"],
        "up_block_types": [f"Up{plain}", f"CrossAttnUp{plain}"],
    }


CASES: dict[str, dict[str, Any]] = {
    "modelscope": dict(_class_name="UNet3DConditionModel", **_SMALL, **_types("Block3D"), attention_head_dim=16),
    "animatediff": dict(
        _class_name="UNetMotionModel",
        **_SMALL,
        **_types("BlockMotion"),
        num_attention_heads=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=True,
    ),
    "image": dict(_class_name="UNet2DConditionModel", **_SMALL, **_types("Block2D"), attention_head_dim=4),
    "svd": dict(
        _class_name="UNetSpatioTemporalConditionModel",
        **_SMALL,
        **_types("BlockSpatioTemporal"),
        num_attention_heads=[2, 4],
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
        transformer_layers_per_block=[2, 1],
    ),
    "i2vgen": dict(_class_name="I2VGenXLUNet", **_SMALL, **_types("Block3D"), attention_head_dim=16),
}


def widened(case: dict[str, Any], channels: list[int]) -> dict[str, Any]:
    """The same case with other widths and two layers; levels are added in front, all with attention."""
    more = len(channels) - len(case["block_out_channels"])
    wide = dict(case, block_out_channels=channels, layers_per_block=2)
    wide["down_block_types"] = [case["down_block_types"][0]] * more + case["down_block_types"]
    wide["up_block_types"] = case["up_block_types"] + [case["up_block_types"][1]] * more
    for name in ("num_attention_heads", "transformer_layers_per_block"):
        if isinstance(case.get(name), list):
            wide[name] = case[name][:1] * more + case[name]
    return wide


def inputs(case: dict[str, Any], batch: int = 2, frames: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    """Inputs in our layout, `[b f h w c]`; a timestep that is no round number for the continuous family."""
    family = case["_class_name"]
    svd, i2vgen = family == "UNetSpatioTemporalConditionModel", family == "I2VGenXLUNet"
    values: dict[str, Any] = dict(
        z=seeded_input("z", (batch, frames, height, width, 4)),
        text=seeded_input("text", (batch, 2 if svd else 7, case["cross_attention_dim"])),
        timestep=np.float32(0.873) if svd else np.int64(741),
        cotangent=seeded_input("cotangent", (batch, frames, height, width, 4)),
    )
    if svd:
        values["image_latents"] = seeded_input("image", (batch, frames, height, width, 4))
        values["added"] = np.array([[6, 127, 0.02], [24, 40, 0.1]] * batch, np.float32)[:batch]
    if i2vgen:
        values["image_latents"] = seeded_input("image", (batch, frames, height, width, 4))
        values["image_embedding"] = seeded_input("embedding", (batch, case["cross_attention_dim"]))
        values["added"] = np.array([[16], [8]] * batch, np.float32)[:batch]
    return values


def block_names(case: dict[str, Any]) -> list[str]:
    """The last module of every one of our blocks, in the order of a forward pass."""
    family, layers = case["_class_name"], case["layers_per_block"]
    temporal = "motion_modules" if family == "UNetMotionModel" else "temp_attentions"

    def last(place: str, layer: int, attention: bool) -> str:
        if family == "UNetMotionModel":
            return f"{place}.motion_modules.{layer}"
        if family in ("UNet2DConditionModel", "UNetSpatioTemporalConditionModel"):
            return f"{place}.{'attentions' if attention else 'resnets'}.{layer}"
        return f"{place}.{temporal if attention else 'temp_convs'}.{layer}"

    names = []
    for level, kind in enumerate(case["down_block_types"]):
        names += [last(f"down_blocks.{level}", layer, "CrossAttn" in kind) for layer in range(layers)]
    names.append(last("mid_block", 0, True))
    names.append("mid_block.temp_convs.1" if "Block3D" in case["down_block_types"][0] else "mid_block.resnets.1")
    for level, kind in enumerate(case["up_block_types"]):
        names += [last(f"up_blocks.{level}", layer, "CrossAttn" in kind) for layer in range(layers + 1)]
    return names
