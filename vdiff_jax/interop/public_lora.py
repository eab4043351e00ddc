"""Low-rank updates of public networks as other libraries keep them, read onto our parameters and written back.

A layer's update in a file is `alpha / rank * up @ down` (Hu et al. 2021), `down [rank in ...]` and `up [out rank ...]`
in torch's layouts; of a convolution `down` has the kernel's window and `up` is 1 x 1. With `mid [rank rank ...]`
(LoCon's three factors) `down` is 1 x 1 and the window is in the middle; `mid` times `down` is again one factor.
Which layer a key means, see `interop.lora_names`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.components import Component
from vdiff_jax.interop.lora_names import Layer, layers_by_name, other_kind, public_layers, split_key
from vdiff_jax.interop.pretrained import load_json
from vdiff_jax.interop.weight_files import Weights, dtype_of, open_weights, write_safetensors
from vdiff_jax.models.lora import Lora
from vdiff_jax.parallel import path_name
from vdiff_jax.types import Params

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call a file of an update in a folder."""
METADATA = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
_ENDS = {
    "unet": ("lora_A", "lora_B"),
    "text_encoder": ("lora_linear_layer.down", "lora_linear_layer.up"),
}
"""How the factors are written. Of a text encoder diffusers reads the older names for all layers, the newer for some."""


def load_public_lora(path: str | Path, components: Mapping[str, Component]) -> Lora:
    """An update in the format of diffusers, peft, kohya or AnimateDiff, for a model with these components.

    Args:
        path: a safetensors file, or a folder that holds one.
        components: of the model it is for: its UNet is of a public family.
    Returns:
        The update with `alpha == rank`: what each layer is scaled by is in its factors, whose ranks may differ.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle; an update of another kind (DoRA, LoHa, ...); or a file that does not fit the model,
            listing every key that belongs to no layer, lacks its partner or has another shape, with both shapes.
    """
    weights = open_weights(_file(Path(path)))
    parts = _split(weights, _table(components, weights.source))
    config = _peft_config(weights)
    factors: Params = {}
    problems: list[str] = []
    ranks: set[int] = set()
    for layer, keys in parts.values():
        try:
            update = _factors(weights, layer, keys, config)
        except ValueError as error:
            problems.append(str(error))
            continue
        ranks.add(len(update["b"]))
        _place(factors, f"{layer.component}.{layer.binding.ours}", update)
    if problems:
        raise ValueError(f"{weights.source} does not fit the model: {'; '.join(sorted(problems))}")
    return Lora(factors=factors, rank=max(ranks), alpha=float(max(ranks)))


def _file(path: Path) -> Path:
    """The file in a folder; another path as it is."""
    return next((path / name for name in FILE_NAMES if (path / name).is_file()), path)


def _table(components: Mapping[str, Component], source: Path) -> dict[str, Layer]:
    unet = components.get("unet")
    if unet is not None and not unet.config.reads_timesteps:
        raise ValueError(
            f"{source} is no update of our own format, and this model's UNet is of family 'native', for which there "
            "are no others: give a lora.safetensors that train.py made"
        )
    blocks = unet.config.blocks_per_level if unet is not None else 0
    return layers_by_name(public_layers(components), blocks)


def _split(weights: Weights, table: Mapping[str, Layer]) -> dict[str, tuple[Layer, dict[str, str]]]:
    """Our path of a kernel -> its layer, and the key of each part of its update."""
    parts: dict[str, tuple[Layer, dict[str, str]]] = {}
    problems: list[str] = []
    for key, shape in weights.items():
        if kind := other_kind(key):
            raise ValueError(
                f"{weights.source} holds a {kind} ({key}): only products of two factors are read (LoRA, LoCon); merge "
                "it into its model where it was made, and load that"
            )
        name, part = split_key(key) or ("", "")
        if name not in table:
            problems.append(f"unexpected {key} {shape}")
            continue
        layer = table[name]
        keys = parts.setdefault(f"{layer.component}.{layer.binding.ours}", (layer, {}))[1]
        if part in keys:
            problems.append(f"{key} and {keys[part]} are both of {layer.component}.{layer.name}")
        keys[part] = key
    if not any(split_key(key) for key in weights):
        raise ValueError(f"{weights.source} holds no low-rank update: no key ends in lora_A.weight or the like")
    if problems:
        raise ValueError(f"{weights.source} does not fit the model: {'; '.join(sorted(problems))}")
    return parts


def _factors(weights: Weights, layer: Layer, keys: Mapping[str, str], config: Mapping[str, Any]) -> Params:
    """`a [prod(in) rank]` and `b [rank out]` f32 of one layer, b with its scale. Raises ValueError, one phrase."""
    for part in ("down", "up"):
        if part not in keys:
            raise ValueError(f"{', '.join(sorted(keys.values()))} has no partner, the {part} factor of {layer.name}")
    tensors = {part: weights.read(key).astype(np.float32) for part, key in keys.items()}
    out, *inner = layer.binding.their_shape

    def shaped(part: str, *expected: int) -> np.ndarray:
        """The tensor, in which axes of size one at the end are of no account. Raises ValueError."""
        shape = tensors[part].shape
        if _trimmed(shape) != _trimmed(expected):
            kernel = f"the kernel {layer.binding.their_shape} of {layer.name}"
            raise ValueError(f"{keys[part]} is {shape}, expected {expected} for {kernel}")
        return tensors[part].reshape(expected)

    rank = len(tensors["down"])
    outer = rank
    if "mid" in tensors:
        outer = len(tensors["mid"])
        down, mid = shaped("down", rank, inner[0]), shaped("mid", outer, rank, *inner[1:])
        down = np.einsum("pr...,ri->pi...", mid, down)
    else:
        down = shaped("down", rank, *inner)
    up = shaped("up", out, outer)
    scale = np.float32(_scale(tensors.get("alpha"), layer, rank, config))
    a = layer.binding.leaf.load(down).reshape(-1, outer)
    return {"a": jnp.asarray(a), "b": jnp.asarray((up * scale).T)}


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of at least two axes without the ones at its end."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _scale(alpha: np.ndarray | None, layer: Layer, rank: int, config: Mapping[str, Any]) -> float:
    """`alpha / rank`: alpha from its own tensor, else from what peft says of the update, else the rank."""
    if alpha is not None:
        if alpha.size != 1:
            raise ValueError(f"the alpha of {layer.name} is {alpha.shape}, expected one number")
        return float(alpha.reshape(())) / rank
    ours = {name: value for name, value in config.items() if not name.startswith(("unet.", "text_encoder."))}
    prefix = f"{layer.component}."
    ours |= {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
    chosen = ours.get("lora_alpha")
    if chosen is None:
        return 1.0
    for pattern, value in (ours.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer.name):
            chosen = value
            break
    return chosen / (math.sqrt(rank) if ours.get("use_rslora") else rank)


def _peft_config(weights: Weights) -> dict[str, Any]:
    """What peft says of an update, in the metadata of its file or beside it; empty where it says nothing."""
    beside = weights.source.parent / PEFT_CONFIG
    if text := weights.metadata.get(METADATA):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{weights.source}: its metadata {METADATA} is not json ({error})") from error
    return load_json(beside) if weights.source.name == FILE_NAMES[1] and beside.is_file() else {}


def _place(tree: dict[Any, Any], path: str, value: Params) -> None:
    """Put a branch at a dotted path; numbers in it are list positions."""
    for name in path.split("."):
        tree = tree.setdefault(int(name) if name.isdigit() else name, {})
    tree |= value


# Writing ----------------------------------------------------------------------------------------------------------


def save_public_lora(path: str | Path, lora: Lora, components: Mapping[str, Component], dtype: str = "float32") -> Path:
    """Write an update of public networks as a file that diffusers' `load_lora_weights` reads.

    Args:
        path: a file that ends in .safetensors, or a folder, in which it becomes pytorch_lora_weights.safetensors.
        components: of the model that it is for.
        dtype: of the factors: "float32", "float16" or "bfloat16".
    Returns:
        The file. `alpha / rank` is multiplied into the second factor, and all layers get the largest rank, padded with
        zeros: then no reader needs an alpha, and none scales one layer by another's rank.
    Raises:
        ValueError: an update with new words, which the format has no place for; one that is empty or does not fit the
            components; a network that is not public.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / FILE_NAMES[0]
    if lora.new_words:
        raise ValueError(
            f"the update brings the new words {', '.join(lora.new_words)}, for which diffusers' format has no place: "
            "save it in our own with interop.lora.save_lora"
        )
    layers = {f"{layer.component}.{layer.binding.ours}": layer for layer in _public(components)}
    updates = dict(_updates(lora.factors))
    if unknown := sorted(updates.keys() - layers.keys()):
        raise ValueError(f"the update changes {', '.join(unknown)}, which this model's public layout does not have")
    if not updates:
        raise ValueError("the update is empty: it changes no kernel")
    rank = max(len(b) for _, b in updates.values())
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in sorted(updates.items()):
        layer = layers[name]
        factors = _torch_factors(layer, a, b * np.float32(lora.alpha / lora.rank), rank)
        ends = _ENDS[layer.component]
        tensors |= {f"{layer.component}.{layer.name}.{end}.weight": value for end, value in zip(ends, factors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    target = dtype_of(dtype)
    write_safetensors(path, {key: value.astype(target) for key, value in tensors.items()}, {"format": "pt"})
    return path


def _public(components: Mapping[str, Component]) -> list[Layer]:
    if "unet" in components and not components["unet"].config.reads_timesteps:
        raise ValueError("the model's UNet is of family 'native', which diffusers does not have: use save_lora")
    return public_layers(components)


def _updates(factors: Params) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Dotted path of every kernel -> its two factors."""
    flat = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(factors)}
    for name, a in flat.items():
        if name.endswith(".a"):
            yield name.removesuffix(".a"), (a, flat[f"{name.removesuffix('.a')}.b"])


def _torch_factors(layer: Layer, a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`down [rank in ...]` and `up [out rank ...]` as torch lays them out, padded to `rank`. Raises ValueError."""
    inner, out = layer.binding.our_shape[:-1], layer.binding.our_shape[-1]
    if a.shape != (math.prod(inner), len(b)) or b.shape[1] != out:
        kernel = f"a kernel {layer.binding.our_shape}"
        raise ValueError(f"{layer.binding.ours} has factors {a.shape} and {b.shape} for {kernel}")
    a = np.pad(a, ((0, 0), (0, rank - len(b))))
    b = np.pad(b, ((0, rank - len(b)), (0, 0)))
    window = len(layer.binding.their_shape) - 2
    return layer.binding.leaf.save(a.reshape(*inner, rank)), b.T.reshape(out, rank, *(1,) * window)
