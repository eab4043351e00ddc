"""Checkpoints: bitwise round trips onto any mesh, refusals that name the leaf, what is kept, storage that refuses."""

import resource
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from vdiff_jax.parallel import AXES
from vdiff_jax.training.checkpoint import Checkpoints, SaveFailed
from vdiff_jax.training.manifest import DamagedCheckpoint, Manifest
from vdiff_jax.training.step import create_state, init_sharded_state

OPTIMIZER = optax.adam(0.1)
MESHES = {"1": (1, 1), "8x1": (8, 1), "4x2": (4, 2)}


def mesh(name):
    data, fsdp = MESHES[name]
    return jax.make_mesh((data, fsdp, 1)[: len(AXES)], AXES, devices=jax.devices()[: data * fsdp])


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


def saved(workdir, *steps, **settings):
    """The state of the last of `steps`, all of which are saved."""
    checkpoints = Checkpoints(workdir, **settings)
    for step in steps:
        state, _ = fresh("1", step)
        checkpoints.save(state, {"at": step})
    checkpoints.wait()
    checkpoints.close()
    return state


def restored(workdir, **settings):
    """(state, meta, warnings)."""
    state, shardings = fresh("1")
    checkpoints = Checkpoints(workdir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings, **settings)
        finally:
            checkpoints.close()
    return state, meta, [str(warning.message) for warning in caught]


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def break_file(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_manifest_tells_what_was_saved(tmp_path):
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "3"
    manifest = Manifest.read(folder)
    assert manifest.step == 3 and manifest.processes == 1 and dict(zip(AXES, (1, 1, 1))) == manifest.mesh
    kernel = manifest.arrays["params.layers.0.kernel"]
    assert kernel["shape"] == [130, 128] and kernel["dtype"] == "float32" and kernel["digest"] != "0" * 16
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json"} and manifest.first_damage(folder) is None
    assert manifest.code.startswith("0.1.0")


def test_multiples_are_kept_beyond_the_newest(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep=1, keep_every=3)
    assert names(tmp_path) == ["3", "6", "7"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    saved(tmp_path, 1)
    for name in ("2.orbax-checkpoint-tmp", "0.removing", "9.damaged"):
        shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / name)
    before = names(tmp_path)
    Checkpoints(tmp_path).close()  # as a look before training does, while another run saves
    assert names(tmp_path) == before
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.begin()
    assert names(tmp_path) == ["1", "9.damaged"]


def test_a_save_that_was_killed_before_its_manifest_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def killed(*_):
        raise KeyboardInterrupt  # not an error of storage: nothing is tidied up

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", killed)
        patch.setattr(threading, "excepthook", lambda *_: None)
        Checkpoints(tmp_path).save(fresh("1", 2)[0], {})
        for thread in threading.enumerate():
            if thread.name == "checkpoint of step 2":
                thread.join()
    assert names(tmp_path) == ["1", "2", "2.saving"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.begin()
        assert checkpoints.latest_step == 1
    assert names(tmp_path) == ["1"]


def test_a_damaged_checkpoint_is_passed_over_and_does_not_block_its_step(tmp_path):
    state = saved(tmp_path, 1, 2, 3)
    for _ in range(2):
        break_file(max((tmp_path / "checkpoints" / "3").rglob("d/*"), key=lambda path: path.stat().st_size))
        state, meta, said = restored(tmp_path)
        assert int(state.step) == 2 and meta == {"at": 2}
        assert len(said) == 1 and "/3/state/ocdbt.process_0/d/" in said[0] and "Falling back to step 2" in said[0]
        saved(tmp_path, 3)
    assert names(tmp_path) == ["1", "2", "3", "3.damaged", "3.damaged-2"]
    assert int(restored(tmp_path)[0].step) == 3


def test_a_step_without_a_manifest_was_never_finished(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    state, _, said = restored(tmp_path)
    assert int(state.step) == 1 and "2/manifest.json is missing: the save was cut off" in said[0]


def test_without_a_good_checkpoint_every_reason_is_given_each_time(tmp_path):
    saved(tmp_path, 1, 2)
    break_file(tmp_path / "checkpoints" / "1" / "meta" / "metadata")
    break_file(tmp_path / "checkpoints" / "2" / "manifest.json")
    for _ in range(2):  # never a silent start from nothing
        with pytest.raises(DamagedCheckpoint, match=r"2/manifest\.json is damaged.*1/meta/metadata is damaged"):
            restored(tmp_path)
    assert names(tmp_path) == ["1", "2"]


def test_damage_between_the_device_and_the_files_is_noticed(tmp_path):
    """Files as they were digested, but not the arrays that the run had: here the state of another step."""
    saved(tmp_path, 1, 2, 3)
    folders = [tmp_path / "checkpoints" / name for name in ("2", "3")]
    two, three = (Manifest.read(folder) for folder in folders)
    shutil.rmtree(folders[1])
    shutil.copytree(folders[0], folders[1])
    two.arrays.update(three.arrays)
    two.write(folders[1])
    state, _, said = restored(tmp_path)
    assert int(state.step) == 2 and "checkpoints/3: the array step and" in said[0]


def test_another_type_is_refused_naming_the_leaf(tmp_path):
    saved(tmp_path, 1)
    state, shardings = fresh("1")
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16), jax.eval_shape(lambda: state))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"ema\.layers\.0\.bias: checkpoint float32, this config float16"):
        checkpoints.restore(half, shardings)
    checkpoints.close()


@pytest.mark.parametrize("target", ["1", "4x2"])
def test_a_part_is_restored_on_request_only(target, tmp_path):
    old = saved(tmp_path, 5)

    def wider(key):
        params = init(key)
        params["layers"][0]["bias"] = jnp.full(4, 7.0)  # of another shape
        return {"layers": params["layers"], "head": jnp.full(2, 9.0)}  # new

    state, shardings = init_sharded_state(wider, OPTIMIZER, jax.random.key(8), mesh(target))
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="is restored in part: ") as caught:
        found, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings, fresh=state)
    checkpoints.close()
    said = str(caught[0].message)
    assert "params.head: checkpoint has none, this config (2,)" in said
    assert "params.layers.0.bias: checkpoint (3,), this config (4,)" in said and "kernel" not in said
    assert int(found.step) == 5 and meta == {"at": 5}
    np.testing.assert_array_equal(found.ema["layers"][0]["kernel"], old.ema["layers"][0]["kernel"])
    np.testing.assert_array_equal(found.params["layers"][0]["bias"], np.full(4, 7.0))
    np.testing.assert_array_equal(found.params["head"], np.full(2, 9.0))
    assert all(a.sharding == b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(shardings)))


def test_a_save_that_fails_is_told_once_and_tried_again(tmp_path, caplog):
    saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    state, _ = fresh("1", 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))  # no file beyond 16 KB: as a disk that is full
    try:
        with pytest.warns(
            UserWarning, match=r"checkpoint of step 2 could not be written .*the newest is step 1\): File too large$"
        ):
            checkpoints.save(state, {})
            checkpoints.save(fresh("1", 1)[0], {})  # known at the next call
        assert checkpoints.failure and checkpoints.latest_step == 1 and names(tmp_path) == ["1"]
        with pytest.raises(SaveFailed, match="step 2"):
            checkpoints.wait()
        assert not caplog.records  # the storage library says of each array that it could not be written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.save(state, {})
    checkpoints.wait()
    checkpoints.close()
    assert names(tmp_path) == ["1", "2"] and int(restored(tmp_path)[0].step) == 2


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.keep_checkpoints=0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)
