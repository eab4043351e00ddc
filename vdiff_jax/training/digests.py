"""A digest of every array of a tree, computed on the devices that hold it, whole or in parts.

The digest of an array is a sum modulo 2^32, in two lanes, of a mix of every element's bits with its index in the whole
array. A sum knows no order, so the digest is the same on any mesh and any number of processes, and nothing is gathered.
The mix is a bijection of the bits for each index: one changed element, hence one flipped bit, changes both lanes with
certainty; changes of many elements cancel in both lanes with a chance of about 2^-64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vdiff_jax.parallel import path_name, replicated
from vdiff_jax.types import Array


def tree_digests(tree: Any) -> dict[str, str]:
    """Dotted path -> 16 hexadecimal digits, for every leaf; the same on every process.

    tree: of arrays of any dtype, PRNG keys among them; their buffers are only read. Blocks until the arrays are there.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        return {}
    words = jax.device_get([digest_program(_mesh(leaf))(leaf) for _, leaf in leaves])
    return {path_name(path): f"{high:08x}{low:08x}" for (path, _), (high, low) in zip(leaves, words)}


@functools.cache
def digest_program(mesh: Mesh | None) -> Callable[[Array], Array]:
    """The jitted program: an array on `mesh` (None = on one device) -> u32 [2], replicated.

    One program for each shape and sharding, which parameters, moments and EMA share; one for the whole tree would take
    ten times as long to compile.
    """
    return jax.jit(_digest, out_shardings=replicated(mesh) if mesh is not None else None)


def _mesh(leaf: Array) -> Mesh | None:
    sharding: Any = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _digest(array: Array) -> Array:
    """u32 [2]."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    words = _words(array)
    first = _mix(words ^ _mix(_index(words.shape), 0x85EBCA6B, 0xC2B2AE35), 0x9E3779B1, 0x27D4EB2F)
    second = _mix(first, 0xCC9E2D51, 0x1B873593)
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in (first, second)])


def _words(array: Array) -> Array:
    """The bits as u32, one word an element; elements of 8 bytes get a last axis of two words."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = array.dtype.itemsize * 8
    if bits == 64:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """u32: the row-major index of each element, modulo 2^32. Without a reshape, which would gather a split array."""
    total = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        total += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return total


def _mix(words: Array, first: int, second: int) -> Array:
    """A bijection of u32, as the factors are odd, in which every bit reaches every other (the end of MurmurHash3)."""
    words = (words ^ (words >> 16)) * jnp.uint32(first)
    words = (words ^ (words >> 13)) * jnp.uint32(second)
    return words ^ (words >> 16)
