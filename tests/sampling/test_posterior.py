"""Posterior sampling against the exact posterior of Gaussian clips, seen through an ill-conditioned decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo, root

from vdiff_jax.diffusion.process import alpha_sigma, scales
from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.guidance import tweedie_covariance
from vdiff_jax.sampling.posterior import PosteriorSampling, chi_square, conjugate_gradients
from vdiff_jax.sampling.samplers import SAMPLERS, sample
from vdiff_jax.types import Job, Known

G = GaussianVideo((3, 1, 8, 1))
N, F, NOISE = G.size, 3, 0.05
END = 30  # iterations after which nothing is left of N equations
LEVEL = np.array([-2.0, 0.5, 3.0])
RNG = np.random.default_rng(0)
LEFT, RIGHT = (np.linalg.qr(RNG.standard_normal((N, N)))[0] for _ in range(2))
DECODER = LEFT * np.geomspace(1, 0.1, N) @ RIGHT.T


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def blur_rows():
    line = np.exp(-0.5 * (np.arange(-3, 4) / 1.2) ** 2)
    mirrored = np.pad(np.eye(8), ((3, 3), (0, 0)), mode="symmetric")
    return np.kron(np.eye(3), sum(w * mirrored[i : i + 8] for i, w in enumerate(line / line.sum())))


def padded(rows):
    """Rows of a measurement, and its noise: all cases get N entries, those too many are missing."""
    matrix, noise = np.zeros((N, N)), np.full(N, np.inf)
    matrix[: len(rows)], noise[: len(rows)] = rows, NOISE
    return matrix, noise


MEASUREMENTS = {
    "four_times_fewer_pixels": padded(np.kron(np.eye(N // 4), np.full((1, 4), 0.25))),
    "half_the_pixels": padded(np.eye(N)[np.random.default_rng(1).permutation(N)[: N // 2]]),
    "blur": padded(blur_rows()),
}


def apply_rows(matrix, video):
    return video.reshape(len(video), N) @ matrix.T


def decode(latents):
    return apply_rows(jnp.asarray(DECODER, latents.dtype), latents).reshape(latents.shape)


def rows_of(matrix):
    return jax.tree_util.Partial(apply_rows, jnp.asarray(matrix))


def restoration(matrix, noise, y, iterations=8):
    noise = jnp.broadcast_to(noise, np.shape(y)) if np.ndim(noise) == 2 else jnp.asarray(noise)
    return PosteriorSampling(jnp.asarray(y), rows_of(matrix), noise, iterations)


def weighted(matrix, noise):
    """The measurement of latents in units of its noise."""
    return matrix @ DECODER / noise[:, None]


def law(run, matrix, noise):
    """Errors of a sampler's mean (in posterior stds) and covariance (relative), and its chi^2 over the exact one.

    The map from noise to answer is close to affine, so 2 N points of the noise's mean and covariance stand for it all
    (the cubature rule, exact up to third order).
    """
    rng = np.random.default_rng(7)
    y = matrix @ DECODER @ (rng.standard_normal(N) @ root(G.covariance)) + NOISE * rng.standard_normal(N)
    seen = weighted(matrix, noise)
    covariance = np.linalg.inv(np.linalg.inv(G.covariance) + seen.T @ seen)
    mean = covariance @ seen.T @ (y / noise)
    exact_chi = np.sum((y / noise - seen @ mean) ** 2) + np.trace(seen @ covariance @ seen.T)

    turn = np.linalg.qr(rng.standard_normal((N, N)))[0] * np.sqrt(N)
    z = G.rows(np.concatenate([turn, -turn]))
    plan = jobs.uniform_plan(LinearLogSNR(), 25, len(z), F)
    job = Job(z, plan, jobs.nothing_known(z.shape, z.dtype), jnp.zeros_like(z))
    out = G.flat(run(job, restoration(matrix, noise[None], y[None])))
    mean_error = np.sqrt(np.mean((out.mean(0) - mean) ** 2) / np.mean(np.diag(covariance)))
    covariance_error = np.linalg.norm(np.cov(out.T, bias=True) - covariance) / np.linalg.norm(covariance)
    chi = np.asarray(chi_square(jnp.asarray(y)[None], out @ DECODER.T @ matrix.T, noise[None]))
    return mean_error, covariance_error, chi.mean() * np.isfinite(noise).sum() / exact_chi


@jax.jit
def run_posterior(job, wrapper):
    keys = jax.random.split(jax.random.key(0), len(job.z))
    return sample(wrapper.wrap(G.denoise_fn, decode), job, SAMPLERS["dpmpp_2m"], keys)


@jax.jit
def run_isotropic(job, wrapper):
    """PiGDM (Song et al. 2023): sigma^2 times the identity stands for the covariance of x given z."""
    seen = apply_rows(jnp.asarray(DECODER.T), wrapper.measure.args[0]) / wrapper.noise_std.T

    def denoise_fn(z, logsnr, known, cond, **rest):
        x0_hat, covariance = tweedie_covariance(G.denoise_fn, z, logsnr, known, cond, **rest)
        _, sigma = scales(logsnr[0, 0], jnp.zeros(()))
        residual = wrapper.observed / wrapper.noise_std - x0_hat.reshape(-1, N) @ seen.T
        solved = jnp.linalg.solve(jnp.eye(N) + sigma**2 * seen @ seen.T, residual.T).T
        return x0_hat + covariance((solved @ seen).reshape(z.shape))

    keys = jax.random.split(jax.random.key(0), len(job.z))
    return sample(denoise_fn, job, SAMPLERS["dpmpp_2m"], keys)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_samples_have_the_law_of_the_exact_posterior(name):
    mean_error, covariance_error, chi = law(run_posterior, *MEASUREMENTS[name])
    assert mean_error < 0.15
    assert covariance_error < 0.2
    assert 0.9 < chi < 1.2


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_an_isotropic_covariance_fails_the_same_bar(name):
    mean_error, covariance_error, chi = law(run_isotropic, *MEASUREMENTS[name])
    assert mean_error > 0.15
    assert chi > 1.2
    assert covariance_error > 0.15


# One call, at one level per frame ---------------------------------------------------------------------------------


def draw(seed, count=4):
    return np.random.default_rng(seed).standard_normal((count, N))


def call(wrapper, z, known=None, logsnr=LEVEL, dtype=float):
    z = G.rows(z).astype(dtype)
    known = jobs.nothing_known(z.shape, z.dtype) if known is None else known
    level = jnp.broadcast_to(jnp.asarray(logsnr, z.dtype)[None], (len(z), F))
    return G.flat(restored(wrapper, z, level, known))


@jax.jit
def restored(wrapper, z, level, known):
    keys = jax.random.split(jax.random.key(0), len(z))
    return wrapper.wrap(G.denoise_fn, decode)(z, level, known, jnp.zeros_like(z), next_logsnr=level, keys=keys)


def exact(z, seen, y, given=None, values=None, logsnr=LEVEL):
    """E[x | z, y] for whitened rows `seen` and values `y`, and tokens `given` that are exactly `values`."""
    given = np.zeros(N, bool) if given is None else given
    alpha, sigma = (np.repeat(np.asarray(s), N // F) for s in alpha_sigma(jnp.asarray(logsnr)))
    free, out = ~given, np.zeros((len(z), N))
    for b in range(len(z)):
        prior_mean, prior = np.zeros(N), G.covariance
        if given.any():
            out[b, given] = values[b, given]
            prior_mean, prior = G.posterior(given, values[b, given])
        h = np.concatenate([np.diag(alpha / sigma)[free][:, free], seen[:, free]])
        right = np.concatenate([(z[b] / sigma)[free], y[b] - seen[:, given] @ out[b, given]])
        precision = np.linalg.inv(prior)
        out[b, free] = np.linalg.solve(precision + h.T @ h, h.T @ right + precision @ prior_mean)
    return out


def test_solved_to_the_end_it_is_the_exact_posterior_mean_with_a_level_per_frame():
    matrix, noise = MEASUREMENTS["blur"]
    z, y = draw(0), draw(1)
    expected = exact(z, weighted(matrix, noise), y / noise)
    np.testing.assert_allclose(call(restoration(matrix, noise[None], y, END), z), expected, atol=1e-8)
    # A few iterations lie on the way from the plain estimate to it.
    few = np.linalg.norm(call(restoration(matrix, noise[None], y), z) - expected)
    assert few < 0.2 * np.linalg.norm(exact(z, np.zeros((1, N)), np.zeros((4, 1))) - expected)


def test_known_tokens_stay_and_the_others_follow_them_and_the_measurement():
    matrix, noise = MEASUREMENTS["four_times_fewer_pixels"]
    z, y, values = draw(0), draw(1), draw(2)
    given = np.arange(N) % 5 == 0
    mask = jnp.broadcast_to(G.rows(given[None].astype(float)), (4, *G.shape))
    known = Known(G.rows(values), mask, jnp.full((4, F), 30.0))
    z[:, given] = values[:, given]
    out = call(restoration(matrix, noise[None], y, END), z, known)
    np.testing.assert_array_equal(out[:, given], values[:, given])
    expected = exact(z, weighted(matrix, noise)[np.isfinite(noise)], (y / noise)[:, np.isfinite(noise)], given, values)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_clean_frame_is_not_moved():
    matrix, noise = MEASUREMENTS["blur"]
    z, y = draw(0), draw(1)
    clean = call(restoration(matrix, noise[None], y), z, logsnr=[-2.0, np.inf, 3.0])[:, N // F : 2 * N // F]
    np.testing.assert_allclose(clean, z[:, N // F : 2 * N // F], atol=1e-12)


def test_what_is_missing_is_not_read_and_noise_may_differ():
    matrix, _ = MEASUREMENTS["blur"]
    z, y = draw(0), draw(1)
    lost = np.arange(N) % 3 == 0
    some = np.where(lost, np.inf, np.linspace(0.05, 0.5, N))
    broken = np.where(lost, np.nan, y)
    expected = exact(z, weighted(matrix, some)[~lost], (y / some)[:, ~lost])
    np.testing.assert_allclose(call(restoration(matrix, some[None], broken, 60), z), expected, atol=1e-8)
    # One level per sample is that level in all its entries.
    each = np.array([0.05, 0.1, 0.3, np.inf])
    full = call(restoration(matrix, np.broadcast_to(each[:, None], (4, N)), y), z)
    np.testing.assert_allclose(call(restoration(matrix, each, y), z), full, atol=1e-12)
    np.testing.assert_allclose(full[3], exact(z, np.zeros((1, N)), np.zeros((4, 1)))[3], atol=1e-10)


def test_several_measurements_at_once_are_one_long_one():
    (first, noise), (second, _) = MEASUREMENTS["blur"], MEASUREMENTS["half_the_pixels"]
    z, y_first, y_second = draw(0), draw(1), draw(2)

    def both(first, second, video):
        return {"blur": apply_rows(first, video), "few": apply_rows(second, video)}

    wrapper = PosteriorSampling(
        {"blur": jnp.asarray(y_first), "few": jnp.asarray(y_second)},
        jax.tree_util.Partial(both, jnp.asarray(first), jnp.asarray(second)),
        {"blur": 0.05, "few": jnp.full((4,), 0.2)},
    )
    stacked = np.concatenate([noise, np.full(N, 0.2)])
    one = restoration(np.concatenate([first, second]), stacked[None], np.concatenate([y_first, y_second], 1))
    np.testing.assert_allclose(call(wrapper, z), call(one, z), atol=1e-10)


def test_without_pixels_the_measure_sees_the_latents():
    matrix, noise = MEASUREMENTS["blur"]
    z, y = draw(0), draw(1)
    wrapper = dataclasses.replace(restoration(matrix, noise[None], y, END), in_pixels=False)
    np.testing.assert_allclose(call(wrapper, z), exact(z, matrix / noise[:, None], y / noise), atol=1e-7)


@pytest.mark.parametrize("level", [-20.0, -10.0, 0.0, 10.0])
@pytest.mark.parametrize("noise_std", [1e-3, 0.05])
def test_single_precision_is_enough_at_every_level(level, noise_std):
    """sigma^2 / alpha is 150 at the first step of a plan, and 20000 at a level of -20."""
    matrix, _ = MEASUREMENTS["blur"]
    x = draw(3) @ root(G.covariance)
    alpha, sigma = (float(s) for s in alpha_sigma(jnp.asarray(level)))
    z, y = alpha * x + sigma * draw(0), x @ DECODER.T @ matrix.T + noise_std * draw(1)
    double = call(restoration(matrix, noise_std, y), z, logsnr=[level] * F)
    with jax.enable_x64(False):
        single = call(restoration(matrix, noise_std, y), z, logsnr=[level] * F, dtype=np.float32)
    # Eight iterations forget rounding in well-seen directions, and amplify it in those that they have just reached.
    assert np.isfinite(single).all()
    np.testing.assert_allclose(single, double, atol=0.02 * np.abs(double).max())


def test_pure_noise_is_left_to_the_prior():
    matrix, noise = MEASUREMENTS["blur"]
    out = call(restoration(matrix, noise[None], draw(1)), draw(0), logsnr=[-np.inf] * F)
    np.testing.assert_allclose(out, np.zeros((4, N)), atol=1e-12)


# The solver -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="iterations")
def solve(matrices, residual, iterations=12):
    def spread(direction):
        return jnp.einsum("bij,bj->bi", matrices, direction)

    return conjugate_gradients(spread, lambda x: x, residual, iterations)


def plain_conjugate_gradients(matrix, residual, iterations):
    """Hestenes and Stiefel's recurrence."""
    v, direction = np.zeros_like(residual), residual
    for _ in range(iterations):
        image = matrix @ direction
        size = residual @ residual / (direction @ image)
        v, new = v + size * direction, residual - size * image
        direction, residual = new + new @ new / (residual @ residual) * direction, new
    return v


@pytest.mark.parametrize("iterations", [1, 8])
def test_it_takes_the_steps_of_conjugate_gradients_also_in_single_precision(iterations):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    matrix, residual = turn * np.geomspace(1e5, 0.1, 30) @ turn.T, rng.standard_normal(30)
    expected, plain_single = (
        matrix @ plain_conjugate_gradients((np.eye(30) + matrix).astype(kind), residual.astype(kind), iterations)
        for kind in (np.longdouble, np.float32)
    )
    expected = expected.astype(float)
    np.testing.assert_allclose(solve(matrix[None], residual[None], iterations)[0], expected, atol=1e-6)
    single = np.asarray(solve(matrix[None].astype(np.float32), residual[None].astype(np.float32), iterations)[0])
    assert np.abs(single - expected).max() < 2e-3
    assert iterations < 8 or np.abs(plain_single - expected).max() > 0.02  # the recurrence has lost its way


def test_every_sample_is_solved_on_its_own_and_none_can_break_another():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((4, 6, 6))
    matrices = factors @ factors.transpose(0, 2, 1)
    residual = rng.standard_normal((4, 6))
    expected = np.stack([m @ np.linalg.solve(np.eye(6) + m, r) for m, r in zip(matrices, residual)])
    np.testing.assert_allclose(solve(matrices, residual), expected, atol=1e-9)

    residual[1] = 0  # nothing to explain
    matrices[2] = 0  # nothing can be explained
    matrices[3] *= -1  # no covariance at all
    out = solve(matrices, residual)
    np.testing.assert_allclose(out[0], expected[0], atol=1e-9)
    np.testing.assert_array_equal(out[1:], 0)


# The wrapper as data ----------------------------------------------------------------------------------------------


def test_one_forward_pass_per_step_and_no_second_compilation():
    calls = []

    def counted(z, *rest, **named):
        calls.append(z.shape)
        return G.denoise_fn(z, *rest, **named)

    z = G.rows(draw(0))
    level, keys = jnp.zeros((4, F)), jax.random.split(jax.random.key(0), 4)
    known = jobs.nothing_known(z.shape, z.dtype)
    run = jax.jit(lambda w: w.wrap(counted, decode)(z, level, known, jnp.zeros_like(z), next_logsnr=level, keys=keys))
    outs = [run(restoration(MEASUREMENTS[name][0], 0.1 * (i + 1), draw(i))) for i, name in enumerate(MEASUREMENTS)]
    assert calls == [z.shape]
    assert float(jnp.abs(outs[0] - outs[1]).min()) > 0


def test_chi_square_is_the_mean_over_what_is_observed():
    y = np.array([[[1.0, 2.0], [3.0, np.nan]], [[0.0, 0.0], [0.0, 0.0]]])
    std = np.array([[[0.5, 1.0], [2.0, np.inf]]])
    np.testing.assert_allclose(chi_square(y, jnp.zeros((2, 2, 2)), std), [(4 + 4 + 2.25) / 3, 0.0])
    pair = chi_square({"a": y[:, 0], "b": y[:, 1, :1]}, {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 1))}, 1.0)
    np.testing.assert_allclose(pair, [(1 + 4 + 9) / 3, 0.0])


def test_mistakes_are_named():
    matrix, noise = MEASUREMENTS["blur"]
    wrapper = restoration(matrix, noise[None], draw(1))
    with pytest.raises(ValueError, match="needs a decode_fn"):
        wrapper.wrap(G.denoise_fn)
    with pytest.raises(ValueError, match="iterations=0"):
        dataclasses.replace(wrapper, iterations=0).wrap(G.denoise_fn, decode)
    with pytest.raises(ValueError, match=r"observed has shape \(3, 24\)"):
        call(dataclasses.replace(wrapper, observed=draw(1, 3)), draw(0))
    with pytest.raises(ValueError, match=r"noise_std of shape \(4, 2\)"):
        call(dataclasses.replace(wrapper, noise_std=jnp.ones((4, 2))), draw(0))
    with pytest.raises(ValueError, match="give what measure returns"):
        call(dataclasses.replace(wrapper, observed=(draw(1), draw(1))), draw(0))
