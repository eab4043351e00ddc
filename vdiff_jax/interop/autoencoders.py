"""Public autoencoders, AutoencoderKL (Stable Diffusion) and AutoencoderKLTemporalDecoder (Stable Video Diffusion).

A folder as diffusers writes it, `config.json` and `diffusion_pytorch_model.safetensors`, becomes our component and its
parameters, and back. Nothing is lost on the way: float32 tensors come back to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from vdiff_jax.components import Component, make_component
from vdiff_jax.interop.pretrained import load_json, save_json
from vdiff_jax.interop.weight_files import open_weights
from vdiff_jax.interop.weights import Reading, Rule, load_params, nested, save_weights
from vdiff_jax.models.autoencoder import AutoencoderConfig
from vdiff_jax.types import Params

FRAMES, TEMPORAL = "AutoencoderKL", "AutoencoderKLTemporalDecoder"

_SHARED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    TEMPORAL: _SHARED,
    FRAMES: {
        **_SHARED,
        "up_block_types": ["UpDecoderBlock2D"],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
}
"""What diffusers takes for a field that config.json leaves out; older files leave out many."""

OLD_NAMES: tuple[tuple[str, str], ...] = tuple(
    (rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
"""Names of the attention layers in checkpoints before 2023."""


# Configuration ----------------------------------------------------------------------------------------------------


def autoencoder_settings(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our `autoencoder` component for a config.json of either class.

    Final latents are `(raw - shift) * scaling_factor`, or with statistics per channel `(raw - mean) / std *
    scaling_factor`; both become `latent_mean` and `latent_std`.

    Raises ValueError for another class and for anything that this network cannot be built as, naming the field.
    """
    family = config_json.get("_class_name", FRAMES)
    if family not in DEFAULTS:
        raise ValueError(f"autoencoder _class_name={family!r} is not supported: use {FRAMES} or {TEMPORAL}")
    fields = {name: value for name, value in config_json.items() if not name.startswith("_")}
    for name, value in fields.items():
        if name not in DEFAULTS[family] and value not in (None, DEFAULTS[FRAMES].get(name)):
            raise ValueError(f"{family} config.json: {name}={value!r} is not a field that this version knows")
    fields = {**DEFAULTS[FRAMES], **DEFAULTS[family], **fields}
    channels = tuple(fields["block_out_channels"])
    temporal = family == TEMPORAL

    def need(name: str, *possible: Any) -> None:
        if fields[name] not in possible:
            raise ValueError(f"{family} config.json: {name}={fields[name]!r} cannot be built, only {possible[0]!r} can")

    need("in_channels", 3)
    need("out_channels", 3)
    need("act_fn", "silu", "swish")
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if not temporal or name != "up_block_types":
            fields[name] = list(fields[name])
            need(name, [block] * len(channels))
    if temporal:  # with any other number its middle block leaves some of its layers unused
        need("layers_per_block", 2)
    mean, std = _statistics(family, fields)
    sample_size = fields["sample_size"]
    return {
        "channels": channels,
        "layers_per_block": fields["layers_per_block"],
        "latent_channels": fields["latent_channels"],
        "norm_groups": fields["norm_num_groups"],
        "mid_attention": bool(fields["mid_block_add_attention"]),
        "latent_mean": mean,
        "latent_std": std,
        "use_quant_conv": bool(fields["use_quant_conv"]),
        "use_post_quant_conv": bool(fields["use_post_quant_conv"]) and not temporal,
        "decoder": "temporal" if temporal else "frames",
        "sample_size": tuple(sample_size) if isinstance(sample_size, list) else sample_size,
        "force_upcast": bool(fields["force_upcast"]),
    }


def _statistics(family: str, fields: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the raw latents per channel, as the final latents standardise them."""
    count, scale, shift = fields["latent_channels"], fields["scaling_factor"], fields["shift_factor"]
    mean, std = fields["latents_mean"], fields["latents_std"]
    if not scale:
        raise ValueError(f"{family} config.json: scaling_factor={scale!r} must be a number above 0")
    if (mean is None) != (std is None):
        raise ValueError(f"{family} config.json: latents_mean and latents_std must be given together")
    if mean is None:
        return (float(shift or 0.0),) * count, (1.0 / scale,) * count
    if shift:
        raise ValueError(f"{family} config.json: shift_factor={shift!r} and latents_mean exclude each other")
    for name in ("latents_mean", "latents_std"):
        if len(fields[name]) != count:
            raise ValueError(f"{family} config.json: {name} has {len(fields[name])} values for {count} latent channels")
    return tuple(map(float, mean)), tuple(float(value) / scale for value in std)


def autoencoder_json(component: Component) -> dict[str, Any]:
    """The config.json of a component, undoing `autoencoder_settings`.

    Statistics that are the same for all channels are written as factors, others per channel with scaling_factor 1.
    Raises ValueError for a component that neither class can express, naming the field.
    """
    config: AutoencoderConfig = component.config
    family = FRAMES if config.decodes_frames_alone else TEMPORAL
    mean = config.latent_mean or (0.0,) * config.latent_channels
    std = config.latent_std or (1.0,) * config.latent_channels
    even = len(set(mean)) == 1 and len(set(std)) == 1
    fields = {
        **DEFAULTS[FRAMES],
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": list(config.sample_size) if isinstance(config.sample_size, tuple) else config.sample_size,
        "scaling_factor": _inverse(std[0]) if even else 1.0,
        "shift_factor": mean[0] if even and mean[0] else None,
        "latents_mean": None if even else list(mean),
        "latents_std": None if even else list(std),
        "force_upcast": config.force_upcast,
        "use_quant_conv": config.use_quant_conv,
        "use_post_quant_conv": config.use_post_quant_conv,
        "mid_block_add_attention": config.mid_attention,
    }
    fields["sample_size"] = fields["sample_size"] or DEFAULTS[family]["sample_size"]
    expressible = {"patch_size": 1, "linear_path": False}
    if family == TEMPORAL:
        expressible |= {"use_quant_conv": True, "use_post_quant_conv": False, "mid_attention": True}
        expressible |= {"norm_groups": 32, "layers_per_block": 2}
    for name, value in expressible.items():
        if getattr(config, name) != value:
            raise ValueError(f"autoencoder.{name}={getattr(config, name)!r} cannot be saved as {family}, only {value}")
    if family == TEMPORAL and (fields["latents_mean"] or fields["shift_factor"]):
        raise ValueError(f"autoencoder.latent_mean and latent_std must be one factor to be saved as {family}")
    return {"_class_name": family, **{name: fields[name] for name in DEFAULTS[family]}}


def _inverse(value: float) -> float:
    """1 / value as the decimal it was: 12 digits undo one rounding of a double and lose nothing that a file states."""
    return float(f"{1.0 / value:.12g}")


# Weights ----------------------------------------------------------------------------------------------------------

_RES_BLOCK: list[Rule] = [
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv"),
    ("conv_shortcut", "shortcut", "conv1x1"),
]
_TEMPORAL_RES_BLOCK: list[Rule] = [
    ("norm1", "norm1", "norm"),
    ("conv1", "conv1", "temporal_conv"),
    ("norm2", "norm2", "norm"),
    ("conv2", "conv2", "temporal_conv"),
]
_ATTENTION: list[Rule] = [
    ("attentions.0.group_norm", "norm", "norm"),
    ("attentions.0.to_q", "attention.to_q", "dense"),
    ("attentions.0.to_k", "attention.to_k", "dense"),
    ("attentions.0.to_v", "attention.to_v", "dense"),
    ("attentions.0.to_out.0", "attention.to_out", "dense"),
]
_ENDS: list[Rule] = [
    ("conv_in", "conv_in", "conv"),
    ("conv_norm_out", "norm_out", "norm"),
    ("conv_out", "conv_out", "conv"),
]


def autoencoder_rules(config: AutoencoderConfig) -> list[Rule]:
    """The table of `interop.weights` for all layers of an autoencoder."""
    temporal = not config.decodes_frames_alone
    rules: list[Rule] = [
        ("quant_conv", "quant_conv", "conv1x1"),
        ("post_quant_conv", "post_quant_conv", "conv1x1"),
        ("decoder.time_conv_out", "decoder.time_conv_out", "temporal_conv"),
    ]
    sides = (("encoder", "down", config.layers_per_block), ("decoder", "up", config.layers_per_block + 1))
    for side, way, layers in sides:
        rules += nested(side, side, _ENDS)
        mid = nested("mid_block", "mid", _ATTENTION)
        for index in range(2):
            mid += _residual(f"mid_block.resnets.{index}", "mid", index, temporal and side == "decoder")
        rules += nested(side, side, mid)
        for level in range(len(config.channels)):
            block = f"{way}_blocks.{level}"
            for layer in range(layers):
                index = level * layers + layer
                theirs = f"{side}.{block}.resnets.{layer}"
                rules += _residual(theirs, side, index, temporal and side == "decoder")
            sampler = (f"{side}.{block}.{way}samplers.0.conv", f"{side}.{way}samplers.{level}.conv", "conv")
            rules.append(sampler)
    return rules


def _residual(theirs: str, ours: str, index: int, temporal: bool) -> list[Rule]:
    """A residual block; where the decoder is temporal, both its halves and their mixture."""
    if not temporal:
        return nested(theirs, f"{ours}.resnets.{index}", _RES_BLOCK)
    return [
        *nested(f"{theirs}.spatial_res_block", f"{ours}.resnets.{index}", _RES_BLOCK),
        *nested(f"{theirs}.temporal_res_block", f"{ours}.mixed.{index}.res", _TEMPORAL_RES_BLOCK),
        (f"{theirs}.time_mixer.mix_factor", f"{ours}.mixed.{index}.mixer.mix_factor", "tensor"),
    ]


# Folders ----------------------------------------------------------------------------------------------------------


def load_autoencoder(
    folder: str | Path, dtype: str | None = None, variant: str | None = None, **reading: Unpack[Reading]
) -> tuple[Component, Params]:
    """The component and parameters in a diffusers folder (`vae/` of a pipeline).

    dtype: of the parameters and of the computation, None = float32. A checkpoint with force_upcast computes in float32
        where float16 is asked for.
    variant, reading: see `open_weights` and `Reading`.
    Raises ValueError or FileNotFoundError for what is missing, does not fit or cannot be built.
    """
    settings = autoencoder_settings(load_json(Path(folder) / "config.json"))
    component = make_component("autoencoder", {**settings, "dtype": dtype or "float32"})
    weights = open_weights(folder, variant)
    rules = autoencoder_rules(component.config)
    params = load_params(weights, rules, component.abstract, renames=OLD_NAMES, dtype=dtype, **reading)
    return component, params


def save_autoencoder(folder: str | Path, component: Component, params: Params, dtype: str = "float32") -> None:
    """Write a folder that diffusers loads, `config.json` last; made if it does not exist."""
    folder = Path(folder)
    fields = autoencoder_json(component)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, params, autoencoder_rules(component.config), dtype=dtype)
    save_json(folder / "config.json", fields)
