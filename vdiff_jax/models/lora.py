"""Low-rank updates of a frozen network: W' = W + (alpha / rank) A B (LoRA, Hu et al. 2021).

Everything here is a pure function of plain nested dicts. The tree of factors has the paths of the parameters it changes
and ends in the two factors where those end in a kernel:

    params  {"down": {0: {"film": {"kernel": W}}}}
    lora    {"down": {0: {"film": {"kernel": {"a": A, "b": B}}}}}

A network with its update is `apply(merge(params, lora, alpha / rank), ...)`, inside whatever jit calls it: the merge is
small beside the forward pass. A gradient with respect to `lora` leaves `params` alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vdiff_jax.types import Array, Params

DEFAULT_TARGETS = (
    r"\.to_(q|k|v|out)\.kernel$",
    r"\.film\.kernel$",
    r"\.embedding\.(time|text)\.kernel$",
)
"""Attention, the modulation of every block by its frame's embedding, and how time and prompt enter that embedding."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """An update and what it belongs to.

    factors: tree of factors by component, `{"unet": {...}, "text_encoder": {...}}`. alpha: the update is scaled by
    `alpha / rank`; updates of other libraries have that in their factors, whose own ranks may differ. targets: the
    patterns that chose the kernels. new_words: words that the base model's tokenizer lacked; word_rows: their
    embeddings, `[n d]` f32. base: digest of each component as it was before the update; base_name: where that model was
    found.
    """

    factors: Params
    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    new_words: tuple[str, ...] = ()
    word_rows: Any = None
    base: dict[str, str] = dataclasses.field(default_factory=dict)
    base_name: str = ""


def lora_targets(params: Params, patterns: Sequence[str] = DEFAULT_TARGETS) -> tuple[str, ...]:
    """Dotted paths of the kernels in which one of the regular expressions is found, sorted.

    params: a tree of arrays or of their shapes. Only kernels count: arrays of two or more axes, the last is the output.
    Raises ValueError for no pattern at all, a wrong one, or one that is found in no kernel.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = sorted(name for path, leaf in leaves if (name := _name(path)).endswith("kernel") and len(leaf.shape) >= 2)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise ValueError(f"the target {pattern!r} is not a regular expression ({error})") from error
        if not found:
            raise ValueError(f"the target {pattern!r} is found in no kernel; kernels are named like {paths[:3]}")
        chosen |= found
    if not chosen:
        raise ValueError("no targets: give at least one pattern of kernels to update")
    return tuple(sorted(chosen))


def init_lora(key: Array, params: Params, rank: int, targets: Sequence[str]) -> Params:
    """Factors of rank `rank` for the kernels at the dotted paths `targets`: A random, B zero, so nothing changes yet.

    A kernel `[... out]` gets `a [prod(...) rank]`, normal with variance 1 / prod(...), and `b [rank out]`, both f32; of
    a convolution that is its matrix from a patch to an output. params: a tree of arrays or of their shapes.
    Raises ValueError for a rank below 1 or a path that is not there.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: it must be at least 1")
    leaves = {_name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if missing := sorted(set(targets) - leaves.keys()):
        raise ValueError(f"the parameters have no {', '.join(missing)}")
    sizes = {name: _matrix(leaves[name][1].shape) for name in targets}
    # One draw for all, cut up: each distinct random shape would cost its own compile time.
    flat = jax.random.normal(key, (sum(rank * size for size, _ in sizes.values()),), jnp.float32)
    lora, offset = {}, 0
    for name, (size, out) in sizes.items():
        a = flat[offset : offset + size * rank].reshape(size, rank) / math.sqrt(size)
        offset += size * rank
        branch = lora
        for key_entry in leaves[name][0]:
            branch = branch.setdefault(key_entry.key, {})
        branch |= {"a": a, "b": jnp.zeros((rank, out), jnp.float32)}
    return lora


def merge(params: Params, lora: Params, scale: float | Array = 1.0) -> Params:
    """`W + scale * A B` for every kernel that `lora` names; all other arrays are those of `params`, not copies.

    scale: `alpha / rank`, times how strongly the update shall act; may be traced.
    Raises ValueError, listing them, for kernels that `params` lacks or that have another shape.
    """
    if problems := misfits(params, lora):
        raise ValueError(f"the low-rank update does not fit the network: {'; '.join(problems)}")
    return _merge(params, lora, scale)


def unmerge(params: Params, lora: Params, scale: float | Array = 1.0) -> Params:
    """What `merge(..., lora, scale)` was made from, but for rounding."""
    return merge(params, lora, -jnp.asarray(scale))


def misfits(params: Params, lora: Params, prefix: str = "") -> list[str]:
    """What keeps `lora` from being merged into `params`, one phrase each; empty if it fits."""
    problems = []
    for name, branch in lora.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        there = params.get(name)
        if there is None:
            problems.append(f"unexpected {path}")
        elif isinstance(there, dict):
            problems += misfits(there, branch, path)
        elif set(branch) != {"a", "b"}:
            problems.append(f"{path} needs the factors a and b, it has {', '.join(map(str, sorted(branch)))}")
        else:
            a, b = branch["a"].shape, branch["b"].shape
            if len(a) != 2 or len(b) != 2 or a[1] != b[0] or (a[0], b[1]) != _matrix(there.shape):
                problems.append(f"{path} has factors {tuple(a)} and {tuple(b)} for a kernel {tuple(there.shape)}")
    return problems


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _merge(params: Any, lora: Params, scale: float | Array) -> Any:
    if isinstance(params, dict):
        return {**params, **{name: _merge(params[name], branch, scale) for name, branch in lora.items()}}
    # Accelerators would multiply with few bits by default; what is merged for good is worth all of them.
    update = scale * jnp.matmul(lora["a"], lora["b"], precision="highest")
    return (params + update.reshape(params.shape)).astype(params.dtype)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
