"""AnimateDiff's motion adapters (Guo et al. 2024): an image UNet and motion modules, together or apart.

An adapter is a folder of diffusers, or one file with the names of AnimateDiff's own code. The two compute the norm at
the head of a motion module differently with the same weights: diffusers over the clip, AnimateDiff over each frame;
`motion_norm` follows the source, unless it is given.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vdiff_jax.components import Component, make_component
from vdiff_jax.interop import hub
from vdiff_jax.interop.pretrained import load_json, save_json
from vdiff_jax.interop.unet_rules import motion_buffers, unet_rules
from vdiff_jax.interop.unets import IGNORED_KEYS, load_unet, unet_settings
from vdiff_jax.interop.weight_files import Weights, dtype_of, open_weights
from vdiff_jax.interop.weights import Reading, load_params, save_weights
from vdiff_jax.trees import joined, split
from vdiff_jax.types import Array, Params

ORIGINAL_NAMES: tuple[tuple[str, str], ...] = (
    (r"^module\.", ""),
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
)
"""From the names in AnimateDiff's own files to those of diffusers."""
_ADAPTER_DEFAULTS = {
    "motion_mid_block_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
    "conv_in_channels": None,
}
_TEMPORAL = re.compile(r"(^|\.)temporal\.")


def adapter_settings(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of a `UNetConfig` that the config.json of a diffusers MotionAdapter decides.

    Raises ValueError, naming the field, for what is not built.
    """
    for field, value in _ADAPTER_DEFAULTS.items():
        if config.get(field, value) not in (value, None):
            raise ValueError(f"{source} has {field}={config[field]!r}: only {value!r} is built")
    layers = config.get("motion_transformer_layers_per_block", 1)
    if not isinstance(layers, int):
        raise ValueError(f"{source} has motion_transformer_layers_per_block={layers!r}: only one number is built")
    return dict(
        motion_heads=config.get("motion_num_attention_heads", 8),
        motion_layers=layers,
        motion_mid=bool(config.get("use_motion_mid_block", True)),
        motion_positions=config.get("motion_max_seq_length", 32),
        motion_norm="video",
        resnet_norm="frame",
    )


def original_settings(weights: Weights) -> dict[str, Any]:
    """The same for a file of AnimateDiff's own code, from its tensors.

    The first version has 24 positions, and its image network's norms over the clip too.
    Raises ValueError for a file that holds no motion modules.
    """
    tables = [shape for name, shape in weights.items() if name.endswith("pos_encoder.pe")]
    if not tables:
        raise ValueError(f"{weights.source} holds no motion modules of AnimateDiff: no tensor ends in pos_encoder.pe")
    positions = tables[0][1]
    return dict(
        motion_heads=8,
        motion_layers=1,
        motion_mid=any("mid_block" in name for name in weights),
        motion_positions=positions,
        motion_norm="frame",
        resnet_norm="video" if positions == 24 else "frame",
    )


def load_animated(
    unet_folder: str | Path,
    adapter: str | Path | None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    reading: Reading | None = None,
    **overrides: Any,
) -> tuple[Component, Params]:
    """An image UNet with motion modules.

    Args:
        unet_folder: a UNet2DConditionModel, or a UNetMotionModel, which brings modules of its own.
        adapter: a folder of diffusers, a file of AnimateDiff, or a folder on the hub; None keeps the modules of a
            UNetMotionModel, and gives an image UNet fresh ones, with which it equals itself on every frame.
        overrides: fields of `UNetConfig`. The other arguments are those of `load_unet`.
    Raises:
        FileNotFoundError, ValueError: as `load_unet`, and for an adapter that does not fit.
    """
    unet_folder = Path(unet_folder)
    source = unet_folder / "config.json"
    settings = unet_settings(load_json(source), str(source))
    if settings["family"] == "animatediff" and adapter is None:
        return load_unet(unet_folder, dtype, variant, reading=reading, **overrides)
    if settings["family"] not in ("image", "animatediff"):
        raise ValueError(f"{source}: a motion adapter needs a UNet2DConditionModel or a UNetMotionModel")
    motion: dict[str, Any] = {}
    weights = None
    if adapter is not None:
        motion, weights = _open_adapter(adapter, variant)
    component = make_component(
        "unet", {**settings, "dtype": dtype or "float32", "family": "animatediff", **motion, **overrides}
    )
    still, moving = split_motion(component.abstract)
    load: dict[str, Any] = dict(dtype=dtype, **(reading or {}))
    rules = unet_rules(component.config)
    image_ignore = (*IGNORED_KEYS, r".*\.motion_modules\..*")
    image = load_params(open_weights(unet_folder, variant), rules, still, ignore=image_ignore, **load)
    if weights is None:
        return component, joined(image, _fresh(component, moving, **load))
    ignore = (*IGNORED_KEYS, r".*pos_encoder\.pe")
    modules = load_params(weights, rules, moving, renames=ORIGINAL_NAMES, ignore=ignore, **load)
    return component, joined(image, modules)


def _fresh(component: Component, moving: Params, dtype: str | None = None, **reading: Any) -> Params:
    """New motion modules; the rest of the network is not made. Arguments as in `load_params`."""
    if reading.get("plan") is not None:
        return moving
    shardings = reading.get("shardings")
    shardings = shardings(moving) if callable(shardings) else shardings

    kind = dtype_of(dtype or "float32")

    def init(key: Array) -> Params:
        return jax.tree.map(lambda x: x.astype(kind), split_motion(component.init(key))[1])

    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


def _open_adapter(adapter: str | Path, variant: str | None) -> tuple[dict[str, Any], Weights]:
    if hub.is_hub_name(adapter):
        adapter = hub.download(str(adapter), variant=variant)
    adapter = Path(adapter)
    if not adapter.exists():
        raise FileNotFoundError(f"no motion adapter {str(adapter)!r}: give a folder, a file or owner/name on the hub")
    if adapter.is_dir():
        config = adapter / "config.json"
        return adapter_settings(load_json(config), str(config)), open_weights(adapter, variant)
    weights = open_weights(adapter)
    return original_settings(weights), weights


def save_motion_adapter(folder: str | Path, component: Component, params: Params, dtype: str = "float32") -> None:
    """Write the motion modules of a network as a MotionAdapter that diffusers loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = component.config
    _, moving = split_motion(params)
    save_weights(folder, moving, unet_rules(config), dtype=dtype, extra=motion_buffers(config))
    settings = {
        "_class_name": "MotionAdapter",
        "block_out_channels": list(config.channels),
        "motion_layers_per_block": config.blocks_per_level,
        "motion_max_seq_length": config.motion_positions,
        "motion_norm_num_groups": config.norm_groups,
        "motion_num_attention_heads": config.motion_heads,
        "motion_transformer_layers_per_block": config.motion_layers,
        "use_motion_mid_block": config.motion_mid,
        **_ADAPTER_DEFAULTS,
    }
    save_json(folder / "config.json", settings)


def inflated(component: Component, params: Params, **motion: Any) -> tuple[Component, Params]:
    """An image UNet as a video network: fresh motion modules whose last layer is zero, so that at first every frame
    is what the image network makes of it.

    motion: fields of `UNetConfig`, such as `motion_positions`.
    Raises ValueError for another family than "image".
    """
    if component.config.family != "image":
        raise ValueError(f"a UNet of family {component.config.family!r} is no image network: it needs no inflating")
    config = dataclasses.replace(component.config, family="animatediff", **motion)
    larger = make_component("unet", dataclasses.asdict(config))
    _, moving = split_motion(larger.abstract)
    return larger, joined(params, _fresh(larger, moving))


def split_motion(params: Params) -> tuple[Params, Params]:
    """A tree without its motion modules, and one of them alone."""
    moving, still = split(params, lambda path: bool(_TEMPORAL.search(path)))
    return still, moving
