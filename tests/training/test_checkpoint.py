"""Checkpoints: bitwise round trips, onto any mesh, and refusals that name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.step import create_state, init_sharded_state

OPTIMIZER = optax.adam(0.1)
MESHES = {"1": (1, 1), "8x1": (8, 1), "4x2": (4, 2)}


def mesh(name):
    data, fsdp = MESHES[name]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), devices=jax.devices()[: data * fsdp])


def init(key, width=128):
    kernel = jax.random.normal(key, (130, width))  # big enough to be split by FSDP
    return {"layers": {0: {"kernel": kernel, "bias": jnp.ones(3)}}}


def fresh(name, step=0):
    state, shardings = init_sharded_state(init, OPTIMIZER, jax.random.key(7), mesh(name))
    moved = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), state)
    return jax.device_put(moved, shardings), shardings


@pytest.mark.parametrize("source", MESHES)
def test_a_checkpoint_is_restored_bitwise_onto_every_mesh(source, tmp_path):
    state, _ = fresh(source, step=3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"recipe": "{}", "data_seed": 5})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)  # as a new process does
    for target in MESHES:
        _, shardings = fresh(target)
        restored, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert meta == {"recipe": "{}", "data_seed": 5}
        assert all(a.sharding == b for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings)))
    specs = {PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")}
    assert shardings.params["layers"][0]["kernel"].spec in specs  # the last target really splits
    checkpoints.close()


def test_newest_ones_are_kept_and_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step is None
    for step in (1, 2, 3, 3):
        checkpoints.save(fresh("1", step)[0], {"at": step})
    checkpoints.wait()
    assert checkpoints.latest_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    state, shardings = fresh("1")
    older, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings, step=2)
    assert int(older.step) == 2 and meta == {"at": 2}
    checkpoints.close()


def test_another_config_is_refused_naming_the_leaves(tmp_path):
    state, shardings = fresh("1", 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    for change, message in {
        "shape": r"ema\.layers\.0\.kernel: checkpoint \(130, 128\), this config \(130, 64\)",
        "missing": r"params\.layers\.0\.extra: checkpoint has none, this config \(2,\)",
    }.items():

        def other(key, change=change):
            params = init(key, 64 if change == "shape" else 128)
            if change == "missing":
                params["layers"][0]["extra"] = jnp.ones(2)
            return params

        abstract = jax.eval_shape(lambda key, other=other: create_state(other, OPTIMIZER, key), jax.random.key(0))
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.restore(abstract, shardings)
        assert "another workdir" in str(error.value) and "\n" not in str(error.value)
    checkpoints.close()


def test_no_checkpoint_is_said_so(tmp_path):
    state, shardings = fresh("1")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        checkpoints.restore(jax.eval_shape(lambda: state), shardings)
    checkpoints.close()
