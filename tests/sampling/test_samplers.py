"""Samplers against Gaussian clips whose law is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo, root

from vdiff_jax.diffusion.process import add_noise, alpha_sigma
from vdiff_jax.diffusion.schedule import Cosine, EDMRho, Flow, LinearLogSNR
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.samplers import SAMPLERS, Sampler, kernel_moments, make_sampler, sample
from vdiff_jax.types import Job, Known

G = GaussianVideo()
N, F = G.size, G.shape[0]
SCHEDULE = EDMRho(sigma_min=0.007, sigma_max=140.0)
LONGEST = 384 * F
KEYS = jax.random.split(jax.random.key(0), N)
PLANS = {
    "constant": lambda steps: jobs.uniform_plan(SCHEDULE, steps, 1, F),
    "ramp": lambda steps: jobs.ramp_plan(SCHEDULE, steps, steps // 6, 1, F),
    "autoregressive": lambda steps: jobs.autoregressive_plan(SCHEDULE, steps, 1, F),
    "backwards": lambda steps: jobs.autoregressive_plan(SCHEDULE, steps, 1, F, backwards=True),
    "keyframes": lambda steps: jobs.keyframes_first(SCHEDULE, steps, 1, F, stride=2),
    "random": lambda steps: jobs.random_monotone_plan(jax.random.key(5), SCHEDULE, steps, 1, F),
}

run_to_latents = jax.jit(lambda job, sampler, keys: sample(G.denoise_fn, job, sampler, keys))
run_to_noise = jax.jit(lambda job, sampler, keys: sample(G.denoise_fn, job, sampler, keys, finish=False))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def make_job(z, plan, known=None, mean=None, length=LONGEST):
    """A job; plans are repeated over the batch, and over frozen steps up to `length`, so that all share a shape."""
    plan = jnp.concatenate([plan, jnp.repeat(plan[-1:], length + 1 - plan.shape[0], axis=0)])
    plan = jnp.broadcast_to(plan, (plan.shape[0], *z.shape[:2]))
    known = jobs.nothing_known(z.shape, z.dtype) if known is None else known
    return Job(z=z, plan=plan, known=known, cond=jnp.zeros_like(z) if mean is None else mean)


def random_clips(seed=0):
    return G.rows(np.random.default_rng(seed).standard_normal((N, N)))


def law_error(sampler, plan, schedule=SCHEDULE):
    """Largest error of the covariance reached from exact noise, relative to the largest variance."""
    start = G.rows(root(G.noisy_covariance(schedule.logsnr_min)))
    end = G.flat(run_to_noise(make_job(start, plan), sampler, KEYS))
    goal = G.noisy_covariance(schedule.logsnr_max)
    return np.abs(end.T @ end - goal).max() / goal.max()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 3)])
def test_error_falls_with_the_order_of_the_sampler_on_every_plan(name, order, plan):
    errors = [law_error(SAMPLERS[name], PLANS[plan](steps)) for steps in (192, 384)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1 if order < 3 else 0.2)
    assert errors[1] < {1: 0.03, 2: 1e-3, 3: 1e-4}[order]


def test_second_order_needs_a_third_of_the_error_at_twenty_steps():
    schedule = LinearLogSNR()
    first, second, third = (
        law_error(SAMPLERS[name], jobs.uniform_plan(schedule, 20, 1, F), schedule)
        for name in ("ddim", "dpmpp_2m", "unipc")
    )
    assert second < 0.35 * first and third < second


def test_the_long_last_step_of_a_short_flow_plan_does_not_extrapolate():
    # 12 steps per frame, the last of them from logsnr 2.5 to 10: finished frames are context for the others.
    schedule = Flow(shift=3.0)
    assert law_error(SAMPLERS["dpmpp_2m"], jobs.autoregressive_plan(schedule, 12, 1, F), schedule) < 0.1


def test_the_corrector_is_for_deterministic_sampling():
    job = make_job(random_clips(), jobs.uniform_plan(Cosine(), 12, 1, F))
    corrected, plain = (dataclasses.replace(SAMPLERS[name], eta=1.0) for name in ("unipc", "dpmpp_2m"))
    np.testing.assert_allclose(run_to_noise(job, corrected, KEYS), run_to_noise(job, plain, KEYS), atol=1e-12)


def test_the_three_families_are_one_sampler():
    plan = jobs.random_monotone_plan(jax.random.key(1), Cosine(), 12, 1, F)
    job = make_job(random_clips(), plan)
    for eta in (0.0, 0.5):
        vp, flow, edm = (run_to_noise(job, Sampler(eta, 2, process), KEYS) for process in ("vp", "flow", "edm"))
        np.testing.assert_allclose(flow, vp, atol=1e-10)
        np.testing.assert_allclose(edm, vp, atol=1e-10)
    assert (SAMPLERS["euler"].process, SAMPLERS["euler_edm"].process) == ("flow", "edm")


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_stochastic_samplers_reach_the_law(name):
    # The output is linear in the start and in every noise of the tape: feeding a basis of all of them gives the law.
    small, longest = GaussianVideo((2, 1, 2, 1)), 80
    n, rows = small.size, small.size * (longest + 1)
    start = small.rows(np.eye(rows, n) @ root(small.noisy_covariance(-10.0)))
    tape = np.zeros((longest, rows, n))
    for number in range(longest):
        tape[number, n * (number + 1) : n * (number + 2)] = np.eye(n)
    keys = jax.random.split(jax.random.key(0), rows)
    run = jax.jit(lambda job, sampler: sample(small.denoise_fn, job, sampler, keys, finish=False))
    errors = []
    for steps in (40, 80):
        job = make_job(start, jobs.uniform_plan(LinearLogSNR(), steps, 1, 2), length=longest)
        job = dataclasses.replace(job, noise=jnp.asarray(tape).reshape(longest, rows, *small.shape))
        end = small.flat(run(job, SAMPLERS[name]))
        errors.append(np.abs(end.T @ end - small.noisy_covariance(10.0)).max())
    assert errors[1] < (0.3 if SAMPLERS[name].order == 1 else 0.03)
    assert np.log2(errors[0] / errors[1]) > (0.85 if SAMPLERS[name].order == 1 else 1.7)


def replacing(z, logsnr, known, cond, **rest):
    """The habit of showing known tokens noised along the plan, at the expectation of that noise; cond is `known`."""
    alpha, _ = alpha_sigma(logsnr)
    shown = jnp.where(cond.mask > 0.5, alpha[:, :, None, None, None] * cond.latents, z)
    return G.denoise_fn(shown, logsnr, known, jnp.zeros_like(z), **rest)


def condition(known_tokens, replace=False, steps=50):
    """Relative errors of the posterior mean and covariance that sampling reaches, and the latents."""
    values = np.random.default_rng(3).standard_normal(N) * known_tokens
    unknown = ~known_tokens
    start = np.zeros((N, N))  # the output is affine in the start noise: row 0 gives the mean, the others the spread
    start[1 : 1 + unknown.sum(), unknown] = np.eye(unknown.sum())
    latents = G.rows(np.broadcast_to(values, (N, N)))
    mask = G.rows(np.broadcast_to(known_tokens.astype(float), (N, N)))
    known = Known(latents, mask, jnp.full((N, F), 30.0))
    plan = jobs.uniform_plan(Cosine(), steps, 1, F)
    if replace:
        job = make_job(G.rows(start), plan, mean=known)
        run = jax.jit(lambda job: sample(replacing, job, SAMPLERS["unipc"], KEYS))
        flat = G.flat(run(job))
    else:
        flat = G.flat(run_to_latents(make_job(G.rows(start), plan, known=known), SAMPLERS["unipc"], KEYS))
    spread = (flat[1:] - flat[0])[:, unknown]
    true_mean, true_covariance = G.posterior(known_tokens, values[known_tokens])
    mean_error = np.linalg.norm(flat[0, unknown] - true_mean) / np.linalg.norm(true_mean)
    covariance_error = np.linalg.norm(spread.T @ spread - true_covariance) / np.linalg.norm(true_covariance)
    return mean_error, covariance_error, flat[:, known_tokens] - values[known_tokens]


FRAMES = np.repeat(np.arange(F) < 2, N // F)
TOKENS = np.arange(N) % 3 > 0
TOKENS[-1] = True


@pytest.mark.parametrize("known_tokens", [FRAMES, TOKENS], ids=["frames", "tokens"])
def test_conditioning_on_clean_context_is_exact(known_tokens):
    mean_error, covariance_error, known_error = condition(known_tokens)
    assert mean_error < 0.02
    assert covariance_error < 0.03
    assert np.abs(known_error).max() == 0


@pytest.mark.parametrize("known_tokens", [FRAMES, TOKENS], ids=["frames", "tokens"])
def test_replacing_known_tokens_along_the_plan_fails_the_same_bar(known_tokens):
    mean_error, _, _ = condition(known_tokens, replace=True)
    assert mean_error > 0.2


def test_inversion_by_the_reversed_plan_returns():
    clips = G.rows(np.random.default_rng(1).standard_normal((N, N)) @ root(G.covariance))
    z = add_noise(clips, random_clips(), 10.0)
    errors = []
    for steps in (64, 128):
        plan = jobs.uniform_plan(LinearLogSNR(), steps, 1, F)
        noise = run_to_noise(make_job(z, jobs.reverse(plan)), SAMPLERS["dpmpp_2m"], KEYS)
        back = run_to_noise(make_job(noise, plan), SAMPLERS["dpmpp_2m"], KEYS)
        errors.append(float(jnp.abs(back - z).max()))
    assert errors[1] < 2e-3
    assert np.log2(errors[0] / errors[1]) > 1.8
    # What it went to is noise: white, and nothing like the clips.
    assert np.abs(G.flat(noise) @ np.linalg.inv(root(G.noisy_covariance(-10.0)))).std() == pytest.approx(0.6, abs=0.1)


def test_frozen_frames_keep_their_state_exactly():
    start = random_clips()
    plan = jnp.where(jnp.arange(F)[None, None] == 1, 2.5, jobs.uniform_plan(Cosine(), 8, 1, F))
    out = run_to_noise(make_job(start, plan), SAMPLERS["dpmpp_2m"], KEYS)
    np.testing.assert_array_equal(out[:, 1], start[:, 1])
    assert float(jnp.abs(out[:, 0] - start[:, 0]).min()) > 1e-6


def test_a_finished_frame_keeps_the_estimate_of_its_last_step():
    # Frame i takes steps 5 i to 5 i + 4; what the trace holds for it later is not its answer.
    plan = jobs.autoregressive_plan(Cosine(), 5, 1, F)
    job = make_job(random_clips(), plan, length=5 * F)
    latents, x0_hats = run_to_latents(job, make_sampler("unipc", trace=True), KEYS)
    for frame in range(F):
        np.testing.assert_array_equal(latents[:, frame], x0_hats[5 * frame + 4, :, frame])
    assert float(jnp.abs(x0_hats[-1, :, 0] - latents[:, 0]).max()) > 1e-6


def test_a_sample_does_not_depend_on_its_batch():
    context = random_clips()
    run = jax.jit(lambda job, keys: sample(G.denoise_fn, job, SAMPLERS["ddpm"], keys))

    def generate(rows):
        known = jobs.known_frames(context[rows], [0], logsnr=4.0)
        job = jobs.text_to_video_job(KEYS[rows], context[rows].shape, Cosine(), 6, jnp.zeros_like(context[rows]))
        return run(dataclasses.replace(job, known=known), KEYS[rows])

    together = generate(slice(0, 8))
    np.testing.assert_allclose(together[3], generate(slice(3, 4))[0], atol=1e-12)
    assert float(jnp.abs(together[3] - together[4]).max()) > 0.1


@pytest.mark.parametrize(("noise_kind", "kurtosis"), [("gaussian", 3.0), ("uniform", 1.8)])
def test_context_and_steps_are_noised_by_the_law_of_the_training(noise_kind, kurtosis):
    """From zero latents and a zero denoiser, one ancestral step leaves nothing but its noise."""
    nothing = jnp.zeros((N, F, 32, 32, 1))
    known = jobs.known_frames(nothing, [0], logsnr=0.0)
    job = Job(nothing, jnp.asarray([[[-1.0] * F] * N, [[1.0] * F] * N]), known, None)
    ancestral = make_sampler("ddpm", noise_kind=noise_kind)
    noisy = sample(lambda z, *_, **__: jnp.zeros_like(z), job, ancestral, KEYS, finish=False)
    for part in (noisy[:, 0], noisy[:, 1:]):  # the context, and what the step made
        np.testing.assert_allclose(jnp.mean((part / part.std()) ** 4), kurtosis, rtol=0.05)


def test_trace_returns_every_clean_estimate():
    start = random_clips()
    plan = jobs.uniform_plan(Cosine(), 5 * F, 1, F)
    job = make_job(start, plan, known=jobs.known_frames(start, [0]), length=5 * F)
    latents, x0_hats = run_to_latents(job, make_sampler("unipc", trace=True), KEYS)
    assert x0_hats.shape == (5 * F, *start.shape)
    np.testing.assert_array_equal(x0_hats[-1], latents)
    np.testing.assert_array_equal(latents[:, 0], start[:, 0])


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_a_plan_may_start_at_pure_noise_and_end_clean(name):
    # -inf: alpha exactly 0, where a mean over the whole law is the only estimate; +inf: sigma exactly 0.
    levels = np.concatenate([[-np.inf], np.linspace(-9, 9, 100), [np.inf]])
    plan = jnp.asarray(levels)[:, None, None] * jnp.ones((1, 1, F))
    end = G.flat(run_to_noise(make_job(G.rows(np.eye(N)), plan), SAMPLERS[name], KEYS))
    assert np.abs(end.T @ end - G.covariance).max() < (0.3 if name == "ddim" else 0.03)


def test_nothing_that_is_data_compiles_again():
    run = jax.jit(lambda job, sampler, keys: sample(G.denoise_fn, job, sampler, keys))
    for seed, eta in enumerate((0.0, 1.0, 0.3)):
        start = random_clips(seed)
        plan = jobs.random_monotone_plan(jax.random.key(seed), Cosine(), 7, N, F)
        job = make_job(start, plan, known=jobs.known_frames(start, [seed]), mean=start * seed, length=7)
        run(job, make_sampler("dpmpp_2m", eta=eta), jax.random.split(jax.random.key(seed), N))
    assert run._cache_size() == 1


def test_kernel_moments_agree_with_quadrature_in_single_precision():
    for h in (-3.0, -0.9, -0.01, 1e-4, 0.03, 0.999, 1.001, 6.0):
        tau, weights = np.polynomial.legendre.leggauss(60)
        tau = h * (tau + 1) / 2
        kernel = weights * np.exp(tau - h)
        first, second = ((kernel * tau**k).sum() / kernel.sum() for k in (1, 2))
        got = kernel_moments(jnp.float32(h))
        np.testing.assert_allclose(got, (first, second), rtol=2e-5)


def test_mistakes_are_named():
    job = make_job(random_clips(), jobs.uniform_plan(Cosine(), 3, 1, F))
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        make_sampler("dpmp_2m")
    with pytest.raises(ValueError, match="one key per sample"):
        sample(G.denoise_fn, job, SAMPLERS["ddim"], KEYS[:3])
    with pytest.raises(ValueError, match="must be \\[steps\\+1 b f\\]"):
        sample(G.denoise_fn, dataclasses.replace(job, plan=job.plan[:, :, :2]), SAMPLERS["ddim"], KEYS)
    with pytest.raises(ValueError, match="order 3 is order 2 with the corrector"):
        dataclasses.replace(SAMPLERS["ddim"], order=3)
