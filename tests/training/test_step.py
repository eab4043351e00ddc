"""The training step against hand-computed updates: refusal of non-finite ones, EMA, accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdiff_jax.training.step import TrainState, init_sharded_state, make_train_step, sample_keys

RATE = 0.1
RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(8, 3)).astype(np.float32), "y": RNG.normal(size=8).astype(np.float32)}


def mesh():
    return jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])


def init(key):
    return {"w": jnp.arange(3, dtype=jnp.float32), "b": jnp.ones(())}


def loss_fn(params, batch, keys):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(jnp.square(error)), {"error": jnp.mean(error)}


def make(optimizer=None, loss=loss_fn, **settings):
    optimizer = optimizer or optax.adam(RATE)
    state, shardings = init_sharded_state(init, optimizer, jax.random.key(0), mesh())
    return state, make_train_step(loss, optimizer, mesh(), shardings, **settings)


def host(state: TrainState) -> TrainState:
    """A copy that outlives donation."""
    return jax.tree.map(np.array, state)


def run(state, step, batches):
    states, metrics = [host(state)], []
    for batch in batches:
        state, measured = step(state, batch, jax.random.key(1))
        states.append(host(state))
        metrics.append({name: np.array(value) for name, value in measured.items()})
    return states, metrics


def test_a_step_is_gradient_descent():
    (before, after), (metrics,) = run(*make(optax.sgd(RATE)), [BATCH])
    error = BATCH["x"] @ before.params["w"] + before.params["b"] - BATCH["y"]
    gradient = 2 * error @ BATCH["x"] / 8
    np.testing.assert_allclose(after.params["w"], before.params["w"] - RATE * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], np.mean(error), rtol=1e-4)
    expected = np.sqrt(np.sum(gradient**2) + (2 * np.mean(error)) ** 2)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)
    assert after.step == 1 and after.skipped == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_update_leaves_everything_bitwise_and_is_counted(where):
    def loss(params, batch, keys):
        value, metrics = loss_fn(params, batch, keys)
        if where == "gradient":  # finite value, infinite slope
            value = value + jnp.sqrt(jnp.maximum(batch["poison"][0], 0.0) + 0.0 * params["b"])
        else:
            value = value + batch["poison"][0]
        return value, metrics

    good = BATCH | {"poison": np.full(8, 1.0, np.float32)}
    bad = BATCH | {"poison": np.full(8, 0.0 if where == "gradient" else np.nan, np.float32)}
    states, metrics = run(*make(loss=loss), [good, bad, bad, good])
    for state in states[2:4]:
        for name in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(states[1], name))
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 2, 2]
    assert [int(m["skipped_in_row"]) for m in metrics] == [0, 1, 2, 0]
    assert np.any(states[4].params["w"] != states[3].params["w"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[4]))


def test_ema_follows_its_formula():
    states, _ = run(*make(ema_decay=0.27), [BATCH] * 4)
    ema = states[0].params["w"]
    for step, state in enumerate(states[1:]):
        decay = min(0.27, (1 + step) / (10 + step))  # 0.1, 0.18.., 0.25, then the cap
        ema = decay * ema + (1 - decay) * state.params["w"]
        np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(parts):
    whole, metrics = run(*make(), [BATCH] * 2)
    cut, cut_metrics = run(*make(accumulation_steps=parts), [BATCH] * 2)
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            getattr(cut[-1], name),
            getattr(whole[-1], name),
        )
    for name in ("loss", "error", "grad_norm"):
        np.testing.assert_allclose(cut_metrics[-1][name], metrics[-1][name], rtol=1e-4)


def test_a_batch_that_does_not_split_is_refused():
    state, step = make(accumulation_steps=3)
    with pytest.raises(ValueError, match=r"data.batch_size=8 is not a multiple of train.accumulation_steps=3"):
        step(state, BATCH, jax.random.key(0))


def test_randomness_is_owned_by_the_step():
    """Equal keys give equal steps; each step and each sample draws anew, whatever the batch size."""

    def loss(params, batch, keys):
        return 0.0 * params["b"], {"noise": jax.vmap(jax.random.normal)(keys)}

    (first, again) = (run(*make(loss=loss), [BATCH] * 2)[1] for _ in range(2))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a["noise"], b["noise"])
    noise = np.concatenate([metrics["noise"] for metrics in first])
    assert len(np.unique(noise)) == 16
    few, many = (jax.random.key_data(sample_keys(jax.random.key(3), size)) for size in (2, 5))
    np.testing.assert_array_equal(many[:2], few)


def test_accumulated_parts_have_the_keys_of_the_whole_batch():
    def loss(params, batch, keys):
        return 0.0 * params["b"], {"noise": jnp.mean(jax.vmap(jax.random.normal)(keys))}

    whole, cut = (run(*make(loss=loss, accumulation_steps=parts), [BATCH])[1][0]["noise"] for parts in (1, 2))
    np.testing.assert_allclose(cut, whole, rtol=1e-5)


def test_state_holds_nothing_but_arrays():
    state, _ = make()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert {field.name for field in dataclasses.fields(state)} == {
        "step", "params", "opt_state", "ema", "skipped", "skipped_in_row", "history",
    }  # fmt: skip
