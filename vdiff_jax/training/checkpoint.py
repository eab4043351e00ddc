"""Async, sharded checkpoints of a `TrainState` and the run's data position, by orbax.

A checkpoint holds `state` (step, params, optimizer, EMA, counters), and `meta` (the config and the data position).
Because the order of the data is a pure function of (seed, step), the step is the data position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vdiff_jax.parallel import path_name
from vdiff_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run folder, `<workdir>/checkpoints/<step>`.

    keep: how many of the newest to keep. Writes are atomic (orbax renames a finished folder) and asynchronous:
    `save` returns once the arrays are copied to the host.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3):
        folder = Path(workdir).absolute() / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder,
            # Without handlers, a new process could not read the shapes of what another one saved.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Save under `state.step`; a step that is there already is left alone."""
        step = int(state.step)
        if step == self.latest_step:
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def restore(
        self, abstract: TrainState, shardings: Any, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint (or `step`) onto `shardings`, whatever mesh wrote it.

        abstract: a tree of ShapeDtypeStructs. Raises ValueError naming every leaf that is missing or of another shape.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self.folder} holds no finished checkpoint: train first, or give another workdir")
        self._check_shapes(abstract, step)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        )
        return restored["state"], restored["meta"]

    def _check_shapes(self, abstract: TrainState, step: int) -> None:
        stored_tree = self._manager.item_metadata(step)["state"]
        stored_tree = getattr(stored_tree, "tree", stored_tree)
        stored = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored_tree)}
        wanted = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        problems = [
            f"{name}: checkpoint {stored.get(name, 'has none')}, this config {wanted.get(name, 'has none')}"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"checkpoint {self.folder / str(step)} is of another config ({shown}): "
                "use the config it was made with, or another workdir"
            )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
