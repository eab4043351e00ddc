"""A part of a checkpoint, for a state of another make: what fits is read, the rest stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vdiff_jax.parallel import path_name
from vdiff_jax.types import Array


def read_arrays(folder: Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Dotted path -> array, on the sharding of its target.

    folder: where orbax has written a tree of arrays. targets: those to be read, of the shapes and types that are
    stored, with shardings; nothing else is read. Raises what orbax raises where a file is not readable.
    """
    handler = ocp.PyTreeCheckpointHandler()
    stored: Any = handler.metadata(epath.Path(folder))

    def target(path: tuple, _: Any) -> Any:
        return targets.get(path_name(path), ocp.PLACEHOLDER)

    def arguments(path: tuple, _: Any) -> ocp.RestoreArgs:
        leaf = targets.get(path_name(path))
        if leaf is None:
            return ocp.RestoreArgs()
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    tree = getattr(stored, "tree", stored)
    wanted = jax.tree_util.tree_map_with_path(target, tree)
    restore_args = jax.tree_util.tree_map_with_path(arguments, tree)
    found = handler.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args))
    named = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    return {name: named[name] for name in targets}


def filled(fresh: Any, arrays: dict[str, Array]) -> Any:
    """`fresh` with the leaves that `arrays` names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(path_name(path), leaf), fresh)
