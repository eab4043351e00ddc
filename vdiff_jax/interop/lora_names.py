"""What public low-rank updates call the layers they change, and how their keys are read.

    unet.mid_block.attentions.0.proj_in.lora_A.weight                        diffusers, peft
    mid_block.attentions.0.proj_in.lora_A.weight                             one network alone, motion LoRAs among them
    unet.(...).attn1.processor.to_q_lora.down.weight                         diffusers before peft
    text_encoder.text_model.(...).q_proj.lora_linear_layer.down.weight       diffusers before peft
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight                kohya
    lora_unet_middle_block_1_proj_in.lora_down.weight                        kohya, names of latent diffusion's own code
    (...).temporal_transformer.(...).attention_blocks.0.processor.to_q_lora  AnimateDiff's own code

A table, made from a model's rule tables, has every layer under all its names: a key belongs to a layer, or it is not
known. Underscores are never parsed back to dots, which they cannot be without guessing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vdiff_jax.components import Component
from vdiff_jax.interop.clip import text_rules
from vdiff_jax.interop.motion import ORIGINAL_NAMES
from vdiff_jax.interop.unet_rules import unet_rules
from vdiff_jax.interop.weights import Binding, bind
from vdiff_jax.models.text_encoder import TextEncoderConfig

KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}

_PARTS: tuple[tuple[str, str], ...] = (
    (r"\.lora_A(\.[\w-]+)?\.weight$", "down"),
    (r"\.lora_B(\.[\w-]+)?\.weight$", "up"),
    (r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$", "down"),
    (r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$", "up"),
    (r"\.lora_down\.weight$", "down"),
    (r"\.lora_up\.weight$", "up"),
    (r"\.lora_mid\.weight$", "mid"),
    (r"(\.lora|_lora|\.lora_linear_layer)?\.alpha$", "alpha"),
)
"""The end of a key, and which part of a layer's update the tensor is."""

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.model\.", ""),
    *ORIGINAL_NAMES,
    (r"\.processor\.", "."),
    (r"(\.attn\d)\.to_out$", r"\1.to_out.0"),
    (r"\.self_attn\.to_([qkv]|out)$", r".self_attn.\1_proj"),
    # Newer versions of transformers leave this prefix out in memory, and so do some files.
    (r"^text_encoder\.(?=encoder\.)", "text_encoder.text_model."),
)
"""From older names of a layer to those of today's diffusers."""

_OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.(dora_scale|lora_magnitude_vector)(\.|$)", "DoRA"),
    (r"\.hada_[wt]\d", "LoHa"),
    (r"\.lokr_[wt]\d", "LoKr"),
    (r"\.(oft_|boft_)", "OFT"),
    (r"\.on_input$", "IA3"),
    (r"\.lora_embedding_[AB]", "LoRA of an embedding"),
    (r"\.lora_B(\.[\w-]+)?\.bias$", "LoRA with biases"),
    (r"\.(diff|diff_b)$", "difference of whole tensors"),
)
"""Keys of updates that are no product of two factors of a kernel."""

_RESNET_NAMES = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LDM_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


class Layer(NamedTuple):
    """A layer with a kernel. component: of the model; name: diffusers' or transformers'; binding: its kernel."""

    component: str
    name: str
    binding: Binding


def public_layers(components: Mapping[str, Component]) -> list[Layer]:
    """Every layer of a model's UNet and text encoder whose kernel a public update may change.

    Raises ValueError for a UNet of our own, for which there are no public updates.
    """
    layers = []
    for component in ("unet", "text_encoder"):
        part = components.get(component)
        if part is None or (component == "text_encoder" and not _is_clip(part)):
            continue
        rules = unet_rules(part.config) if component == "unet" else text_rules(part.config)
        for binding in bind(rules, part.abstract):
            if binding.ours.endswith(".kernel"):
                layers.append(Layer(component, binding.theirs.removesuffix(".weight"), binding))
    return layers


def _is_clip(part: Component) -> bool:
    return isinstance(part.config, TextEncoderConfig) and part.config.norm == "pre"


def layers_by_name(layers: Iterable[Layer], blocks_per_level: int) -> dict[str, Layer]:
    """Every name that a public update may have for a layer -> the layer.

    blocks_per_level: of the UNet; the names of latent diffusion's own code count blocks through all levels.
    """
    layers = list(layers)
    names = {layer.name for layer in layers if layer.component == "unet"}
    table: dict[str, Layer] = {}
    for layer in layers:
        known = [layer.name]
        if layer.component == "unet" and (original := _ldm_name(layer.name, blocks_per_level, names)):
            known.append(original)
        table[layer.name] = table[f"{layer.component}.{layer.name}"] = layer
        for prefix in KOHYA_PREFIXES[layer.component]:
            table |= {prefix + name.replace(".", "_"): layer for name in known}
    return table


def _ldm_name(name: str, blocks: int, names: set[str]) -> str | None:
    """The name in latent diffusion's own code, where blocks are numbered through; None for layers it does not have."""
    if name in _LDM_NAMES:
        return _LDM_NAMES[name]
    found = re.match(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.([a-z]+)\.(\d+)\.(.+)$", name)
    if found is None:
        return None
    side, level, part, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"
    if part == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{level * (blocks + 1) + blocks}.{2 if attends else 1}.{rest}"
    if part not in ("resnets", "attentions"):
        return None
    rest = _RESNET_NAMES.get(rest) if part == "resnets" else rest
    place = 0 if part == "resnets" else 1
    if side == "mid_block":
        return f"middle_block.{2 * index + place}.{rest}"
    if side == "down_blocks":
        return f"input_blocks.{1 + level * (blocks + 1) + index}.{place}.{rest}"
    return f"output_blocks.{level * (blocks + 1) + index}.{place}.{rest}"


def split_key(key: str) -> tuple[str, str] | None:
    """`(name of the layer, part)` of a key, part "down", "up", "mid" or "alpha"; None for a key of another form."""
    for ending, part in _PARTS:
        if found := re.search(ending, key):
            name = key[: found.start()]
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
            return name, part
    return None


def other_kind(key: str) -> str | None:
    """What a key belongs to if that is another kind of update than a product of two factors, else None."""
    return next((kind for pattern, kind in _OTHER_KINDS if re.search(pattern, key)), None)
