"""Jobs and plans: every plan rises from noise to clean in the announced order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.schedule import Cosine, LinearLogSNR
from vdiff_jax.sampling import job as jobs

SCHEDULE, STEPS, B, F = LinearLogSNR(), 4, 2, 6
GRID = np.linspace(-10, 10, STEPS + 1)
PLANS = {
    "even": lambda: jobs.even_plan(SCHEDULE, STEPS, SCHEDULE.logsnr_min, B, F),
    "uniform": lambda: jobs.uniform_plan(SCHEDULE, STEPS, B, F),
    "ramp": lambda: jobs.ramp_plan(SCHEDULE, STEPS, 2, B, F),
    "autoregressive": lambda: jobs.autoregressive_plan(SCHEDULE, STEPS, B, F),
    "blocks": lambda: jobs.autoregressive_plan(SCHEDULE, STEPS, B, F, block=3),
    "keyframes": lambda: jobs.keyframes_first(SCHEDULE, STEPS, B, F, stride=2),
    "random": lambda: jobs.random_monotone_plan(jax.random.key(0), SCHEDULE, STEPS, B, F),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_rise_from_noise_to_clean(name):
    plan = np.asarray(PLANS[name]())
    assert plan.shape[1:] == (B, F)
    np.testing.assert_allclose(plan[0], -10, atol=1e-5)
    np.testing.assert_allclose(plan[-1], 10, atol=1e-5)
    assert (np.diff(plan, axis=0) >= 0).all()
    back = jobs.reverse(plan)
    np.testing.assert_array_equal(back[0], plan[-1])
    np.testing.assert_array_equal(back[::-1], plan)


def starts(plan):
    """The step in which each frame first moves, and the number of steps it moves in."""
    moves = np.diff(plan[:, 0], axis=0) > 0
    return moves.argmax(0).tolist(), moves.sum(0).tolist()


def test_frames_start_when_announced():
    assert starts(PLANS["uniform"]()) == ([0] * F, [STEPS] * F)
    assert starts(PLANS["ramp"]()) == ([0, 2, 4, 6, 8, 10], [STEPS] * F)
    assert starts(PLANS["autoregressive"]()) == ([0, 4, 8, 12, 16, 20], [STEPS] * F)
    assert starts(PLANS["blocks"]()) == ([0, 0, 0, 4, 4, 4], [STEPS] * F)
    assert starts(PLANS["keyframes"]()) == ([0, 4, 0, 4, 0, 4], [STEPS] * F)
    backwards = jobs.autoregressive_plan(SCHEDULE, STEPS, B, F, backwards=True)
    assert starts(backwards) == ([20, 16, 12, 8, 4, 0], [STEPS] * F)
    for frame in range(F):
        np.testing.assert_allclose(np.unique(PLANS["ramp"]()[:, 0, frame]), GRID, atol=1e-5)


def test_a_random_plan_is_one_path_at_any_number_of_steps():
    coarse, fine = (jobs.random_monotone_plan(jax.random.key(1), Cosine(), steps, B, F) for steps in (5, 20))
    np.testing.assert_allclose(fine[::4], coarse, atol=1e-3)
    assert float(jnp.std(coarse[2])) > 0.1


def test_known_frames_by_index_and_by_vector():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((B, F, 2, 3, 1)), jnp.float32)
    known = jobs.known_frames(latents, [0, -1], logsnr=5.0)
    np.testing.assert_array_equal(known.mask[:, :, 1, 1, 0], np.tile([1, 0, 0, 0, 0, 1], (B, 1)))
    np.testing.assert_array_equal(known.logsnr, np.full((B, F), 5.0))
    vector = np.array([True, False, False, False, False, True])
    np.testing.assert_array_equal(jobs.known_frames(latents, vector).mask, known.mask)
    traced = jax.jit(lambda vector: jobs.known_frames(latents, vector).mask)(jnp.asarray(vector))
    np.testing.assert_array_equal(traced, known.mask)
    assert float(jobs.nothing_known(latents.shape).mask.max()) == 0
    with pytest.raises(ValueError, match="lie outside a clip of 6 frames"):
        jobs.known_frames(latents, [6])
    with pytest.raises(ValueError, match="the clip has 6 frames"):
        jobs.known_frames(latents, np.ones(5, bool))


def test_text_to_video_starts_from_unit_noise_of_each_key():
    keys = jax.random.split(jax.random.key(0), 64)
    job = jobs.text_to_video_job(keys, (64, 4, 4, 4, 2), SCHEDULE, STEPS, cond={"text": jnp.ones((64, 1))})
    z = np.asarray(job.z)
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    alone = jobs.text_to_video_job(keys[5:6], (1, 4, 4, 4, 2), SCHEDULE, STEPS, cond=None)
    np.testing.assert_array_equal(alone.z[0], z[5])
    assert len(np.unique(z[:, 0, 0, 0, 0])) == 64
    np.testing.assert_allclose(job.plan[:, 0, 0], GRID, atol=1e-5)
    assert float(job.known.mask.max()) == 0


def test_streams_of_a_key_do_not_repeat_each_other():
    keys = jax.random.split(jax.random.key(0), 3)
    numbers = (jobs.START_STREAM, jobs.CONTEXT_STREAM, jobs.STEP_STREAM)
    data = np.concatenate([jax.random.key_data(jobs.stream(keys, number)) for number in numbers])
    assert len(np.unique(data, axis=0)) == 9


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="must not be negative"):
        jobs.staggered_plan(SCHEDULE, STEPS, [0, -1], B)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        jobs.uniform_plan(SCHEDULE, 0, B, F)


def test_even_steps_of_log_snr_from_any_level():
    plan = jobs.even_plan(Cosine(-10.0, 8.0), 4, jnp.asarray([-2.0, 4.0]), 2, 3)
    np.testing.assert_allclose(plan[:, 0, 1], [-2, 0.5, 3, 5.5, 8], atol=1e-5)
    np.testing.assert_allclose(plan[:, 1, 2], [4, 5, 6, 7, 8], atol=1e-5)
    np.testing.assert_allclose(jobs.even_plan(Cosine(-10.0, 8.0), 2, -99.0, 1, 1)[:, 0, 0], [-10, -1, 8], atol=1e-5)
