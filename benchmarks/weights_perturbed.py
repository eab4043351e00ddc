"""One tensor of a folder of weights is dropped, renamed or transposed: is it reported when the folder is loaded?"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vdiff_jax as vd

CHANGES = ("drop", "rename", "transpose")
FAMILIES = ("modelscope", "animatediff", "svd")


def perturb(scratch: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """`count` changes in turn, each of one random tensor of one random file of the tiny pipelines of the tests.

    Changes are made to folders as others write them, and, from the same draw, to what `save_pretrained` writes.
    """
    from golden.pipeline_cases import write_pipeline

    results = {}
    folders = {family: write_pipeline(family, scratch / family) for family in FAMILIES}
    for name in ("theirs", "ours"):
        if name == "ours":
            folders = {family: _saved(folder, scratch / f"{family}_ours") for family, folder in folders.items()}
        results[name] = _tries(folders, count, np.random.default_rng(seed))
    return results


def _saved(folder: Path, target: Path) -> Path:
    vd.load(folder).save_pretrained(target)
    return target


def _tries(folders: dict[str, Path], count: int, rng: np.random.Generator) -> dict[str, Any]:
    reported, silent = Counter(), {"square": [], "unread": [], "unknown": []}
    for index in range(count):
        change = CHANGES[index % len(CHANGES)]
        family = FAMILIES[rng.integers(len(FAMILIES))]
        file, tensors, name, metadata = _draw(folders[family], change, rng)
        with _changed(file, _perturbed(tensors, name, change), metadata):
            try:
                vd.load(folders[family])
            except ValueError as error:
                assert name.rpartition(".")[0] in str(error), f"{name} is not named in: {error}"
                reported[change] += 1
                continue
        shape = tensors[name].shape
        # An AnimateDiff network that has motion modules keeps them: the adapter beside it is not read.
        unread = family == "animatediff" and file.parent.name == "motion_adapter"
        why = "unread" if unread else "square" if change == "transpose" and shape[0] == shape[1] else "unknown"
        silent[why].append(f"{change} {family}/{file.parent.name}/{name} {list(shape)}")
    return {
        "tried": dict(Counter(CHANGES[index % len(CHANGES)] for index in range(count))),
        "reported": dict(reported),
        "silent": {why: len(cases) for why, cases in silent.items()},
        "silent_and_not_square": silent["unread"] + silent["unknown"],
    }


def _draw(folder: Path, change: str, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray], str, Any]:
    """A file, all its tensors, the name of one, and the file's metadata; what is transposed has two axes or more."""
    files = sorted(folder.rglob("*.safetensors"))
    file = files[rng.integers(len(files))]
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    names = sorted(name for name, value in tensors.items() if value.ndim >= 2 or change != "transpose")
    return file, tensors, names[rng.integers(len(names))], metadata


def _perturbed(tensors: dict[str, np.ndarray], name: str, change: str) -> dict[str, np.ndarray]:
    changed = {key: value for key, value in tensors.items() if key != name}
    if change == "rename":
        changed[f"{name}_"] = tensors[name]
    if change == "transpose":
        changed[name] = np.ascontiguousarray(tensors[name].swapaxes(0, 1))
    return changed


class _changed:
    """The file with other tensors, as long as the block lasts."""

    def __init__(self, file: Path, tensors: dict[str, np.ndarray], metadata: Any):
        self.file, self.kept = file, file.with_suffix(".kept")
        shutil.copy(file, self.kept)
        save_file(tensors, file, metadata=metadata)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        shutil.move(self.kept, self.file)
