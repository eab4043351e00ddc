"""The encoder of a T5 between transformers' layout and ours: rule table, and `config.json` read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdiff_jax.interop.weights import Rule, nested
from vdiff_jax.models.t5_encoder import T5EncoderConfig

Json = dict[str, Any]

# The embedding is shared with the decoder, and stored under one of these names or both.
SHARED, OWN = "shared.weight", "encoder.embed_tokens.weight"
IGNORE = (r"decoder\..*", r"lm_head\.weight")  # the other half, where the whole model is in the file
ACTIVATIONS = {"gated-gelu": (True, "gelu_tanh"), "relu": (False, "relu")}
"""What `feed_forward_proj` says: whether there is a gate, and our name of the activation."""


def rules(config: T5EncoderConfig) -> list[Rule]:
    parts: list[Rule] = [
        ("layer.0.layer_norm", "norm1", "norm"),
        ("layer.0.SelfAttention.q", "to_q", "dense"),
        ("layer.0.SelfAttention.k", "to_k", "dense"),
        ("layer.0.SelfAttention.v", "to_v", "dense"),
        ("layer.0.SelfAttention.o", "to_out", "dense"),
        ("layer.1.layer_norm", "norm2", "norm"),
        ("layer.1.DenseReluDense.wi_0", "gate", "dense"),
        ("layer.1.DenseReluDense." + ("wi_1" if config.gated else "wi"), "proj_in", "dense"),
        ("layer.1.DenseReluDense.wo", "proj_out", "dense"),
    ]
    layers = (nested(f"encoder.block.{index}", f"layers.{index}", parts) for index in range(config.layers))
    return [
        ("shared", "token_embedding", "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "position_bias", "embedding"),
        *(rule for layer in layers for rule in layer),
        ("encoder.final_layer_norm", "final_norm", "norm"),
    ]


def settings(config: Json, path: Path) -> Json:
    """Settings of a `T5Encoder`. Raises ValueError for a field that is missing or that we do not have."""
    fields = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv", "relative_attention_num_buckets")
    if missing := [field for field in fields if field not in config]:
        raise ValueError(f"{path} is not the config.json of a T5: it lacks {', '.join(missing)}")
    form = config.get("feed_forward_proj", "relu")
    if form not in ACTIVATIONS:
        raise ValueError(f"{path}: feed_forward_proj {form!r} is not known here: choose {' or '.join(ACTIVATIONS)}")
    gated, activation = ACTIVATIONS[form]
    return dict(
        vocab_size=config["vocab_size"],
        features=config["d_model"],
        hidden_features=config["d_ff"],
        layers=config["num_layers"],
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        buckets=config["relative_attention_num_buckets"],
        max_distance=config.get("relative_attention_max_distance", 128),
        gated=gated,
        activation=activation,
        epsilon=config.get("layer_norm_epsilon", 1e-6),
    )


def to_json(config: T5EncoderConfig, dtype: str) -> Json:
    """The config.json of the encoder. Raises ValueError for an activation that a T5 cannot have."""
    forms = [form for form, value in ACTIVATIONS.items() if value == (config.gated, config.activation)]
    if not forms:
        raise ValueError(f"a T5 has no activation={config.activation!r} with gated={config.gated}")
    return dict(
        architectures=["T5EncoderModel"],
        model_type="t5",
        vocab_size=config.vocab_size,
        d_model=config.features,
        d_ff=config.hidden_features,
        num_layers=config.layers,
        num_heads=config.heads,
        d_kv=config.head_dim,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj=forms[0],
        layer_norm_epsilon=config.epsilon,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=not config.gated,
        torch_dtype=dtype,
    )
