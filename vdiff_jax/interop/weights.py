"""Foreign checkpoints into our parameter trees and back, by rule tables kept as data.

A rule is `(theirs, ours, kind)`: the dotted name of a layer in the checkpoint, its dotted path in our tree, and what
it is, a name in `KINDS`, which says which tensors it has and how each is laid out on either side. A family's table is
built from its configuration and lists every layer by name, so it reads both ways, a checkpoint can be compared with it
before any weight is read, and a dry run can print it.

Everything must match: keys that no rule names, tensors that are missing and tensors of another shape are all listed,
with both shapes, and refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from vdiff_jax.interop.weight_files import CHECKSUMS, STALE, Weights, checksum, dtype_of, write_safetensors
from vdiff_jax.parallel import path_name
from vdiff_jax.types import Params

Rule = tuple[str, str, str]


class Leaf(NamedTuple):
    """One tensor of a layer: the end of its name on either side, and its layout there and back."""

    theirs: str
    ours: str
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _permuted(theirs: str, ours: str, order: Sequence[int]) -> Leaf:
    back = tuple(np.argsort(order).tolist())
    return Leaf(theirs, ours, lambda x: x.transpose(order), lambda x: x.transpose(back))


def _same(theirs: str, ours: str) -> Leaf:
    return Leaf(theirs, ours, lambda x: x, lambda x: x)


_BIAS = _same(".bias", ".bias")
KINDS: dict[str, tuple[Leaf, ...]] = {
    "tensor": (_same("", ""),),
    "dense": (_permuted(".weight", ".kernel", (1, 0)), _BIAS),
    "norm": (_same(".weight", ".scale"), _BIAS),
    "embedding": (_same(".weight", ""),),
    "conv": (_permuted(".weight", ".kernel", (2, 3, 1, 0)), _BIAS),
    "conv1x1": (Leaf(".weight", ".kernel", lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]), _BIAS),
    "temporal_conv": (
        Leaf(
            ".weight",
            ".kernel",
            lambda x: x[..., 0, 0].transpose(2, 1, 0),
            lambda x: x.transpose(2, 1, 0)[..., None, None],
        ),
        _BIAS,
    ),
}
"""Torch layouts against ours: dense `[o i] -> [i o]`, conv `[o i k k] -> [k k i o]`, conv1x1 `[o i 1 1] -> [i o]`,
temporal_conv `[o i k 1 1] -> [k i o]`; a "tensor" is one array under its own name on both sides."""


def nested(theirs: str, ours: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules of a part, seen from the whole: both prefixes set before every name."""
    return [(f"{theirs}.{there}", f"{ours}.{here}", kind) for there, here, kind in rules]


@dataclasses.dataclass(frozen=True)
class Binding:
    """One tensor in both worlds. theirs, ours: full names; their_shape, our_shape; leaf: the way between them."""

    theirs: str
    ours: str
    their_shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    leaf: Leaf


def bind(rules: Sequence[Rule], abstract: Params) -> list[Binding]:
    """What every parameter of `abstract` is called in the checkpoint, in the order of the tree.

    Rules for layers that this network does not have are passed over: tables may be written for all of a family.
    Raises ValueError for a parameter that no rule, or more than one, names: the table is wrong, not a checkpoint.
    """
    shapes = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    found: dict[str, list[Binding]] = {name: [] for name in shapes}
    for theirs, ours, kind in rules:
        for leaf in KINDS[kind]:
            name = ours + leaf.ours
            if name in shapes:
                their_shape = leaf.save(np.broadcast_to(np.float32(0), shapes[name])).shape
                found[name].append(Binding(theirs + leaf.theirs, name, their_shape, shapes[name], leaf))
    if wrong := sorted(name for name, bindings in found.items() if len(bindings) != 1):
        raise ValueError(f"the rule table names these parameters not exactly once: {', '.join(wrong)}")
    return [bindings[0] for bindings in found.values()]


# Reading ----------------------------------------------------------------------------------------------------------


class Reading(TypedDict, total=False):
    """How weights are read, the same for every network; loaders hand it on to `load_params`.

    shardings: a tree of shardings like the parameters, or a function that makes one from their shapes; each tensor is
        read, laid out and sent to its devices before the next is read. Left out: numpy arrays.
    on_tensor: called with our name of each tensor that is done.
    plan: a dry run: nothing is read, the parameters are shapes, and this list gets a `Binding` for every tensor.
    """

    shardings: Any
    on_tensor: Callable[[str], None] | None
    plan: list[Binding] | None


def load_params(
    weights: Weights,
    rules: Sequence[Rule],
    abstract: Params,
    *,
    renames: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    dtype: str | None = None,
    shardings: Any = None,
    on_tensor: Callable[[str], None] | None = None,
    plan: list[Binding] | None = None,
) -> Params:
    """The tree of `abstract` filled from a checkpoint, one tensor at a time.

    Args:
        renames: `(pattern, replacement)` applied to every key first, for checkpoints that use older names.
        ignore: patterns of whole keys that are known and not wanted (buffers, heads of another task).
        dtype: of the parameters; None = that of `abstract` (float32).
        shardings, on_tensor, plan: see `Reading`.
    Raises:
        ValueError: listing every key that is unknown, missing or of another shape, with both shapes.
    """
    bindings = bind(rules, abstract)
    found = check_weights(weights, bindings, renames=renames, ignore=ignore)
    if plan is not None:
        plan += bindings
        return abstract
    if callable(shardings):
        shardings = shardings(abstract)
    by_name = {binding.ours: binding for binding in bindings}

    def load(path: tuple, leaf: Any, sharding: Any = None) -> Any:
        binding = by_name[path_name(path)]
        value = binding.leaf.load(weights.read(found[binding.theirs]))
        value = contiguous(value, dtype_of(dtype) if dtype else leaf.dtype)
        if on_tensor is not None:
            on_tensor(binding.ours)
        if sharding is None:
            return value
        return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]))

    if shardings is None:
        return jax.tree_util.tree_map_with_path(load, abstract)
    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def contiguous(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same numbers in `dtype`, one after the other in memory; at most one copy is made.

    What has been transposed is copied in strips: numpy's own copy jumps through all of a large tensor for every row
    of the result, which takes four times as long.
    """
    if value.flags.c_contiguous:
        return value.astype(dtype, copy=False)
    result, width = np.empty(value.shape, dtype), 64
    for first in range(0, value.shape[-1], width):
        result[..., first : first + width] = value[..., first : first + width]
    return result


def check_weights(
    weights: Weights,
    bindings: Sequence[Binding],
    *,
    renames: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
) -> dict[str, str]:
    """Where each expected tensor is: the checkpoint's key by the name in the rules. Arguments and errors as in
    `load_params`."""
    found: dict[str, str] = {}
    problems: list[str] = []
    expected = {binding.theirs: binding for binding in bindings}
    for key, shape in weights.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in expected:
            if name in found:
                problems.append(f"{key} and {found[name]} are both {name}")
            found[name] = key
            if shape != expected[name].their_shape:
                problems.append(f"{key} is {shape}, expected {expected[name].their_shape} for {expected[name].ours}")
        elif not any(re.fullmatch(pattern, key) for pattern in ignore):
            problems.append(f"unexpected {key} {shape}")
    problems += [
        f"missing {name} {binding.their_shape} for {binding.ours} {binding.our_shape}"
        for name, binding in expected.items()
        if name not in found
    ]
    if problems:
        raise ValueError(f"{weights.source} does not fit the model: {'; '.join(sorted(problems))}")
    return found


# Writing ----------------------------------------------------------------------------------------------------------


def save_weights(
    folder: str | Path,
    params: Params,
    rules: Sequence[Rule],
    *,
    stem: str = "diffusion_pytorch_model",
    dtype: str = "float32",
    max_shard_bytes: int = 10 * 2**30,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a parameter tree as a foreign checkpoint: `<stem>.safetensors`, or shards and their index.

    extra: tensors that the other library expects and we do not keep (buffers), by their name.
    Returns the file, or the index. Written by temporary names, the index last.
    """
    folder, target = Path(folder), dtype_of(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    bindings = bind(rules, params)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shards: list[list[Binding]] = [[]]
    room = max_shard_bytes
    for binding in bindings:
        size = int(np.prod(binding.our_shape, dtype=np.int64)) * target.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(binding)
        room -= size
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    placed: dict[str, str] = {}
    for name, shard in zip(names, shards):
        tensors = {b.theirs: b.leaf.save(np.asarray(leaves[b.ours])).astype(target) for b in shard}
        if name == names[0]:
            tensors |= dict(extra or {})
        sums = json.dumps({key: checksum(value) for key, value in tensors.items()})
        write_safetensors(folder / name, tensors, {"format": "pt", CHECKSUMS: sums})
        placed |= dict.fromkeys(tensors, name)
    # What an earlier save left would be read in the place of this one.
    for path in folder.glob(f"{stem}*.safetensors*"):
        if path.name not in names and re.fullmatch(re.escape(stem) + STALE, path.name):
            path.unlink()
    if len(shards) == 1:
        return folder / names[0]
    total = sum(int(np.prod(b.our_shape, dtype=np.int64)) for b in bindings) * target.itemsize
    total += sum(value.nbytes for value in (extra or {}).values())
    index = folder / f"{stem}.safetensors.index.json"
    temporary = index.with_name(f".{index.name}.{os.getpid()}.tmp")
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, index)
    return index
