"""The memory of a step is told before it runs, and one that does not fit is refused with its remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdiff_jax import parallel
from vdiff_jax.training.preflight import MemoryReport, check_memory, device_memory, host_memory, step_memory
from vdiff_jax.training.step import init_sharded_state, make_train_step

WIDTH = 256


def loss_fn(params, batch, keys):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean(jnp.square(hidden)), {}


def report(name, batch_size=64, available=None):
    shape = tuple(int(size) for size in name.split("x"))
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    optimizer = optax.adam(1e-3)
    with jax.set_mesh(mesh):
        state, shardings = init_sharded_state(
            lambda key: {"w": jnp.ones((WIDTH, WIDTH))}, optimizer, jax.random.key(0), mesh
        )
        step = make_train_step(loss_fn, optimizer, mesh, shardings)
        batch = parallel.shard_batch({"x": np.ones((batch_size, WIDTH), np.float32)}, mesh)
        return step_memory(step, state, batch, jax.random.key(1), available)


def test_a_device_needs_its_share_of_state_and_batch():
    weights = 4 * WIDTH * WIDTH
    one, eight = report("1x1x1"), report("1x8x1")
    assert 4 * weights <= one.state <= 4 * weights + 4096  # parameters, two moments, average; small counters
    assert 4 * weights / 8 <= eight.state <= 4 * weights / 8 + 4096
    assert 0 <= one.inputs - 64 * WIDTH * 4 <= 64 and 0 <= eight.inputs - 64 * WIDTH * 4 / 8 <= 64  # beside it, the key
    assert one.temporaries >= 64 * WIDTH * 4  # the hidden layer is kept for the gradient


def test_more_clips_need_more_memory_while_the_state_stays():
    few, many = report("1x1x1", 64), report("1x1x1", 4096)
    assert many.state == few.state and many.inputs > 50 * few.inputs
    assert many.temporaries - few.temporaries >= (4096 - 64) * WIDTH * 4


@pytest.mark.parametrize(("batch_size", "remedy"), [(8, "raise parallel.fsdp"), (8192, "train.accumulation_steps=2")])
def test_a_step_that_does_not_fit_is_refused_with_what_helps(batch_size, remedy):
    told = report("1x1x1", batch_size, available=10**6)
    with pytest.raises(ValueError, match=r"does not fit: each device needs .* GB of 0.00: .* for the state") as error:
        check_memory(told)
    assert remedy in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not fit"):
        check_memory(MemoryReport(1, 1, 1, 2))  # state, what is read, and temporaries together
    check_memory(MemoryReport(1, 1, 1, None))
    check_memory(MemoryReport(1, 1, 1, 3))


def test_a_cpu_device_has_a_share_of_the_machine():
    assert 1e8 < device_memory() <= host_memory() / 8
