"""One mesh by name, shardings by rule on parameter paths, clips split over devices.

The mesh has three axes. `data` splits the batch; `fsdp` splits the batch too, and also parameters, optimizer state and
EMA, which are gathered where they are used; `context` splits the frames of every clip (`split_clips`), for clips whose
activations are too large for one device. One device is the mesh 1 x 1 x 1; nothing else in the code knows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from vdiff_jax.types import Array, Conditioning, Params

AXES = ("data", "fsdp", "context")
BATCH_AXES = ("data", "fsdp")
CLIPS = ("video", "moments", "latents")
"""Entries of a batch that have frames worth splitting."""
SPLIT_FROM = 2**12
"""Scalars from which a leaf is split by FSDP. With smaller ones whole, 10 M parameters on 8 devices take 5 % more than
an eighth each; with four times as many, 18 %."""


def make_mesh(data: int = -1, fsdp: int = 1, context: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A `data x fsdp x context` mesh over all devices of all processes; one size may be -1 = whatever is left.

    On several TPU slices `data` is what crosses them, as the network between slices is slow.
    Raises ValueError if the product is not the number of devices, or `data` no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "context": context}
    open_axes = [f"parallel.{name}" for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"{' and '.join(open_axes)} are both -1: give at least one of them a size")
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(len(devices) // math.prod(s for s in sizes.values() if s != -1), 1)
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {shape} does not match {len(devices)} devices: change parallel.data, .fsdp or .context")
    return Mesh(arranged(devices, tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of that shape, neighbours along the last axes as near to each other as they can be."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(f"parallel.data={shape[0]} is no multiple of the {slices} slices that it has to cross")
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)


def describe(mesh: Mesh) -> str:
    shape = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{shape} on {mesh.size} {jax.default_backend()} device(s), {jax.process_count()} process(es)"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over `data` and `fsdp`; what is split so lies whole on every device along `context`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """In how many parts the global batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless the global batch, and each part that is accumulated, splits evenly."""
    if batch_size % (batch_parts(mesh) * accumulation_steps):
        times = f" times train.accumulation_steps={accumulation_steps}" if accumulation_steps > 1 else ""
        raise ValueError(
            f"data.batch_size={batch_size} is not a multiple of {batch_parts(mesh)} devices "
            f"(parallel.data x parallel.fsdp){times}: change one of them"
        )


def context_size() -> int:
    """Over how many devices the mesh in use splits clips; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def check_num_frames(num_frames: int, mesh: Mesh) -> None:
    """Raises ValueError unless clips split evenly over `context`; single frames are not split."""
    count = mesh.shape["context"]
    if num_frames > 1 and num_frames % count:
        raise ValueError(f"{num_frames} frames are not a multiple of parallel.context={count}: change one of them")


# Batches ----------------------------------------------------------------------------------------------------------


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the global batch is made in `count` equal parts, and this process brings part `index`.

    Processes along `context` bring the same rows. Raises ValueError where processes hold rows in common and others not.
    """
    rows = [_rows_of(mesh, process) for process in sorted({device.process_index for device in mesh.devices.flat})]
    parts = sorted(set(rows))
    if sum(map(len, parts)) != batch_parts(mesh):
        raise ValueError(
            f"on {len(rows)} processes the mesh {dict(mesh.shape)} cuts the batch unevenly: let parallel.context "
            "divide the devices of a process, or be a multiple of them"
        )
    return parts.index(_rows_of(mesh, jax.process_index())), len(parts)


def _rows_of(mesh: Mesh, process: int) -> tuple[int, ...]:
    """The parts of the batch that the devices of a process hold."""
    owners = mesh.devices.reshape(batch_parts(mesh), -1)
    return tuple(row for row, devices in enumerate(owners) if any(d.process_index == process for d in devices))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows (see `batch_share`), a tree of numpy arrays -> global arrays, rows over the batch axes.

    The frames of `CLIPS` are split over `context` where they divide.
    """
    own = _rows_of(mesh, jax.process_index())

    def place(path: tuple, value: Any) -> jax.Array:
        value = np.asarray(value)
        length = len(value) // len(own)
        frames = path_name(path[-1:]) in CLIPS and value.shape[1] % mesh.shape["context"] == 0
        spec = PartitionSpec(BATCH_AXES, "context") if frames else PartitionSpec(BATCH_AXES)

        def part(index: Any) -> np.ndarray:
            row = own.index((index[0].start or 0) // length)
            return value[row * length : (row + 1) * length][:, *index[1:]]

        shape = (length * batch_parts(mesh), *value.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree_util.tree_map_with_path(place, batch)


def spread(rows: Array) -> Array:
    """`[b ...]` over the batch axes of the mesh in use, where it divides; else, and without a mesh, as it is."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or batch_parts(mesh) == 1 or len(rows) % batch_parts(mesh):
        return rows
    return jax.device_put(rows, batch_sharding(mesh))


# Parameters -------------------------------------------------------------------------------------------------------


def tree_shardings(
    abstract: Any, mesh: Mesh, rules: tuple[tuple[str, PartitionSpec], ...] = (), min_size: int = SPLIT_FROM
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


def bytes_per_device(tree: Any) -> int:
    """Bytes that a tree of arrays, or of ShapeDtypeStructs with shardings, takes on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def where_to_load(abstract: Any) -> Any:
    """Shardings for parameters to read: over the mesh in use; without one, whole on this process's first device."""
    if not (mesh := jax.sharding.get_mesh()).empty:
        return tree_shardings(abstract, mesh)
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: sharding, abstract)


def path_name(path: tuple) -> str:
    """`a.b.0.kernel` from a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def to_host(tree: Any) -> Any:
    """Every leaf whole as a numpy array on every process; all processes must call it.

    What a process holds for itself, such as a numpy array, comes back as it is there.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def own_mesh() -> Mesh:
    """One device of this process."""
    return make_mesh(1, devices=jax.local_devices()[:1])


def on_this_process() -> Any:
    """A context for what one process computes alone, such as a preview: it has a mesh of its own."""
    return jax.set_mesh(own_mesh())


def gather(tree: Any, mesh: Mesh) -> Any:
    """Constrain every leaf to be whole on every device: FSDP parameters are gathered once, at use."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, replicated(mesh)), tree)


# Clips over devices -----------------------------------------------------------------------------------------------


def split_clips(apply: Callable[..., Array], *, frames_alone: bool = False) -> Callable[..., Array]:
    """`apply(params, x [b f ...], *others)` with frames over `context` and rows over the batch axes of the mesh in use.

    apply: a network whose layers ask `models.frame_axis` for what other frames hold. Its further arguments are arrays
    `[b f ...]` or a `Conditioning`; its result is `[b f ...]`. The mesh is that of `jax.set_mesh`; where its `context`
    is 1, or there is none, `apply` is called as it is. Rows that do not divide over the batch axes, or see each other
    (`style_weight`), are computed on each of their devices.

    The region is manual, so that nothing is moved but what the layers ask for; parameters come in whole, and their
    gradients leave summed over all axes.

    frames_alone: `apply` looks at every frame by itself; then a clip of any length is filled up.
    Raises ValueError for frames that are not a multiple of `context`. A single frame is not split.
    """

    def call(params: Params, x: Array, *others: Any, **options: Any) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        count = mesh.shape.get("context", 1)
        if count == 1 or "context" in mesh.manual_axes or x.shape[1] == 1:
            return apply(params, x, *others, **options)
        num_frames = x.shape[1]
        if num_frames % count and frames_alone and not others:
            x = jnp.pad(x, ((0, 0), (0, -num_frames % count), *((0, 0),) * (x.ndim - 2)))
        elif num_frames % count:
            raise ValueError(
                f"{num_frames} frames are not a multiple of the {count} devices along the mesh axis context: "
                "change parallel.context or the number of frames"
            )
        rows_meet = any(isinstance(other, Conditioning) and other.style_weight is not None for other in others)
        whole = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) or rows_meet
        rows = None if whole else BATCH_AXES
        specs = tuple(_specs(other, rows) for other in others)
        clip = PartitionSpec(rows, "context")
        return jax.shard_map(
            lambda params, x, *others: apply(params, x, *others, **options),
            in_specs=(PartitionSpec(), clip, *specs),
            out_specs=clip,
            check_vma=False,
        )(params, x, *others)[:, :num_frames]

    return call


def _specs(value: Any, rows: tuple[str, ...] | None) -> Any:
    """How an argument of a network is split: arrays `[b f ...]` by rows and frames; what all frames need, by rows."""
    clip = PartitionSpec(rows, "context")
    if not isinstance(value, Conditioning):
        return clip
    given = {f.name: PartitionSpec(rows) for f in dataclasses.fields(value) if getattr(value, f.name) is not None}
    given |= {"image_latents": clip} if "image_latents" in given else {}
    return dataclasses.replace(value, **given)
