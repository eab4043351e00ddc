"""The optimizer: ends of the schedule, what is decayed, the clip."""

import jax.numpy as jnp
import numpy as np
import optax

from vdiff_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


def test_schedule_starts_at_zero_peaks_after_warmup_and_ends_at_the_floor():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    schedule = learning_rate_schedule(config, 110)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0.0, 1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(schedule(60), (2.0 + 0.2) / 2, rtol=1e-5)  # half-way down the cosine
    np.testing.assert_allclose([schedule(110), schedule(10**6)], 0.2, rtol=1e-5)


def test_a_run_shorter_than_the_warmup_still_has_a_schedule():
    for num_steps in (1, 2, 5):
        schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=200), num_steps)
        rates = np.array([schedule(step) for step in range(num_steps + 1)])
        assert np.isfinite(rates).all() and rates.max() > 0.03 and rates.max() <= 2.0


def params():
    return {
        "conv": {"kernel": jnp.full((3, 3, 2, 2), 2.0), "bias": jnp.full((2,), 2.0)},
        "norm": {"scale": jnp.full((2,), 2.0)},
        "text": {"token_embedding": jnp.full((5, 2), 2.0), "to_q": {"kernel": jnp.full((2, 2), 2.0)}},
    }


def test_decay_acts_on_kernels_only():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = {name: {k: jnp.zeros_like(v) for k, v in part.items()} for name, part in params().items() if name != "text"}
    zeros["text"] = {"token_embedding": jnp.zeros((5, 2)), "to_q": {"kernel": jnp.zeros((2, 2))}}
    updates, _ = optimizer.update(zeros, optimizer.init(params()), params())
    new = optax.apply_updates(params(), updates)
    shrunk = 2.0 * (1 - 0.1 * 0.5)
    np.testing.assert_allclose(new["conv"]["kernel"], shrunk, rtol=1e-6)
    np.testing.assert_allclose(new["text"]["to_q"]["kernel"], shrunk, rtol=1e-6)
    for kept in (new["conv"]["bias"], new["norm"]["scale"], new["text"]["token_embedding"]):
        np.testing.assert_array_equal(kept, 2.0)


def test_clip_bounds_the_global_norm():
    config = OptimizerConfig(clip_norm=0.5, beta1=0.9)
    optimizer = make_optimizer(config, 10)
    value = {"a": jnp.full((4,), 30.0), "b": jnp.full((9,), 40.0)}
    _, state = optimizer.update(value, optimizer.init(value), value)
    momentum = next(part.mu for part in state[1] if hasattr(part, "mu"))  # (1 - beta1) * clipped gradient
    np.testing.assert_allclose(optax.tree.norm(momentum), 0.1 * 0.5, rtol=1e-5)


def test_first_adam_step_has_the_size_of_the_learning_rate():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    start = {"b": jnp.zeros(3)}
    updates, _ = optimizer.update({"b": jnp.array([1e-3, -2e-2, 0.3])}, optimizer.init(start), start)
    np.testing.assert_allclose(updates["b"], [-0.1, 0.1, -0.1], rtol=1e-3)
