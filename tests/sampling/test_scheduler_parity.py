"""Our scan equals the public schedulers: levels, timesteps, every clean estimate and the end, from their own json."""

import dataclasses
import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.prediction import to_x0
from vdiff_jax.diffusion.process import from_vp
from vdiff_jax.diffusion.schedule import grid, make_schedule
from vdiff_jax.interop.schedulers import process_settings
from vdiff_jax.sampling.clipping import ClipEstimate
from vdiff_jax.sampling.inversion import ddpm_inversion
from vdiff_jax.sampling.job import nothing_known, reverse, text_to_video_job, uniform_plan
from vdiff_jax.sampling.samplers import make_sampler, sample
from vdiff_jax.types import Job

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "schedulers.npz")
KEYS = jax.random.split(jax.random.key(0), 1)
STEPS = (10, 25)
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if name.endswith("/settings")})
ON_OTHER_PATHS = ("ddim_linspace", "pndm")


def network(z, timestep):
    """The analytic network of golden/make_scheduler_golden.py."""
    return jnp.tanh(0.9 * z + 0.4 * jnp.sin(2.1 * z + timestep / 160.0)) + 0.1 * jnp.cos(timestep / 90.0)


def settings_of(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return process_settings(json.loads(str(GOLDEN[f"{case}/settings"])))


def error(ours, theirs):
    """Largest error, relative to the largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def walk(kind, schedule, job, sampler, limit):
    def denoise_fn(z, logsnr, known, cond, *, next_logsnr, keys):
        told = schedule.logsnr_to_timestep(logsnr)[:, :, None, None, None]
        return to_x0(kind, network(from_vp(z, logsnr, process_of(kind)), told), z, logsnr)

    # A scheduler returns the latents after its last step.
    denoise_fn = ClipEstimate(limit).wrap(denoise_fn)
    return sample(denoise_fn, job, sampler, KEYS, finish=schedule.finish)


def process_of(kind):
    return "flow" if kind == "velocity" else "vp"


def run(case, steps, **changes):
    """Schedule, plan's levels, clean estimates and end of a walk with the settings of a case."""
    settings = settings_of(case) | changes
    schedule = make_schedule(settings["schedule"], **settings["schedule_settings"])
    start = jnp.asarray(GOLDEN["start"])
    job = text_to_video_job(KEYS, start.shape, schedule, steps, None)
    job = dataclasses.replace(job, z=schedule.start_std(steps) * start, known=nothing_known(start.shape))
    if f"{case}/{steps}/noise" in GOLDEN:
        job = dataclasses.replace(job, noise=jnp.asarray(GOLDEN[f"{case}/{steps}/noise"]))
    limit = jnp.float32(np.inf if settings["clip_x0"] is None else settings["clip_x0"])
    sampler = make_sampler(settings["sampler"], trace=True)
    output, x0_hats = walk(settings["prediction"], schedule, job, sampler, limit)
    return schedule, job.plan[:, 0, 0], x0_hats, output


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "pndm"])
def test_levels_and_timesteps_are_the_public_ones(case, steps):
    timesteps, sigmas = (GOLDEN[f"{case}/{steps}/{key}"] for key in ("timesteps", "sigmas"))
    schedule, plan, *_ = run(case, steps)
    # Theirs are in float32, in which 1 - alpha_bar of the first timestep has an error of 3e-5; ours in float64.
    np.testing.assert_allclose(np.exp(-np.asarray(plan, np.float64) / 2), sigmas, rtol=2e-5)
    # Real-valued timesteps inherit that error of the table; those of the table itself are exact.
    whole = schedule.logsnr_to_timestep(plan[:-1])
    np.testing.assert_allclose(whole, timesteps, atol=2e-3 if case.startswith(("euler", "flow")) else 0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ON_OTHER_PATHS])
def test_every_estimate_and_the_end_are_the_public_ones(case, steps):
    schedule, plan, x0_hats, output = run(case, steps)
    if case.startswith("euler") and not schedule.finish:  # theirs ends in the latents of the EDM scale
        output = from_vp(output, plan[-1], "edm")
    assert error(output, GOLDEN[f"{case}/{steps}/output"]) < 1e-5
    if steps == STEPS[0]:
        assert error(x0_hats, GOLDEN[f"{case}/{steps}/x0_hats"]) < 1e-5


def test_ddim_on_timesteps_it_does_not_land_on_is_left_to_its_authors():
    # Public DDIM steps to t - T // steps whatever comes next. With "linspace" each step falls short of the next
    # timestep, and the network is told a level that the latents do not have.
    fine = run("ddim_leading_no_offset", 500)[-1]
    for steps in STEPS:
        theirs, ours = GOLDEN[f"ddim_linspace/{steps}/output"], run("ddim_linspace", steps)[-1]
        assert error(ours, fine) < 0.25 * error(theirs, np.asarray(fine))


def test_second_order_is_nearer_to_pndm_than_ddim():
    for steps, bound in zip(STEPS, (0.02, 0.006), strict=True):
        theirs = GOLDEN[f"pndm/{steps}/output"]
        distances = [error(run("pndm", steps, sampler=name)[-1], theirs) for name in ("dpmpp_2m", "ddim")]
        assert distances[0] < bound and distances[0] < 0.8 * distances[1]


@pytest.mark.parametrize("case", ["ddim_leading_no_offset", "euler_svd", "dpm_karras", "flow_shift"])
def test_a_later_start_begins_where_public_pipelines_do_and_is_traced(case):
    settings = settings_of(case)
    schedule = make_schedule(settings["schedule"], **settings["schedule_settings"])
    levels = jax.jit(lambda start: grid(schedule, 10, start))
    whole = np.asarray(grid(schedule, 10))
    np.testing.assert_allclose(levels(jnp.float32(1.0))[1:], whole[1:], rtol=1e-5)
    assert levels(jnp.float32(1.0))[0] == whole[0]
    for strength, first in ((0.6, 4), (0.1, 9)):  # the last int(steps * strength) of the timesteps
        later = np.asarray(levels(jnp.float32(strength)))
        assert later.shape == whole.shape and later[-1] == whole[-1] == np.inf
        assert later[0] == pytest.approx(whole[first], abs=2e-5)
        assert (np.diff(later) >= 0).all() and np.isfinite(later[:-1]).all()
        np.testing.assert_allclose(grid(schedule, 10, strength), later, rtol=1e-5)


def test_an_inversion_does_not_start_without_noise():
    plan = uniform_plan(make_schedule("discrete", placing="euler"), 5, 1, 2)
    backwards = reverse(plan)
    assert plan[-1, 0, 0] == np.inf and backwards.shape == plan.shape
    np.testing.assert_array_equal(backwards[0], plan[-2])
    np.testing.assert_array_equal(backwards[1:], plan[-2::-1])


@pytest.mark.parametrize("final", ["clean", "first"])
def test_ddpm_inversion_finds_its_way_back_along_public_timesteps(final):
    schedule = make_schedule("discrete", steps_offset=1, final=final)
    source = jnp.asarray(GOLDEN["start"])
    plan, known = uniform_plan(schedule, 6, *source.shape[:2]), nothing_known(source.shape)

    def denoise_fn(z, logsnr, known, cond, *, next_logsnr, keys):
        return jnp.tanh(z)

    tape = ddpm_inversion(denoise_fn, source, plan, known, None, KEYS)
    assert np.isfinite(tape.noise).all()
    job = Job(tape.z, plan, known, None, tape.noise)
    back = sample(denoise_fn, job, make_sampler("ddpm"), KEYS)
    np.testing.assert_allclose(back + tape.residual, source, atol=2e-5)


def test_live_schedulers_agree_on_other_numbers_of_steps():
    diffusers = pytest.importorskip("diffusers")
    for case in CASES:
        fields = json.loads(str(GOLDEN[f"{case}/settings"]))
        scheduler = getattr(diffusers, fields.pop("_class_name"))(**fields)
        if not hasattr(scheduler, "sigmas"):
            continue
        for steps in (4, 7, 33):
            scheduler.set_timesteps(steps)
            settings = settings_of(case)
            levels = np.asarray(make_schedule(settings["schedule"], **settings["schedule_settings"]).levels(steps))
            theirs = np.asarray(scheduler.sigmas, np.float64)
            ours = np.exp(-levels / 2) if "flow" not in case else 1 / (1 + np.exp(levels / 2))
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


def test_clipping_keeps_what_is_known_and_the_range():
    start = jnp.asarray(GOLDEN["start"])
    mask = jnp.zeros((*start.shape[:4], 1)).at[:, 0].set(1.0)
    known = dataclasses.replace(nothing_known(start.shape), latents=3 * start, mask=mask)
    wrapped = ClipEstimate(0.5).wrap(lambda z, *args, **options: z)
    cut = wrapped(start, None, known, None, next_logsnr=None, keys=KEYS)
    np.testing.assert_array_equal(cut[:, 0], 3 * start[:, 0])
    np.testing.assert_array_equal(cut[:, 1], jnp.clip(start[:, 1], -0.5, 0.5))
