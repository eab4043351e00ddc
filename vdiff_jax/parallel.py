"""One mesh by name, shardings by rule on parameter paths, multi-host start.

The mesh has two axes: `data` splits the batch; `fsdp` splits the batch too, and also parameters, optimizer state and
EMA, which are gathered where they are used. One device is the mesh 1 x 1; nothing else in the code knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

AXES = ("data", "fsdp")


def start_distributed() -> None:
    """`jax.distributed.initialize()` from the scheduler's environment; call it before any other use of JAX."""
    jax.distributed.initialize()


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A `data x fsdp` mesh over all devices of all processes; one of the two may be -1 = whatever is left.

    Raises ValueError if the product is not the number of devices.
    """
    count = jax.device_count()
    if data == -1 and fsdp == -1:
        raise ValueError("parallel.data and parallel.fsdp are both -1: give at least one of them a size")
    data = count // fsdp if data == -1 else data
    fsdp = count // data if fsdp == -1 else fsdp
    if data * fsdp != count:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} does not match {count} devices: change parallel.data or .fsdp"
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def describe(mesh: Mesh) -> str:
    shape = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{shape} on {mesh.size} {jax.default_backend()} device(s), {jax.process_count()} process(es)"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the global batch splits evenly."""
    if batch_size % mesh.size:
        raise ValueError(f"data.batch_size={batch_size} is not a multiple of {mesh.size} devices: change one of them")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of the batch -> global arrays sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def tree_shardings(
    abstract: Any, mesh: Mesh, rules: tuple[tuple[str, PartitionSpec], ...] = (), min_size: int = 2**14
) -> Any:
    """A NamedSharding for every leaf of `abstract` (a tree of ShapeDtypeStructs).

    The first rule whose regex is found in the leaf's dotted path decides. Without a match, a leaf of at least
    `min_size` scalars is split over `fsdp` along its largest divisible axis; smaller ones are replicated. Optimizer
    moments and EMA end in the same paths and shapes as their parameters, so they are split the same way.
    """
    size = mesh.shape["fsdp"]

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, spec)
        if size == 1 or math.prod(leaf.shape) < min_size:
            return replicated(mesh)
        for axis in sorted(range(len(leaf.shape)), key=lambda a: -leaf.shape[a]):
            if leaf.shape[axis] % size == 0:
                return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, abstract)


def on_one_device(tree: Any) -> Any:
    """Every leaf whole on the first device of this process."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: sharding, tree)


def path_name(path: tuple) -> str:
    """`a.b.0.kernel` from a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def gather(tree: Any, mesh: Mesh) -> Any:
    """Constrain every leaf to be whole on every device: FSDP parameters are gathered once, at use."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, replicated(mesh)), tree)
