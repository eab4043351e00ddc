"""Spikes: told apart from noise, counted, refused; the same again on resume; the way back when there are many."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdiff_jax.parallel import make_mesh
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.loop import LoopConfig, SpikingRun, fit
from vdiff_jax.training.spikes import WINDOW, History, judge
from vdiff_jax.training.step import init_sharded_state, make_train_step
from vdiff_jax.training.writers import MetricWriter

RNG = np.random.default_rng(0)


@jax.jit
def judge_all(history, losses, norms):
    def body(carry, pair):
        history, step = carry
        spike, history = judge(history, step, *pair, sigmas=6.0)
        return (history, step + 1), spike

    (history, _), spikes = jax.lax.scan(body, (history, jnp.int32(0)), (losses, norms))
    return spikes, history


def noise(number, level=1.0):
    return jnp.asarray(level * np.exp(0.2 * RNG.standard_normal(number)), jnp.float32)


def test_ordinary_noise_is_no_spike_and_a_high_loss_or_norm_is():
    losses, norms = np.array(noise(2000)), np.array(noise(2000, level=30.0))
    spikes, history = judge_all(History.empty(), losses, norms)
    assert not np.any(spikes) and history.spikes == 0 and history.count == 2000
    # 1 +- 0.2 and 30 +- 6: eight deviations up are too many, four are not; a fall never is.
    losses[[300, 500, 700]] = 1 + 8 * 0.22, 1 + 4 * 0.2, 0.01
    norms[900] = 30 * (1 + 8 * 0.22)
    spikes, history = judge_all(History.empty(), losses, norms)
    assert list(np.flatnonzero(spikes)) == [300, 900] and history.spikes == 2


def test_nothing_is_judged_before_half_a_window():
    for at, expected in ((WINDOW // 2 - 1, False), (WINDOW // 2, True)):
        losses = np.ones(WINDOW, np.float32)
        losses[at] = 100.0
        spikes, _ = judge_all(History.empty(), losses, np.ones(WINDOW, np.float32))
        assert spikes[at] == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_remembered(bad):
    losses, norms = np.array(noise(100)), np.array(noise(100))
    _, expected = judge_all(History.empty(), losses, norms)
    losses, norms = np.insert(losses, [50, 70], bad), np.insert(norms, [50, 70], 1.0)
    losses, norms = np.insert(losses, 60, 1.0), np.insert(norms, 60, bad)
    losses, norms = np.append(losses, bad), np.append(norms, bad)
    spikes, history = judge_all(History.empty(), losses, norms)
    assert not np.any(spikes)
    for name in ("loss", "grad_norm", "count", "spikes"):
        np.testing.assert_array_equal(getattr(history, name), getattr(expected, name))


def test_one_spike_does_not_hide_the_next_and_a_new_level_is_accepted():
    losses = np.array(noise(400))
    losses[200:220] = 50.0  # a short stretch: all refused at first
    spikes, _ = judge_all(History.empty(), losses, np.ones(400, np.float32))
    assert np.all(spikes[200:210])
    losses[200:] = 3.0 * np.asarray(noise(200))
    spikes, _ = judge_all(History.empty(), losses, np.ones(400, np.float32))
    assert spikes[200] and np.sum(spikes) < 30 and not np.any(spikes[250:])


# In the step and in the loop ---------------------------------------------------------------------------------------


def loss_fn(params, batch, keys):
    return jnp.mean(jnp.square(params["w"] - batch["y"])) + 1.0, {}


def batches_from(bad, read=None):
    """Batches around 1; those at the positions in `bad` are far away."""

    def batches(first):
        for position in range(first, 10**6):
            if read is not None:
                read.append(position)
            rng = np.random.default_rng(position)
            yield {"y": (100.0 if position in bad else 1.0) + 0.1 * rng.standard_normal(2).astype(np.float32)}

    return batches


def start(sigmas=6.0):
    mesh = make_mesh(1, devices=jax.devices()[:1])
    optimizer = optax.adam(1e-2)
    state, shardings = init_sharded_state(lambda key: {"w": jnp.zeros(())}, optimizer, jax.random.key(0), mesh)
    return state, make_train_step(loss_fn, optimizer, mesh, shardings, spike_sigmas=sigmas)


def test_a_spike_leaves_params_optimizer_and_average_bitwise():
    state, step = start()
    _, off = start(sigmas=0.0)
    stream = batches_from({100})(0)
    for _ in range(100):
        state, metrics = step(state, next(stream), jax.random.key(0))
    before = jax.tree.map(np.array, state)
    batch = next(stream)
    moved, _ = off(jax.tree.map(jnp.copy, state), batch, jax.random.key(0))
    assert moved.params["w"] != before.params["w"] and moved.history.spikes == 0
    after, metrics = step(state, batch, jax.random.key(0))
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert after.step == 101 and metrics["spikes"] == metrics["recent_spikes"] == 1
    assert metrics["skipped"] == metrics["skipped_in_row"] == 0 and metrics["loss"] > 9000


def run(folder, bad, read=None, **settings):
    state, step = start()
    checkpoints = Checkpoints(folder, keep=20)
    meta = {}
    if checkpoints.latest_step is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, meta = checkpoints.restore(jax.eval_shape(lambda tree: tree, state), shardings)
    writer = MetricWriter(folder)
    config = LoopConfig(**{"num_steps": 130, "log_steps": 10, "checkpoint_steps": 40, **settings})
    try:
        state, _ = fit(
            state,
            step,
            batches_from(bad, read),
            jax.random.key(0),
            config,
            batch_size=2,
            checkpoints=checkpoints,
            meta={},
            data_offset=meta.get("data_offset", 0),
            writer=writer,
        )
        return jax.tree.map(np.array, state)
    finally:
        checkpoints.close()
        writer.close()


def test_many_spikes_go_back_to_the_newest_checkpoint_and_on_with_later_data(tmp_path, capsys):
    bad, read = {90, 93, 95, 96}, []
    state = run(tmp_path, bad, read, rewind_on_spikes=3)
    assert "3 spikes up to step 96: back to step 80, with the data from position 96 on" in capsys.readouterr().err
    # Position 95 was one spike too many; the step after it had begun.
    assert read[:97] == list(range(97)) and read[97:147] == list(range(96, 146))
    assert state.step == 130 and state.history.spikes == 1 and np.sum(state.history.spiked) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][8:12] == [90, 90, 100, 110]
    # Taken up again after the way back: the same end, bit for bit, and no clip read twice.
    resumed, later = tmp_path / "resumed", []
    run(resumed, bad, rewind_on_spikes=3)
    shutil.rmtree(resumed / "checkpoints" / "130")
    again = run(resumed, bad, later, rewind_on_spikes=3)
    assert later == list(range(120 + 16, 130 + 16))
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_spikes_that_do_not_end_stop_the_run(tmp_path):
    with pytest.raises(SpikingRun, match="3 rewinds to step 80"):
        run(tmp_path, range(90, 10**6), rewind_on_spikes=2)


def test_the_history_is_part_of_the_state():
    state, _ = start()
    assert {field.name for field in dataclasses.fields(state.history)} == {
        "loss", "grad_norm", "count", "spiked", "spikes",
    }  # fmt: skip
