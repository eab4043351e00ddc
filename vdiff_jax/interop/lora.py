"""Low-rank updates as files: ours, one safetensors file of factors with what they belong to in its metadata; those of
other libraries are recognised and handed to `interop.public_lora`.

    unet.mid.res.film.kernel.a, ....b   the factors of a kernel, by its dotted path
    new_words                           [n d], embeddings of the words that the base model lacks

Metadata, all text: format, rank, alpha, targets, new_words, base (digest of each component that is changed) and
base_name (where the base model was found).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vdiff_jax.components import Component
from vdiff_jax.interop import hub
from vdiff_jax.interop.pretrained import save_tensors
from vdiff_jax.interop.public_lora import load_public_lora
from vdiff_jax.interop.weight_files import open_weights
from vdiff_jax.models.lora import Lora
from vdiff_jax.parallel import path_name
from vdiff_jax.types import Params

FORMAT = "vdiff_jax_lora/1"
FILE_NAME = "lora.safetensors"
_WORDS = "new_words"


def save_lora(path: str | Path, lora: Lora) -> None:
    """Write an update to one file, by a temporary name.

    Raises ValueError for factors of several ranks, as files of other libraries may have them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(lora.factors)
    ranks = {len(leaf) for path, leaf in leaves if path_name(path).endswith(".b")}
    if len(ranks) > 1:
        raise ValueError(f"the update has ranks {sorted(ranks)}, our format has one: use save_public_lora")
    metadata = {
        "format": FORMAT,
        "rank": str(lora.rank),
        "alpha": repr(float(lora.alpha)),
        "targets": json.dumps(list(lora.targets)),
        "new_words": json.dumps(list(lora.new_words)),
        "base": json.dumps(lora.base),
        "base_name": lora.base_name,
    }
    words = {} if lora.word_rows is None else {_WORDS: lora.word_rows}
    save_tensors(path, {**lora.factors, **words}, metadata=metadata)


def load_lora(path: str | Path) -> Lora:
    """Read an update: a file of `save_lora`, or a folder of a training run that holds one.

    Raises FileNotFoundError if there is none; ValueError if the file is no such update or is incomplete, naming every
    tensor that has no place.
    """
    path = _find(Path(path))
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: it holds no update")
    try:
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
        targets, words, base = (json.loads(metadata[name]) for name in ("targets", "new_words", "base"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has incomplete metadata ({error})") from error
    rows = tensors.pop(_WORDS, None)
    if len(words) != (0 if rows is None else len(rows)):
        raise ValueError(f"{path} names {len(words)} new words and has embeddings for another number of them")
    return Lora(
        factors=_factors(tensors, rank, path),
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        new_words=tuple(words),
        word_rows=None if rows is None else jnp.asarray(rows),
        base=base,
        base_name=metadata.get("base_name", ""),
    )


def open_lora(source: str | Path, components: Mapping[str, Component]) -> Lora:
    """Read an update for a model with these components, whoever made it: what the file holds decides.

    source: as in `load_lora` or `load_public_lora`; or a name on the hub, "owner/name".
    Raises FileNotFoundError, ValueError: as those two.
    """
    path = Path(source)
    if own := _own_file(path):
        metadata = open_weights(own).metadata
        return load_lora(own) if metadata.get("format") == FORMAT else load_public_lora(own, components)
    if hub.is_hub_name(source):
        path = hub.download(str(source))
    if path.is_dir() and any(path.rglob("*.safetensors")):
        return load_public_lora(path, components)
    return load_lora(path)  # raises


def _own_file(path: Path) -> Path | None:
    candidates = [path, path / FILE_NAME, path / "model" / FILE_NAME]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _find(path: Path) -> Path:
    found = _own_file(path)
    if found is None:
        raise FileNotFoundError(f"{path} is no file of a low-rank update, nor a folder that holds {FILE_NAME}")
    return found


def _factors(tensors: dict[str, np.ndarray], rank: int, path: Path) -> Params:
    """The nested tree; numbers in a dotted path are list positions."""
    problems = []
    tree: dict[Any, Any] = {}
    for name, value in sorted(tensors.items()):
        kernel, _, factor = name.rpartition(".")
        partner = f"{kernel}.{'b' if factor == 'a' else 'a'}"
        if factor not in ("a", "b") or value.ndim != 2 or partner not in tensors:
            problems.append(f"{name} {value.shape} is not one of a pair of factors a, b")
            continue
        if value.shape[1 if factor == "a" else 0] != rank:
            problems.append(f"{name} {value.shape} is not of rank {rank}")
        branch = tree
        for key in kernel.split("."):
            branch = branch.setdefault(int(key) if key.isdigit() else key, {})
        branch[factor] = jnp.asarray(value)
    if problems or not tree:
        raise ValueError(f"{path} holds no low-rank update: {'; '.join(problems) or 'it is empty'}")
    return tree
