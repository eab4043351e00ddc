"""UNets saved by diffusers: their config.json to a `UNetConfig` and back, their weights in and out.

UNet3DConditionModel               modelscope    ModelScope, ZeroScope
UNetMotionModel                    animatediff   SD 1.x with a motion adapter
UNet2DConditionModel               image         SD 1.x, SD 2.x, on every frame
UNetSpatioTemporalConditionModel   svd           Stable Video Diffusion
I2VGenXLUNet                       i2vgen        I2VGen-XL
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdiff_jax.components import Component, make_component
from vdiff_jax.interop.pretrained import load_json, save_json
from vdiff_jax.interop.unet_rules import motion_buffers, unet_rules
from vdiff_jax.interop.weight_files import open_weights
from vdiff_jax.interop.weights import Reading, load_params, save_weights
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.types import Params

FAMILIES = {
    "UNet3DConditionModel": "modelscope",
    "UNetMotionModel": "animatediff",
    "UNet2DConditionModel": "image",
    "UNetSpatioTemporalConditionModel": "svd",
    "I2VGenXLUNet": "i2vgen",
}
_BLOCK_NAMES = {
    "modelscope": "Block3D",
    "i2vgen": "Block3D",
    "animatediff": "BlockMotion",
    "image": "Block2D",
    "svd": "BlockSpatioTemporal",
}
IGNORED_KEYS = (r".*\.pos_embed\.pe",)
"""Tables of positions, which we compute."""

_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_layers": 1,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_motion_num_attention_heads": None,
    "reverse_temporal_transformer_layers_per_block": None,
    "reverse_transformer_layers_per_block": None,
    "temporal_transformer_layers_per_mid_block": 1,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_mid_block": None,
}
"""Settings of diffusers with the one value that our blocks build; any other is refused by name."""
_FREE = {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads", "num_frames", "sample_frames"}
"""Settings that change no number of a forward pass in inference."""
_READ = {
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "transformer_layers_per_block",
    "use_linear_projection",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "temporal_transformer_layers_per_block",
    "motion_max_seq_length",
    "motion_num_attention_heads",
    "use_motion_mid_block",
}


def unet_settings(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The fields of a `UNetConfig` from those of a diffusers UNet, as in its config.json.

    Raises ValueError, naming the field, for a class or a setting that our blocks do not build.
    """
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{source} has _class_name={name!r}: choose a UNet of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    for field, value in config.items():
        if field.startswith("_") or field in _READ or field in _FREE:
            continue
        if field not in _DEFAULTS:
            raise ValueError(f"{source} has {field}={value!r}, which is not known of {name}")
        if value != _DEFAULTS[field]:
            raise ValueError(f"{source} has {field}={value!r}: only {_DEFAULTS[field]!r} is built")
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    attention = _attention(config, family, len(channels), source)
    latent_channels = config.get("out_channels", 4)
    settings: dict[str, Any] = dict(
        family=family,
        latent_channels=latent_channels,
        channels=channels,
        attention=attention,
        blocks_per_level=_single(config, "layers_per_block", 2, source),
        text_features=_single(config, "cross_attention_dim", 1280 if family == "image" else 1024, source),
        embedding_features=4 * channels[0],
        norm_groups=config.get("norm_num_groups", 32),
        coordinates=False,
        layout_features=0,
        transformer_layers=_per_level(config.get("transformer_layers_per_block", 1), len(channels)),
    )
    if set(settings["transformer_layers"]) == {1}:
        settings["transformer_layers"] = ()
    extra = {
        "modelscope": _head_settings,
        "i2vgen": _i2vgen_settings,
        "animatediff": _motion_settings,
        "image": _image_settings,
        "svd": _svd_settings,
    }[family]
    return settings | extra(config, settings, source)


def _attention(config: Mapping[str, Any], family: str, levels: int, source: str) -> tuple[bool, ...]:
    plain = _BLOCK_NAMES[family]
    default = [True] * (levels - 1) + [False]
    names = config.get("down_block_types", [_block_name("Down", plain, there) for there in default])
    attention = tuple(str(name).startswith("CrossAttn") for name in names)
    expected = [_block_name("Down", plain, there) for there in attention]
    mirrored = [_block_name("Up", plain, there) for there in reversed(attention)]
    ups = config.get("up_block_types", mirrored)
    if list(names) != expected or list(ups) != mirrored or len(names) != levels:
        raise ValueError(
            f"{source} has down_block_types={list(names)} and up_block_types={list(ups)} for {levels} levels: only "
            f"{expected[0]} and {_block_name('Down', plain, False)} with their mirror image are built"
        )
    return attention


def _block_name(side: str, plain: str, attention: bool) -> str:
    return f"{'CrossAttn' if attention else ''}{side}{plain}"


def _single(config: Mapping[str, Any], field: str, default: int, source: str) -> int:
    value = config.get(field, default)
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1 or not isinstance(next(iter(values)), int):
        raise ValueError(f"{source} has {field}={value!r}: only one number for all levels is built")
    return next(iter(values))


def _per_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _head_settings(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    # What these classes call attention_head_dim is the size of a head; num_attention_heads is not read there.
    return dict(head_dim=_single(config, "attention_head_dim", 64, source))


def _i2vgen_settings(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    if config.get("in_channels", 4) != settings["latent_channels"]:
        raise ValueError(f"{source} has in_channels={config['in_channels']} and another number of out_channels")
    image = dict(conditioning_channels=4, added_count=1, added_features=settings["channels"][0])
    return _head_settings(config, settings, source) | image


def _image_settings(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    # A quirk kept for old files: attention_head_dim is the number of heads, unless that is given by its own name.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return dict(
        heads=_per_level(heads, len(settings["channels"])),
        conditioning_channels=config.get("in_channels", 4) - settings["latent_channels"],
        conv_projection=not config.get("use_linear_projection", False),
    )


def _motion_settings(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    config = {"num_attention_heads": 8, **config}
    return _image_settings(config, settings, source) | dict(
        motion_heads=_single(config, "motion_num_attention_heads", 8, source),
        motion_layers=_single(config, "temporal_transformer_layers_per_block", 1, source),
        motion_mid=bool(config.get("use_motion_mid_block", True)),
        motion_positions=config.get("motion_max_seq_length", 32),
    )


def _svd_settings(config: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    features = config.get("addition_time_embed_dim", 256)
    total = config.get("projection_class_embeddings_input_dim", 768)
    if total % features:
        raise ValueError(f"{source} has projection_class_embeddings_input_dim={total}, no multiple of {features}")
    return dict(
        heads=_per_level(config.get("num_attention_heads", (5, 10, 20, 20)), len(settings["channels"])),
        conditioning_channels=config.get("in_channels", 8) - settings["latent_channels"],
        added_features=features,
        added_count=total // features,
    )


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """The config.json with which diffusers builds this network; what `unet_settings` reads back to the same.

    Raises ValueError, naming the field, for a network that diffusers does not have: one of ours, AnimateDiff with the
    norms of its own code, or an odd size.
    """
    result = _unet_json(config)
    again = UNetConfig(**unet_settings(result))
    heads = [[c.level_head_dim(level) for level in range(len(c.channels))] for c in (config, again)]
    fields = [name for name in _DERIVED if getattr(config, name) != getattr(again, name)]
    if fields or heads[0] != heads[1]:
        name = fields[0] if fields else "head_dim"
        raise ValueError(
            f"unet.{name}={getattr(config, name)!r} is not what diffusers builds for these channels, "
            f"{getattr(again, name)!r}: save this model with layout='vdiff_jax'"
        )
    return result


_DERIVED = ("embedding_features", "norm_groups", "added_features", "added_count", "conditioning_channels")
"""Fields that its classes derive from others, or fix."""


def _unet_json(config: UNetConfig) -> dict[str, Any]:
    if not config.reads_timesteps:
        raise ValueError("a UNet of family 'native' has no counterpart in diffusers: save it in our own format")
    if config.family == "animatediff" and (config.motion_norm, config.resnet_norm) != ("video", "frame"):
        raise ValueError(
            "diffusers computes the norms of motion modules over the clip only: set unet.motion_norm='video' and "
            "unet.resnet_norm='frame' to save this model for it"
        )
    plain = _BLOCK_NAMES[config.family]
    names = {family: name for name, family in FAMILIES.items()}
    result: dict[str, Any] = {
        "_class_name": names[config.family],
        "in_channels": config.latent_channels + (0 if config.family == "i2vgen" else config.conditioning_channels),
        "out_channels": config.latent_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": [_block_name("Down", plain, there) for there in config.attention],
        "up_block_types": [_block_name("Up", plain, there) for there in reversed(config.attention)],
        "layers_per_block": config.blocks_per_level,
        "cross_attention_dim": config.text_features,
    }
    layers = list(config.transformer_layers) or 1
    if config.family in ("modelscope", "i2vgen"):
        return result | {"attention_head_dim": config.head_dim, "norm_num_groups": config.norm_groups}
    if config.family == "svd":
        return result | {
            "num_attention_heads": list(config.heads),
            "transformer_layers_per_block": layers,
            "addition_time_embed_dim": config.added_features,
            "projection_class_embeddings_input_dim": config.added_features * config.added_count,
        }
    heads: Any = list(config.heads) if len(set(config.heads)) > 1 else config.heads[0]
    result |= {
        "norm_num_groups": config.norm_groups,
        "transformer_layers_per_block": layers,
        "use_linear_projection": not config.conv_projection,
    }
    if config.family == "image":
        return result | {"attention_head_dim": heads}
    return result | {
        "num_attention_heads": heads,
        "motion_num_attention_heads": config.motion_heads,
        "temporal_transformer_layers_per_block": config.motion_layers,
        "motion_max_seq_length": config.motion_positions,
        "use_motion_mid_block": config.motion_mid,
    }


def load_unet(
    folder: str | Path,
    dtype: str | None = None,
    variant: str | None = None,
    *,
    reading: Reading | None = None,
    **overrides: Any,
) -> tuple[Component, Params]:
    """A UNet folder of diffusers (config.json, *.safetensors) -> component and parameters.

    dtype: of parameters and computation, None = float32. variant, reading: see `open_weights` and `Reading`.
    overrides: fields of `UNetConfig` that the file does not decide, such as `remat` or `motion_norm`.
    Raises FileNotFoundError for a missing file, ValueError for settings or keys that do not fit.
    """
    folder = Path(folder)
    settings = unet_settings(load_json(folder / "config.json"), str(folder / "config.json"))
    component = make_component("unet", {**settings, "dtype": dtype or "float32", **overrides})
    weights, rules = open_weights(folder, variant), unet_rules(component.config)
    how: Reading = reading or {}
    return component, load_params(weights, rules, component.abstract, ignore=IGNORED_KEYS, dtype=dtype, **how)


def save_unet(
    folder: str | Path,
    component: Component,
    params: Params,
    dtype: str = "float32",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a UNet folder that diffusers loads; extra: fields of config.json that pipelines read, as sample_size.

    Raises ValueError for a network it does not have.
    """
    folder = Path(folder)
    config = component.config
    settings = {**unet_json(config), **(extra or {})}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, params, unet_rules(config), dtype=dtype, extra=motion_buffers(config))
    save_json(folder / "config.json", settings)
