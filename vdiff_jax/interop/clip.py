"""CLIP's two towers between transformers' layout and ours: rule tables, and `config.json` read and written.

Keys carry the tower's prefix (`text_model.`, `vision_model.`) in most files and lack it in those of newer versions for
a tower without projection; both are read, and the prefix, which every version reads, is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdiff_jax.interop.weights import Rule, nested
from vdiff_jax.models.image_encoder import ImageEncoderConfig
from vdiff_jax.models.text_encoder import TextEncoderConfig

Json = dict[str, Any]

TEXT_RENAMES = ((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),)
TEXT_IGNORE = (
    r"(text_model\.)?embeddings\.position_ids",
    r"vision_model\..*",  # the other tower, where both are in one file
    r"visual_projection\.weight",
    r"logit_scale",
)
IMAGE_RENAMES = ((r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),)
IMAGE_IGNORE = (
    r"(vision_model\.)?embeddings\.position_ids",
    r"text_model\..*",
    r"text_projection\.weight",
    r"logit_scale",
)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""What transformers calls an activation: what we call it."""

# What transformers takes where a config.json does not say, which those of older versions often do not.
_TEXT_DEFAULTS = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    projection_dim=512,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
)
_IMAGE_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=512,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
_LARGEST_ID = 2  # an end token of 2 in a config.json was always wrong, and means "the largest id"


def activation_name(config: Json, field: str, path: Path) -> str:
    """Our name for the activation in `config[field]`. Raises ValueError for one that we do not have."""
    if config.get(field) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: {field} {config.get(field)!r} is not an activation that is known here: {known}")
    return ACTIVATIONS[config[field]]


def their_activation(name: str) -> str:
    """transformers' name for one of our activations. Raises ValueError if it has none."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise ValueError(f"activation {name!r} has no name in a CLIP config.json: only {', '.join(ACTIVATIONS.values())}")


def head_dim(features: int, heads: int, path: Path) -> int:
    """Channels of a head. Raises ValueError if the heads do not divide the features."""
    if features % heads:
        raise ValueError(f"{path}: num_attention_heads {heads} does not divide hidden_size {features}")
    return features // heads


def layer_rules(count: int) -> list[Rule]:
    """The transformer layers of either tower."""
    parts: list[Rule] = [
        ("self_attn.q_proj", "attention.to_q", "dense"),
        ("self_attn.k_proj", "attention.to_k", "dense"),
        ("self_attn.v_proj", "attention.to_v", "dense"),
        ("self_attn.out_proj", "attention.to_out", "dense"),
        ("layer_norm1", "norm1", "norm"),
        ("mlp.fc1", "proj_in", "dense"),
        ("mlp.fc2", "proj_out", "dense"),
        ("layer_norm2", "norm2", "norm"),
    ]
    return [rule for index in range(count) for rule in nested(f"encoder.layers.{index}", f"layers.{index}", parts)]


def text_rules(config: TextEncoderConfig) -> list[Rule]:
    tower: list[Rule] = [
        ("embeddings.token_embedding", "token_embedding", "embedding"),
        ("embeddings.position_embedding", "position_embedding", "embedding"),
        *layer_rules(config.layers),
        ("final_layer_norm", "final_norm", "norm"),
    ]
    whole = [(f"text_model.{theirs}", ours, kind) for theirs, ours, kind in tower]
    return [*whole, ("text_projection", "projection", "dense")]


def image_rules(config: ImageEncoderConfig) -> list[Rule]:
    tower: list[Rule] = [
        ("embeddings.class_embedding", "class_embedding", "tensor"),
        ("embeddings.patch_embedding", "patch_embedding", "conv"),
        ("embeddings.position_embedding", "position_embedding", "embedding"),
        ("pre_layrnorm", "pre_norm", "norm"),  # sic
        *layer_rules(config.layers),
        ("post_layernorm", "post_norm", "norm"),
    ]
    whole = [(f"vision_model.{theirs}", ours, kind) for theirs, ours, kind in tower]
    return [*whole, ("visual_projection", "projection", "dense")]


def text_settings(config: Json, path: Path) -> Json:
    """Settings of a `TextEncoder` from the config.json of a text tower, or of both towers. Raises ValueError."""
    whole, projected = config, _is_projected(config)
    config = {**_TEXT_DEFAULTS, **(config["text_config"] if config.get("model_type") == "clip" else config)}
    end = config["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"{path}: eos_token_id is {end!r}; it must be one id")
    return dict(
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        features=config["hidden_size"],
        hidden_features=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        head_dim=head_dim(config["hidden_size"], config["num_attention_heads"], path),
        norm="pre",
        causal=True,
        attend_padding=True,
        activation=activation_name(config, "hidden_act", path),
        projection=_projection(whole, config) if projected else 0,
        pooled_token=-1 if end == _LARGEST_ID else end,
        epsilon=config["layer_norm_eps"],
    )


def image_settings(config: Json, path: Path) -> Json:
    """Settings of an `ImageEncoder` from the config.json of an image tower, or of both towers. Raises ValueError."""
    whole, projected = config, _is_projected(config)
    config = {**_IMAGE_DEFAULTS, **(config["vision_config"] if config.get("model_type") == "clip" else config)}
    for field in ("image_size", "patch_size"):
        if not isinstance(config[field], int):
            raise ValueError(f"{path}: {field} is {config[field]!r}; only squares are supported, one number")
    return dict(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        channels=config["num_channels"],
        features=config["hidden_size"],
        hidden_features=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        head_dim=head_dim(config["hidden_size"], config["num_attention_heads"], path),
        activation=activation_name(config, "hidden_act", path),
        projection=_projection(whole, config) if projected else 0,
        epsilon=config["layer_norm_eps"],
    )


def _is_projected(config: Json) -> bool:
    """A tower has its projection in the classes that say so, and in the class of both towers."""
    names = config.get("architectures") or [""]
    return names[0].endswith("WithProjection") or config.get("model_type") == "clip"


def _projection(whole: Json, tower: Json) -> int:
    return (whole if "projection_dim" in whole else tower)["projection_dim"]


def text_json(config: TextEncoderConfig, dtype: str) -> Json:
    """The config.json of a text tower. Raises ValueError for an encoder that is not one of CLIP's."""
    if config.norm != "pre" or not config.causal or config.token_types:
        raise ValueError("this text encoder is not a CLIP: it needs norm='pre', causal=True and token_types=0")
    end = config.pooled_token if config.pooled_token >= 0 else _LARGEST_ID
    return dict(
        architectures=["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        model_type="clip_text_model",
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        eos_token_id=end,
        **_tower_json(config, dtype),
    )


def image_json(config: ImageEncoderConfig, dtype: str) -> Json:
    """The config.json of an image tower."""
    return dict(
        architectures=["CLIPVisionModelWithProjection" if config.projection else "CLIPVisionModel"],
        model_type="clip_vision_model",
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.channels,
        **_tower_json(config, dtype),
    )


def _tower_json(config: TextEncoderConfig | ImageEncoderConfig, dtype: str) -> Json:
    return dict(
        hidden_size=config.features,
        intermediate_size=config.hidden_features,
        num_hidden_layers=config.layers,
        num_attention_heads=config.features // config.head_dim,
        hidden_act=their_activation(config.activation),
        projection_dim=config.projection or config.features,
        layer_norm_eps=config.epsilon,
        torch_dtype=dtype,
    )
