"""Meshes and shardings, and that neither changes what is learned or sampled; what they make devices send."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_model import TEXT, random_params

import vdiff_jax as vd
from vdiff_jax import parallel
from vdiff_jax.collectives import collectives, histogram
from vdiff_jax.components import make_component
from vdiff_jax.diffusion.patterns import Mixture
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.training.diffusion_objective import make_diffusion_loss, predictor
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import abstract_state, init_sharded_state, make_train_step

KEY = jax.random.key(0)
# One level: half the compile time of two.
UNET = dict(latent_channels=2, channels=(32,), attention=(True,), embedding_features=16, head_dim=8)
BATCH, FRAMES, SIDE = 8, 4, 4


def mesh_of(name):
    """data x fsdp x context."""
    shape = [int(size) for size in name.split("x")]
    return parallel.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


# Meshes and rules --------------------------------------------------------------------------------------------------


def test_make_mesh_fills_one_axis():
    assert dict(parallel.make_mesh().shape) == {"data": 8, "fsdp": 1, "context": 1}
    assert dict(parallel.make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2, "context": 1}
    assert dict(parallel.make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "context": 2}
    assert dict(parallel.make_mesh(1, 1, -1).shape) == {"data": 1, "fsdp": 1, "context": 8}
    text = parallel.describe(parallel.make_mesh(2, 1, 4))
    assert text == "data=2 x fsdp=1 x context=4 on 8 cpu device(s), 1 process(es)"


@pytest.mark.parametrize("shape", [(3, 1), (-1, 3), (4, 4), (16, -1), (2, 2, 3)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not match 8 devices: change parallel\.data, \.fsdp or \.context"):
        parallel.make_mesh(*shape)


def test_two_open_axes_and_uneven_batches_and_clips_are_refused():
    with pytest.raises(ValueError, match=r"parallel\.data and parallel\.context are both -1"):
        parallel.make_mesh(-1, 1, -1)
    mesh = parallel.make_mesh(2, 2, 2)
    parallel.check_batch_size(12, mesh)
    with pytest.raises(ValueError, match=r"data.batch_size=10 is not a multiple of 4 devices"):
        parallel.check_batch_size(10, mesh)
    with pytest.raises(ValueError, match=r"12 is not a multiple of 4 devices .* times train.accumulation_steps=2"):
        parallel.check_batch_size(12, mesh, accumulation_steps=2)
    parallel.check_num_frames(1, mesh)  # an image is not split
    with pytest.raises(ValueError, match=r"7 frames are not a multiple of parallel.context=2"):
        parallel.check_num_frames(7, mesh)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the arrangement of devices looks at."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "some"


def test_only_the_data_axis_crosses_slices():
    devices = [Device(i, i // 4, i // 8) for i in range(16)]
    mesh = parallel.arranged(devices, (4, 2, 2))
    assert mesh.shape == (4, 2, 2)
    for data in range(4):
        assert {device.slice_index for device in mesh[data].flat} == {data // 2}
    with pytest.raises(ValueError, match=r"parallel.data=1 is no multiple of the 2 slices"):
        parallel.arranged(devices, (1, 4, 4))


@pytest.mark.parametrize(
    ("shape", "shares"),
    [((8, 1, 1), [(0, 2), (1, 2)]), ((2, 2, 2), [(0, 2), (1, 2)]), ((1, 1, 8), [(0, 1), (0, 1)])],
)
def test_processes_bring_the_rows_that_their_devices_hold(shape, shares, monkeypatch):
    mesh = mock.Mock(devices=np.array([Device(i, i // 4, 0) for i in range(8)]).reshape(shape))
    mesh.shape = dict(zip(parallel.AXES, shape))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert parallel.batch_share(mesh) == share


def test_batches_are_split_over_rows_and_clips_over_frames():
    batch = {"times": np.arange(64.0, dtype=np.float32).reshape(16, 4), "video": np.zeros((16, 4, 2, 2, 3), np.float32)}
    sharded = parallel.shard_batch(batch, mesh_of("2x2x2"))
    assert {shard.data.shape for shard in sharded["times"].addressable_shards} == {(4, 4)}
    assert {shard.data.shape for shard in sharded["video"].addressable_shards} == {(4, 2, 2, 2, 3)}
    np.testing.assert_array_equal(sharded["times"], batch["times"])


def test_large_leaves_are_split_along_their_largest_divisible_axis():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    tree = {"conv": {"kernel": leaf(3, 3, 64, 32)}, "odd": leaf(20001), "dense": [leaf(129, 256)], "bias": leaf(64)}
    specs = jax.tree.map(lambda s: s.spec, parallel.tree_shardings(tree, mesh_of("4x2x1")))
    assert specs == {
        "conv": {"kernel": PartitionSpec(None, None, "fsdp")},
        "odd": PartitionSpec(),
        "dense": [PartitionSpec(None, "fsdp")],
        "bias": PartitionSpec(),
    }
    rules = ((r"dense\.0$", PartitionSpec("data")),)
    ruled = parallel.tree_shardings(tree, mesh_of("4x2x1"), rules)
    assert ruled["dense"][0].spec == PartitionSpec("data") and ruled["conv"]["kernel"].spec[2] == "fsdp"
    whole = parallel.tree_shardings(tree, mesh_of("8x1x1"))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole))


def test_fsdp_splits_the_state_of_a_real_network_almost_evenly():
    unet = make_component("unet", dataclasses.asdict(UNetConfig.native("10M")))
    for name in ("1x8x1", "2x2x2"):
        mesh = mesh_of(name)
        state = abstract_state(unet.init, make_optimizer(OptimizerConfig(), 9), mesh)
        taken = parallel.bytes_per_device(state)
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        assert taken <= 1.15 * 16 * parameters / mesh.shape["fsdp"]  # fp32: parameters, two moments, EMA


# What is computed does not depend on the mesh ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Three steps on a mesh: losses, first and last parameters, how many leaves are split, what the step sends."""

    losses: np.ndarray
    start: dict
    params: dict
    split: int
    sent: list


@functools.cache
def three_steps(name):
    """A real network and objective; 8 clips of 4 frames."""
    text = make_component("text_encoder", dict(TEXT, vocab_size=20))
    unet = make_component("unet", dict(UNET, text_features=TEXT["features"]))
    start = {"text_encoder": random_params(text, 1), "unet": random_params(unet, 2, 0.1)}
    mesh, rng = mesh_of(name), np.random.default_rng(0)
    loss_fn = make_diffusion_loss(
        predictor(unet.apply),
        lambda params, *args: text.apply(params["text_encoder"], *args),
        null_prompt=(jnp.array([1, 2, 0, 0]), jnp.array([True, True, False, False])),
        schedule=make_schedule("cosine"),
        mixture=Mixture(),
        kind="v",
        weighting="sigmoid",
        weighting_settings={},
    )
    batch = {
        "latents": rng.normal(size=(BATCH, FRAMES, SIDE, SIDE, 2)).astype(np.float32),
        "times": np.tile(np.arange(FRAMES, dtype=np.float32), (BATCH, 1)),
        "tokens": rng.integers(3, 20, size=(BATCH, 4)).astype(np.int32),
        "token_mask": np.ones((BATCH, 4), bool),
        "anchor": np.zeros(BATCH, bool),
    }
    # Adam divides a gradient by its size. Where the true gradient is zero (a key's bias, say) that makes a step of
    # rounding errors alone, so the denominator gets a floor above them.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-3), 3)
    with jax.set_mesh(mesh):
        state, shardings = init_sharded_state(lambda key: jax.tree.map(jnp.asarray, start), optimizer, KEY, mesh)
        batch, key = parallel.shard_batch(batch, mesh), jax.random.key(1)
        step = make_train_step(loss_fn, optimizer, mesh, shardings).lower(state, batch, key).compile()
        split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch, key)
            losses.append(float(metrics["loss"]))
    return Run(np.array(losses), start, jax.tree.map(np.asarray, state.params), split, collectives(step.as_text()))


@pytest.mark.parametrize("name", ["8x1x1", "2x2x2"])
def test_training_is_the_same_on_every_mesh(name):
    one, other = three_steps("1x1x1"), three_steps(name)
    assert other.split >= 4 if "2x2" in name else other.split == 0  # a kernel, its two moments and its EMA
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params)):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(one.start))]
    assert np.median(moved) > 1e-4


def weight_bytes(run):
    return sum(4 * leaf.size for leaf in jax.tree.leaves(run.params))


def test_one_device_sends_nothing_and_data_parallel_the_gradient_once():
    assert not three_steps("1x1x1").sent
    sent = histogram(three_steps("8x1x1").sent)
    assert set(sent) == {"all-reduce"} and sent["all-reduce"][0] <= 4
    assert sent["all-reduce"][1] <= 1.02 * weight_bytes(three_steps("8x1x1"))


def test_a_mixed_mesh_gathers_split_weights_once_and_no_activations():
    run = three_steps("2x2x2")
    shapes = {leaf.shape for leaf in jax.tree.leaves(run.params)}
    gathered = [shape for c in run.sent if c.kind == "all-gather" for _, shape in c.shapes]
    assert all(shape in shapes or math.prod(shape) <= BATCH * FRAMES for shape in gathered)  # else levels, for the log
    split = [leaf for leaf in jax.tree.leaves(run.params) if leaf.size >= parallel.SPLIT_FROM]
    assert sum(4 * math.prod(shape) for shape in gathered if shape in shapes) <= 1.02 * sum(4 * s.size for s in split)
    assert histogram(run.sent)["all-reduce"][1] <= 1.02 * weight_bytes(run)


def test_splitting_frames_exchanges_no_more_than_it_must():
    """By an own count: both ways for each attention over frames, two frames for each convolution, and their gradients.

    Also there and back, without gradient, for finding the nearest known tokens: z, level, mask; z, level, nearness.
    """
    run, mesh = three_steps("2x2x2"), mesh_of("2x2x2").shape
    frame = 4 * SIDE * SIDE * UNET["channels"][0] * BATCH // (mesh["data"] * mesh["fsdp"])
    paths = [parallel.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.params["unet"])]
    attentions = sum(path.endswith("temporal.proj_in.kernel") for path in paths)
    convolutions = sum(path.endswith("temporal_conv.conv.kernel") for path in paths)
    assert attentions >= 4 and convolutions >= 4
    local_frames = FRAMES // mesh["context"]
    sent = histogram(run.sent)
    assert sent["all-to-all"][1] <= 1.2 * 4 * attentions * local_frames * frame
    assert sent["collective-permute"][1] <= 1.2 * 4 * convolutions * frame


def test_the_collectives_of_a_step_are_those_on_record():
    """Golden: what changes here changes what a pod sends. See `tests/golden/make_collectives.py`."""
    record = json.loads((Path(__file__).parent / "golden" / "collectives.json").read_text())
    for name, expected in record["meshes"].items():
        sent = {kind: list(numbers) for kind, numbers in histogram(three_steps(name).sent).items()}
        if jax.__version__ == record["jax"]:
            assert sent == expected, name
        assert sent.keys() == expected.keys()
        for kind, (_, size) in expected.items():
            assert sent[kind][1] <= 1.1 * size + 1024, (name, kind)


# Sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_a_sharded_batch_gives_the_same_clips(model):
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    prompts = ["a red circle moving right", "a blue square"] * 4
    plain = model.generate_latents(prompts, keys=keys)
    split = model.generate_latents(prompts, keys=jax.device_put(keys, parallel.batch_sharding(mesh_of("8x1x1"))))
    assert len({shard.device for shard in split.addressable_shards if shard.data.shape[0] == 1}) == 8
    np.testing.assert_allclose(split, plain, atol=1e-4 * np.abs(plain).max())


def test_a_model_loaded_on_a_mesh_splits_its_weights_and_the_clips_of_a_call(model, model_folder):
    prompts = ["a red circle moving right"] * 4
    plain = model.generate(prompts, seed=5)
    with jax.set_mesh(mesh_of("2x2x1")):
        spread = vd.load(model_folder)
        kernel = spread.params["unet"]["mid"]["spatial"]["layer"]["feedforward"]["proj_in"]["kernel"]
        clips = spread.generate(prompts, seed=5)
        latents = spread.generate_latents(prompts, keys=jax.vmap(jax.random.key)(jnp.arange(4)))
    assert kernel.sharding.mesh.size == 4
    assert {shard.data.shape[0] for shard in latents.addressable_shards} == {1}
    for a, b in zip(plain, clips):
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1


def test_devices_that_sample_different_clips_send_nothing(model):
    sent = []

    def watched(*args):
        sent.extend(collectives(run.lower(*args).compile().as_text()))
        return run(*args)

    fresh, run = dataclasses.replace(model), model._run
    fresh.__dict__["_run"] = watched
    keys = jax.device_put(jax.vmap(jax.random.key)(jnp.arange(8)), parallel.batch_sharding(mesh_of("8x1x1")))
    latents = fresh.generate_latents(["a red circle moving right", "a blue square"] * 4, keys=keys)
    assert len({shard.device for shard in latents.addressable_shards if shard.data.shape[0] == 1}) == 8
    assert not sent


def test_a_clip_split_over_devices_is_the_same_video(model):
    prompt, options = "a red circle moving right", dict(num_frames=8, seed=3)
    plain = model.generate(prompt, **options)
    with jax.set_mesh(mesh_of("1x1x8")):
        split = model.generate(prompt, **options)
        latents = model.encode(plain)
        with pytest.raises(ValueError, match="6 frames are not a multiple of the 8 devices"):
            model.generate(prompt, num_frames=6)
        assert model.generate(prompt, num_frames=1).frames.shape[0] == 1
    assert np.abs(split.frames.astype(int) - plain.frames).max() <= 1
    np.testing.assert_allclose(latents, model.encode(plain), atol=1e-4)


def test_a_split_clip_is_decoded_where_its_frames_are(model):
    """Each device decodes its own frames: nothing is sent, whatever the number of frames."""
    latents = jax.random.normal(KEY, (1, 6, 8, 8, 2))
    plain = model.decode(latents)
    with jax.set_mesh(mesh_of("1x1x4")):
        np.testing.assert_allclose(model.decode(latents).astype(int), plain, atol=1)
        program = jax.jit(model._decode_traced).lower(model.params["autoencoder"], latents[:, :4]).compile()
    assert not [c for c in collectives(program.as_text()) if c.kind != "all-gather"]
