"""Model folders: one safetensors file and one json entry per component.

folder/
  config.json              {"format": ..., "components": {name: config}, ...settings}
  <component>.safetensors  one tensor per parameter, named by its dotted path
  tokenizer.json           where the model has a prompt
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vdiff_jax.parallel import path_name
from vdiff_jax.types import Params

FORMAT = "vdiff_jax/1"


def flatten(params: Params) -> dict[str, np.ndarray]:
    """`{"a": {0: {"kernel": x}}}` -> `{"a.0.kernel": x}` as numpy arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflatten_like(flat: dict[str, np.ndarray], abstract: Params, source: str) -> Params:
    """The tree of `abstract` filled from `flat`, strictly.

    Raises ValueError listing every key that is missing, not expected, or of another shape.
    """
    wanted = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    problems = [f"missing {name} {wanted[name]}" for name in wanted.keys() - flat.keys()]
    problems += [f"unexpected {name} {flat[name].shape}" for name in flat.keys() - wanted.keys()]
    problems += [
        f"{name} is {flat[name].shape}, expected {wanted[name]}"
        for name in wanted.keys() & flat.keys()
        if flat[name].shape != wanted[name]
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(sorted(problems))}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: flat[path_name(path)].astype(leaf.dtype), abstract)


def save_tensors(
    path: str | Path, params: Params, dtype: str = "float32", metadata: dict[str, str] | None = None
) -> None:
    """Write a parameter tree to one safetensors file, by a temporary name; dtype float32, float16 or bfloat16."""
    path = Path(path)
    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: np.ascontiguousarray(value.astype(target)) for name, value in flatten(params).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, **(metadata or {})})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path, abstract: Params) -> Params:
    """Read a safetensors file into the tree of `abstract`; strict, see `unflatten_like`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the model folder is incomplete")
    try:
        flat = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    return unflatten_like(flat, abstract, str(path))


def save_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write json by a temporary name in the same folder."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_json(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not a model folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid json ({error})") from error
