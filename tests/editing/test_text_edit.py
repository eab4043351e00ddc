"""Text edits where the right answer is known: Gaussian clips in closed form, and the enumerated world."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from atlas import atlas
from gaussian_video import GaussianVideo

from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.editing.text_edit import (
    FLOW_SAMPLER,
    INVERSION_SAMPLER,
    TAPE_SAMPLER,
    FlowEdit,
    flow_job,
    inversion_job,
    sdedit_job,
    tape_job,
)
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.guidance import Guidance
from vdiff_jax.sampling.inversion import ddpm_inversion
from vdiff_jax.sampling.samplers import SAMPLERS, Sampler, sample
from vdiff_jax.types import Job

G, A, STEPS = GaussianVideo(), atlas(), 25
SCHEDULE = LinearLogSNR(-12.0, 10.0)


def plan_from(level: float, batch: int, num_frames: int, steps: int = STEPS):
    return jobs.uniform_plan(SCHEDULE, steps, batch, num_frames, start=float(SCHEDULE.u(jnp.asarray(level))))


def gaussian_problem(batch=16):
    """Clips of the prior with mean `old`, the prior means `old` and `new`."""
    rng = np.random.default_rng(1)
    old, new = (np.repeat(rng.standard_normal((1, *G.shape)), batch, axis=0) for _ in range(2))
    clips = rng.multivariate_normal(np.zeros(G.size), G.covariance, batch).reshape(batch, *G.shape) + old
    keys = jax.random.split(jax.random.key(0), batch)
    return *(jnp.asarray(value, jnp.float32) for value in (clips, old, new)), keys


@functools.partial(jax.jit, static_argnames="finish")
def run(job, sampler, keys, finish=True):
    return sample(G.denoise_fn, job, sampler, keys, finish=finish)


def rms(values):
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


@pytest.mark.parametrize("draws", [1, 2])
def test_flow_moves_a_gaussian_clip_by_the_difference_of_the_means(draws):
    # Equal covariances: optimal transport, and what an edit should be, is the shift of the mean.
    clips, old, new, keys = gaussian_problem()
    flow = FlowEdit(clips, old, draws=draws)
    job = flow_job(clips, plan_from(-12.0, *clips.shape[:2]), jobs.nothing_known(clips.shape), new)
    edited = jax.jit(lambda job: sample(flow.wrap(G.denoise_fn), job, FLOW_SAMPLER, keys))(job)
    assert rms(edited - clips - new + old) < 0.02 < 0.5 < rms(new - old)


def test_flow_to_the_same_prompt_changes_nothing_and_context_stays():
    clips, old, new, keys = gaussian_problem()
    plan = plan_from(-4.0, *clips.shape[:2])
    same = sample(FlowEdit(clips, old).wrap(G.denoise_fn), flow_job(
        clips, plan, jobs.nothing_known(clips.shape), old), FLOW_SAMPLER, keys)  # fmt: skip
    np.testing.assert_allclose(same, clips, atol=2e-5)
    known = jobs.known_frames(clips, [0, 3])
    out = sample(FlowEdit(clips, old).wrap(G.denoise_fn), flow_job(clips, plan, known, new), FLOW_SAMPLER, keys)
    np.testing.assert_array_equal(out[:, [0, 3]], clips[:, [0, 3]])
    free = sample(FlowEdit(clips, old).wrap(G.denoise_fn), flow_job(
        clips, plan, jobs.nothing_known(clips.shape), new), FLOW_SAMPLER, keys)  # fmt: skip
    assert rms(out[:, 1:3] - free[:, 1:3]) > 0.05  # the frames between hear their known neighbours


def test_flow_to_itself_changes_nothing_where_the_target_s_context_is_the_source_s():
    # Both branches see their context under one noise: equal contexts and equal prompts cancel exactly.
    clips, old, _, keys = gaussian_problem()
    known = jobs.known_frames(clips, [0], logsnr=3.0)
    job = flow_job(clips, plan_from(-4.0, *clips.shape[:2]), known, old)
    out = sample(FlowEdit(clips, old).wrap(G.denoise_fn), job, FLOW_SAMPLER, keys)
    np.testing.assert_allclose(out, clips, atol=2e-5)


def test_ddpm_inversion_comes_back_exactly_and_edits_by_the_shift():
    clips, old, new, keys = gaussian_problem()
    plan, known = plan_from(-12.0, *clips.shape[:2]), jobs.nothing_known(clips.shape)
    tape = jax.jit(functools.partial(ddpm_inversion, G.denoise_fn))(clips, plan, known, old, keys)
    back = run(tape_job(tape, plan, known, old), TAPE_SAMPLER, keys) + tape.residual
    assert float(jnp.abs(back - clips).max()) < 1e-5
    edited = run(tape_job(tape, plan, known, new), TAPE_SAMPLER, keys) + tape.residual
    assert rms(edited - clips - new + old) < 0.02


def test_inversion_comes_back_the_better_the_higher_its_order():
    clips, old, new, keys = gaussian_problem()
    plan, known = plan_from(-12.0, *clips.shape[:2]), jobs.nothing_known(clips.shape)
    error = {}
    for order in (1, 2):
        sampler = Sampler(order=order)
        z = run(inversion_job(clips, plan, known, old), sampler, keys, finish=False)
        error[order] = rms(run(Job(z, plan, known, old), sampler, keys) - clips)
        if order == 2:
            assert sampler == INVERSION_SAMPLER
            assert rms(run(Job(z, plan, known, new), sampler, keys) - clips - new + old) < 0.05
    assert error[2] < 0.03 and error[2] < error[1] / 4, error


# The enumerated world: a red object becomes blue, everything else must stay. -------------------------------------

BATCH = 40


@functools.cache
def atlas_problem():
    red = np.flatnonzero(A.allowed("red"))
    index = np.random.default_rng(3).choice(red, BATCH, replace=False)
    names = [("blue", *A.names[i][1:]) for i in index]
    return A.atoms[index], names, A.centres[index]


def kept(latents):
    """Share of clips in which colour is as asked and shape, direction and place are as they were."""
    _, names, centres = atlas_problem()
    index, _ = A.nearest(latents)
    near = np.abs(A.centres[index] - centres).max(axis=1) < 0.1
    return float(np.mean([A.names[i] == name and ok for i, name, ok in zip(index, names, near)]))


@functools.partial(jax.jit, static_argnames="method")
def atlas_edit(level, method):
    clips, keys = jnp.asarray(atlas_problem()[0]), jax.random.split(jax.random.key(1), BATCH)
    red, blue, anything = (A.cond(BATCH, *words) for words in (("red",), ("blue",), ()))
    plan = jnp.linspace(level, 10.0, STEPS + 1)[:, None, None] * jnp.ones((1, *clips.shape[:2]))
    known = jobs.nothing_known(clips.shape)
    guidance = Guidance(anything, 3.0)
    if method == "flow":
        job = flow_job(clips, plan, known, blue)
        return sample(FlowEdit(clips, red, guidance).wrap(A.denoise_fn), job, FLOW_SAMPLER, keys)
    if method == "sdedit":
        return sample(A.denoise_fn, sdedit_job(clips, plan, known, blue, keys), SAMPLERS["dpmpp_2m"], keys)
    if method == "ddpm":
        tape = ddpm_inversion(A.denoise_fn, clips, plan, known, red, keys)
        return sample(A.denoise_fn, tape_job(tape, plan, known, blue), TAPE_SAMPLER, keys)
    z = sample(A.denoise_fn, inversion_job(clips, plan, known, red), INVERSION_SAMPLER, keys, finish=False)
    return sample(A.denoise_fn, Job(z, plan, known, blue), INVERSION_SAMPLER, keys)


def test_flow_recolours_and_keeps_the_rest():
    assert kept(atlas_edit(-2.0, "flow")) >= 0.95
    assert kept(atlas_edit(-5.0, "flow")) >= 0.9


@pytest.mark.parametrize(("method", "level", "bar"), [("ddpm", -2.0, 0.85), ("inversion", -10.0, 0.95)])
def test_inversions_recolour_and_keep_the_rest(method, level, bar):
    assert kept(atlas_edit(level, method)) >= bar


def test_sdedit_keeps_less_the_more_noise_it_adds():
    shares = [kept(atlas_edit(level, "sdedit")) for level in (0.0, -5.0, -7.0)]
    assert shares[0] >= 0.95 and shares[0] > shares[1] > shares[2], shares
    assert shares[2] < 0.3
