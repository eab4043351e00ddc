"""Meshes and shardings, and that neither changes what is learned or sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_model import TEXT, random_params

from vdiff_jax import parallel
from vdiff_jax.components import make_component
from vdiff_jax.diffusion.patterns import Mixture
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.training.diffusion_objective import make_diffusion_loss, predictor
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import init_sharded_state, make_train_step

# One level: half the compile time of two, and its largest kernel is still big enough to be split by FSDP.
UNET = dict(latent_channels=2, channels=(32,), attention=(True,), embedding_features=16, head_dim=8)
MESHES = {"1": (1, 1), "8x1": (8, 1), "4x2": (4, 2)}


def mesh_of(name):
    data, fsdp = MESHES[name]
    return jax.make_mesh(
        (data, fsdp), parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[: data * fsdp]
    )


# Meshes and rules --------------------------------------------------------------------------------------------------


def test_make_mesh_fills_one_axis():
    assert dict(parallel.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(parallel.make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2}
    assert dict(parallel.make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    assert "data=8 x fsdp=1 on 8 cpu device(s), 1 process(es)" == parallel.describe(parallel.make_mesh())


@pytest.mark.parametrize("shape", [(3, 1), (-1, 3), (4, 4), (16, -1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not match 8 devices: change parallel\.data or \.fsdp"):
        parallel.make_mesh(*shape)


def test_two_open_axes_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="both -1"):
        parallel.make_mesh(-1, -1)
    parallel.check_batch_size(16, parallel.make_mesh())
    with pytest.raises(ValueError, match=r"data.batch_size=12 is not a multiple of 8 devices"):
        parallel.check_batch_size(12, parallel.make_mesh())


def test_batches_are_split_over_every_device():
    batch = {"video": np.arange(32, dtype=np.float32).reshape(16, 2)}
    sharded = parallel.shard_batch(batch, mesh_of("4x2"))["video"]
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharded, batch["video"])


def test_large_leaves_are_split_along_their_largest_divisible_axis():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    tree = {"conv": {"kernel": leaf(3, 3, 64, 32)}, "odd": leaf(20001), "dense": [leaf(129, 256)], "bias": leaf(64)}
    specs = jax.tree.map(lambda s: s.spec, parallel.tree_shardings(tree, mesh_of("4x2")))
    assert specs == {
        "conv": {"kernel": PartitionSpec(None, None, "fsdp")},
        "odd": PartitionSpec(),
        "dense": [PartitionSpec(None, "fsdp")],
        "bias": PartitionSpec(),
    }
    rules = ((r"dense\.0$", PartitionSpec("data")),)
    ruled = parallel.tree_shardings(tree, mesh_of("4x2"), rules)
    assert ruled["dense"][0].spec == PartitionSpec("data") and ruled["conv"]["kernel"].spec[2] == "fsdp"
    whole = parallel.tree_shardings(tree, mesh_of("8x1"))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole))


# What is computed does not depend on the mesh ----------------------------------------------------------------------


def train_three_steps(name):
    """(losses, final params, split leaves) of a real network and objective on a mesh; 8 clips."""
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
        "latents": rng.normal(size=(8, 3, 4, 4, 2)).astype(np.float32),
        "times": np.tile(np.arange(3, dtype=np.float32), (8, 1)),
        "tokens": rng.integers(3, 20, size=(8, 4)).astype(np.int32),
        "token_mask": np.ones((8, 4), bool),
        "anchor": np.zeros(8, bool),
    }
    # Adam divides a gradient by its size. Where the true gradient is zero (a key's bias, say) that makes a step of
    # rounding errors alone, so the denominator gets a floor above them.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-3), 3)
    with jax.set_mesh(mesh):
        state, shardings = init_sharded_state(
            lambda key: jax.tree.map(jnp.asarray, start), optimizer, jax.random.key(0), mesh
        )
        step = make_train_step(loss_fn, optimizer, mesh, shardings)
        losses = []
        for _ in range(3):
            state, metrics = step(state, parallel.shard_batch(batch, mesh), jax.random.key(1))
            losses.append(float(metrics["loss"]))
        split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
        return np.array(losses), jax.tree.map(np.asarray, state.params), len(split), start


@pytest.fixture(scope="module")
def one_device():
    return train_three_steps("1")


@pytest.mark.parametrize("name", ["8x1", "4x2"])
def test_training_is_the_same_on_every_mesh(name, one_device):
    losses, params, _, start = one_device
    other_losses, other_params, split, _ = train_three_steps(name)
    assert split >= 4 if name == "4x2" else split == 0  # a kernel, its two moments and its EMA
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other_params)):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start))]
    assert np.median(moved) > 1e-4


def test_sampling_a_sharded_batch_gives_the_same_clips(model):
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    prompts = ["a red circle moving right", "a blue square"] * 4
    plain = model.generate_latents(prompts, keys=keys)
    split = model.generate_latents(prompts, keys=jax.device_put(keys, parallel.batch_sharding(mesh_of("8x1"))))
    assert len({shard.device for shard in split.addressable_shards if shard.data.shape[0] == 1}) == 8
    np.testing.assert_allclose(split, plain, atol=1e-4 * np.abs(plain).max())
