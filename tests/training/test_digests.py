"""Digests of arrays: every bit counts, its place too, and neither mesh nor sharding does."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vdiff_jax.parallel import AXES
from vdiff_jax.training.digests import digest_program, tree_digests

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    np.int32,
    np.int8,
    np.uint16,
    np.complex64,
]


def mesh(data, fsdp):
    sizes = (data, fsdp, 1)[: len(AXES)]
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def digest(array):
    return tree_digests({"a": jnp.asarray(array)})["a"]


def expected(words):
    """The same in numpy, written anew. words: uint32, of any shape."""

    def mix(x, first, second):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(first)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(second)
        return x ^ (x >> np.uint32(16))

    index = np.arange(words.size, dtype=np.uint32).reshape(words.shape)
    first = mix(words ^ mix(index, 0x85EBCA6B, 0xC2B2AE35), 0x9E3779B1, 0x27D4EB2F)
    second = mix(first, 0xCC9E2D51, 0x1B873593)
    return "".join(f"{int(lane.sum(dtype=np.uint32)):08x}" for lane in (first, second))


def test_the_digest_is_the_documented_sum_on_every_mesh():
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    wanted = expected(values.view(np.uint32))
    assert digest(values) == wanted
    for sizes in [(1, 1), (8, 1), (4, 2)]:
        for spec in [(), (None, "fsdp"), ("fsdp",), (("data", "fsdp"),), ("data", "fsdp")]:
            placed = jax.device_put(values, NamedSharding(mesh(*sizes), PartitionSpec(*spec)))
            assert tree_digests({"a": placed}) == {"a": wanted}, (sizes, spec)


def test_a_split_array_is_not_gathered():
    small = mesh(4, 2)
    leaf = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=NamedSharding(small, PartitionSpec("data", "fsdp")))
    text = digest_program(small).lower(leaf).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_single_bit_counts(dtype):
    content = np.random.default_rng(1).integers(0, 256, 6 * np.dtype(dtype).itemsize, dtype=np.uint8)
    found = {digest(content.view(dtype).reshape(2, 3))}
    for bit in range(8 * content.size):
        flipped = content.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        found.add(digest(flipped.view(dtype).reshape(2, 3)))
    assert len(found) == 1 + 8 * content.size


def test_places_truth_values_keys_and_scalars_count():
    assert digest([1.0, 2.0]) != digest([2.0, 1.0])
    assert len({digest(np.array(bits)) for bits in ([True, False], [False, True], [False, False], [True, True])}) == 4
    assert digest(0.0) != digest(-0.0) and digest(np.int32(1)) != digest(np.int32(2))
    assert tree_digests({"a": jax.random.key(1)}) != tree_digests({"a": jax.random.key(2)})
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert digest(nan[:1]) != digest(nan[1:])  # bits, not values
    assert tree_digests({}) == {} and list(tree_digests({"b": {0: jnp.ones(2)}})) == ["b.0"]
