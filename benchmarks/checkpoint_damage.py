"""Bits flipped and files cut in copies of a real checkpoint, for `checkpoint_faults.py`: what becomes of each."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fault_run import start, train

from vdiff_jax import parallel
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.manifest import DamagedCheckpoint, Manifest, describe_files


class Saved:
    """A run with checkpoints at steps 2 and 4, copied for each trial."""

    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        train(self.folder, 4, 2)
        self.mesh = parallel.make_mesh()
        state, self.shardings, _ = start(self.mesh)
        self.abstract = jax.eval_shape(lambda tree: tree, state)
        self.truth = {step: self.restore(self.folder, step)[0] for step in (2, 4)}

    def restore(self, workdir: Path, step: int | None = None) -> tuple[Any, list[str]]:
        """(state, warnings)."""
        checkpoints = Checkpoints(workdir)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state, _ = checkpoints.restore(self.abstract, self.shardings, step)
            finally:
                checkpoints.close()
        return state, [str(warning.message) for warning in caught]

    def files(self) -> list[str]:
        """Of step 4, manifest and metadata included."""
        root = self.folder / "checkpoints" / "4"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    @contextlib.contextmanager
    def copy(self, *, only_newest: bool = False) -> Iterator[tuple[Path, Path]]:
        """(work folder, folder of step 4) of a copy."""
        with tempfile.TemporaryDirectory() as workdir:
            shutil.copytree(self.folder / "checkpoints", Path(workdir) / "checkpoints")
            if only_newest:
                shutil.rmtree(Path(workdir) / "checkpoints" / "2")
            yield Path(workdir), Path(workdir) / "checkpoints" / "4"

    def outcome(self, workdir: Path, name: str) -> str:
        """fell back, failed (both naming `name`), unnamed, wrong (a state that was never saved) or silent."""
        try:
            state, said = self.restore(workdir)
        except DamagedCheckpoint as error:
            return "failed" if name in str(error) else "unnamed"
        if int(state.step) == 4:
            return "silent"
        if not equal(state, self.truth[2]) or not (workdir / "checkpoints" / "4.damaged").is_dir():
            return "wrong"
        return "fell back" if any(name in sentence for sentence in said) else "unnamed"


def equal(one: Any, other: Any) -> bool:
    """Bitwise."""
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*map(jax.tree.leaves, (one, other))))


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def bits(saved: Saved, trials: int, rng: random.Random) -> dict[str, Any]:
    """Flips shared out evenly over the files; every second one where no older checkpoint is left."""
    names = saved.files()
    counts: Counter[str] = Counter()
    for trial in range(trials):
        name = names[trial % len(names)]
        with saved.copy(only_newest=trial % 2 == 1) as (workdir, newest):
            flip_bit(newest / name, rng.randrange(8 * (newest / name).stat().st_size))
            counts[saved.outcome(workdir, name)] += 1
    return {"files": len(names), **counts, "silent": counts["silent"], "unnamed": counts["unnamed"]}


def early_bits(saved: Saved, trials: int, rng: random.Random) -> dict[str, Any]:
    """Flips in the arrays between the device and the disk: the files' digests are those of the damaged files."""
    counts: Counter[str] = Counter()
    data = [
        name
        for name in saved.files()
        if "/d/" in name and (saved.folder / "checkpoints/4" / name).stat().st_size > 2**16
    ]
    for _ in range(trials):
        with saved.copy() as (workdir, newest):
            name = rng.choice(data)
            flip_bit(newest / name, rng.randrange(8 * (newest / name).stat().st_size))
            content = Manifest.read(newest)
            (newest / "manifest.json").unlink()
            content.files.update(describe_files(newest))
            content.write(newest)
            counts[saved.outcome(workdir, str(newest))] += 1
    return {**counts, "silent": counts["silent"], "unnamed": counts["unnamed"]}


def truncate(saved: Saved, names: list[str]) -> dict[str, Any]:
    """Every one of these files deleted, emptied, cut in half."""
    counts: Counter[str] = Counter()
    for number, name in enumerate(names):
        for kind in ("delete", "empty", "half"):
            with saved.copy(only_newest=number % 2 == 1) as (workdir, newest):
                path = newest / name
                path.unlink() if kind == "delete" else os.truncate(
                    path, 0 if kind == "empty" else path.stat().st_size // 2
                )
                counts[saved.outcome(workdir, name)] += 1
    return {**counts, "silent": counts["silent"], "unnamed": counts["unnamed"]}
