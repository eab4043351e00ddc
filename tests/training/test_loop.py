"""The loop: clean stops, checkpoints, what the metrics file holds."""

import itertools
import json
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdiff_jax.training.checkpoint import Checkpoints, SaveFailed
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.loop import SIGNAL, TIME_LIMIT, LoopConfig, NonFiniteRun, fit, to_scalars
from vdiff_jax.training.step import init_sharded_state, make_train_step
from vdiff_jax.training.stopping import StopRequest
from vdiff_jax.training.writers import MetricWriter


def loss_fn(params, batch, keys):
    loss = jnp.mean(jnp.square(params["w"] - batch["y"]))
    return loss, {"error_sum": jnp.array([1.0, 0.0, 6.0]), "error_count": jnp.array([1.0, 0.0, 3.0])}


def start(poison=()):
    """(state, step, batches); the batches of the steps in `poison` (0 = first) are not finite."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    state, shardings = init_sharded_state(lambda key: {"w": jnp.zeros(())}, optimizer, jax.random.key(0), mesh)
    step = make_train_step(loss_fn, optimizer, mesh, shardings)

    def batches(first):
        return ({"y": np.full(2, np.nan if i in poison else 1.0, np.float32)} for i in itertools.count(first))

    return state, step, batches


def run(tmp_path, config, poison=(), batches=None, **settings):
    state, step, endless = start(poison)
    checkpoints = Checkpoints(tmp_path)
    writer = MetricWriter(tmp_path)
    try:
        return fit(
            state,
            step,
            batches or endless,
            jax.random.key(0),
            config,
            batch_size=2,
            checkpoints=checkpoints,
            meta={},
            writer=writer,
            **settings,
        )
    finally:
        checkpoints.close()
        writer.close()


def saved_steps(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


def test_a_run_to_its_end_saves_logs_and_samples(tmp_path):
    sampled, models = [], []
    state, stopped = run(
        tmp_path,
        LoopConfig(num_steps=7, log_steps=2, checkpoint_steps=3, sample_steps=5, model_steps=3),
        on_sample=lambda step, state, writer: sampled.append((step, int(state.step))),
        on_model=lambda step, state: models.append((step, int(state.step))),
    )
    assert stopped is None and int(state.step) == 7
    assert saved_steps(tmp_path) == [3, 6, 7] and sampled == [(5, 5)] and models == [(3, 3), (6, 6)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        # w -> 1 - 0.8^n under this loss, so the loss at update n is 0.64^(n - 1).
        np.testing.assert_allclose(line["loss"], 0.64 ** (line["step"] - 1), rtol=1e-5)
        assert line["error/0"] == 1.0 and line["error/2"] == 2.0 and "error/1" not in line
        shares = [value for name, value in line.items() if name.startswith("goodput/")]
        assert len(shares) == 7 and abs(sum(shares) - 100) < 0.1
        assert line["skipped"] == line["spikes"] == 0 and line["clips_per_s"] > 0 and line["grad_norm"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_each_part_of_a_run_is_a_phase_of_its_clock(tmp_path):
    """What a watch reads to tell where a run hangs."""
    seen = []

    class Watched(Goodput):
        def enter(self, phase, count_as=None):
            seen.append((phase, self.step))
            super().enter(phase, count_as)

    config = LoopConfig(num_steps=3, log_steps=1, checkpoint_steps=2, sample_steps=3)
    run(tmp_path, config, clock=Watched(), on_sample=lambda step, state, writer: None)
    assert seen == [
        ("data", 0), ("compile", 0),
        ("data", 1), ("step", 1), ("checkpoint", 1),
        ("data", 2), ("step", 2), ("export", 2), ("checkpoint", 3), ("export", 3),
    ]  # fmt: skip


def test_metrics_of_a_resumed_run_are_appended(tmp_path):
    for first in (1, 2):
        writer = MetricWriter(tmp_path)
        writer.scalars(first, {"loss": 0.5 * first})
        writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "loss": 0.5}',
        '{"step": 2, "loss": 1.0}',
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(number, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def batches(first):
        for step, batch in enumerate(start()[2](first)):
            if step == 3:
                os.kill(os.getpid(), number)
            yield batch

    state, stopped = run(tmp_path, LoopConfig(num_steps=100, checkpoint_steps=0), batches=batches)
    assert stopped == SIGNAL and int(state.step) == 4 and saved_steps(tmp_path) == [4]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_second_signal_while_saving_does_no_harm(tmp_path, monkeypatch):
    wait, sent = Checkpoints.wait, []

    def wait_and_be_told_again(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        sent.append(signal.SIGTERM)
        wait(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", wait_and_be_told_again)

    def batches(first):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from start()[2](first)

    state, stopped = run(tmp_path, LoopConfig(num_steps=100, checkpoint_steps=0), batches=batches)
    assert stopped == SIGNAL and saved_steps(tmp_path) == [int(state.step)] == [1] and sent


def test_a_second_interrupt_does_not_wait():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit_stops_with_a_checkpoint(tmp_path):
    state, stopped = run(tmp_path, LoopConfig(num_steps=100, checkpoint_steps=0, max_minutes=1e-9))
    assert stopped == TIME_LIMIT and int(state.step) == 1 and saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("log_steps", [0, 1])
def test_many_bad_updates_in_a_row_end_the_run_after_a_checkpoint(log_steps, tmp_path):
    config = LoopConfig(num_steps=100, log_steps=log_steps, checkpoint_steps=0, max_skipped_in_row=3)
    with pytest.raises(NonFiniteRun, match="3 updates in a row") as error:
        run(tmp_path, config, poison=range(5, 100))
    assert str(tmp_path) in str(error.value)
    (step,) = saved_steps(tmp_path)
    assert step in (8, 9)  # metrics are read one step late
    checkpoints = Checkpoints(tmp_path)
    state, _, _ = start()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
    np.testing.assert_allclose(restored.params["w"], 1 - 0.8**5, rtol=1e-5)  # the five good updates
    checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_a_full_disk_ends_a_run_with_what_it_means_for_its_checkpoint(tmp_path, capsys):
    """Metrics and the account of time are no reason to end. capsys: the console is no file then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, _, endless = start()

    def batches(first):
        for step, batch in enumerate(endless(first)):
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))  # no file beyond 8 bytes
            yield batch

    config, clock = LoopConfig(num_steps=30, log_steps=1, checkpoint_steps=0), Goodput(tmp_path)
    try:
        with pytest.warns(UserWarning) as caught, pytest.raises(SaveFailed, match="step 30 could not be written"):
            run(tmp_path, config, batches=batches, clock=clock)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = [str(warning.message) for warning in caught]
    assert sum("metrics in" in one for one in said) == sum("goodput.json cannot be written" in one for one in said) == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["step"] for line in lines)  # whole ones only


def test_bad_updates_that_are_not_in_a_row_do_not_end_it(tmp_path):
    config = LoopConfig(num_steps=9, log_steps=1, checkpoint_steps=0, max_skipped_in_row=3)
    state, stopped = run(tmp_path, config, poison=(0, 1, 3, 4, 6, 7))
    assert stopped is None and int(state.skipped) == 6
    np.testing.assert_allclose(state.params["w"], 1 - 0.8**3, rtol=1e-5)


def test_scalars_are_bin_means():
    scalars = to_scalars({"loss": jnp.float32(2.0), "by_sum": np.array([3.0, 0.0]), "by_count": np.array([2.0, 0.0])})
    assert scalars == {"loss": 2.0, "by/0": 1.5}
