"""Guidance against closed forms on Gaussian clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo, root

from vdiff_jax.diffusion.prediction import KINDS, convert
from vdiff_jax.diffusion.process import alpha_sigma
from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.guidance import classifier_free, gradient_guidance, make_denoise_fn, tweedie_covariance
from vdiff_jax.sampling.samplers import SAMPLERS, sample
from vdiff_jax.types import Job, Known

G = GaussianVideo((3, 1, 2, 1))
N, F, B = G.size, 3, 4
KEYS = jax.random.split(jax.random.key(0), B)
LEVEL = np.tile([-2.0, 0.5, 3.0], (B, 1))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def draw(seed):
    return G.rows(np.random.default_rng(seed).standard_normal((B, N)))


def some_known(latents):
    mask = np.zeros((B, *G.shape[:3], 1))
    mask[:, 0], mask[:, 1, 0, 1] = 1, 1
    return Known(latents, jnp.asarray(mask), jnp.full((B, F), 10.0))


def call(denoise_fn, z, cond, known=None, logsnr=LEVEL):
    known = jobs.nothing_known(z.shape, z.dtype) if known is None else known
    logsnr = jnp.asarray(logsnr)
    return denoise_fn(z, logsnr, known, cond, next_logsnr=logsnr, keys=KEYS)


def test_classifier_free_is_the_formula_in_one_doubled_batch():
    z, cond, uncond = draw(0), draw(1), draw(2)
    batches = []

    def watched(z, *rest, **named):
        batches.append(z.shape[0])
        return G.denoise_fn(z, *rest, **named)

    expected = call(G.denoise_fn, z, uncond) + 3.5 * (call(G.denoise_fn, z, cond) - call(G.denoise_fn, z, uncond))
    np.testing.assert_allclose(call(classifier_free(watched, uncond, 3.5), z, cond), expected, atol=1e-12)
    assert batches == [2 * B]
    scales = jnp.array([1.0, 2.0, 3.5, 0.0])
    each = call(classifier_free(G.denoise_fn, uncond, scales), z, cond)
    np.testing.assert_allclose(each[2], expected[2], atol=1e-12)
    np.testing.assert_allclose(each[3], call(G.denoise_fn, z, uncond)[3], atol=1e-12)


def test_guided_gaussians_have_the_extrapolated_mean():
    # For p(x | c) = N(mean_c, K) the guided field is that of N(mean_0 + w (mean_c - mean_0), K), which is then the law.
    mean, scale = np.random.default_rng(0).standard_normal(N), 3.0
    start = np.concatenate([np.zeros((1, N)), root(G.noisy_covariance(-10.0))])
    rows = len(start)
    cond = jnp.broadcast_to(G.rows(mean[None]), (rows, *G.shape))
    guided = classifier_free(G.denoise_fn, jnp.zeros_like(cond), scale)
    plan = jobs.uniform_plan(LinearLogSNR(), 60, rows, F)
    job = Job(G.rows(start), plan, jobs.nothing_known(cond.shape, cond.dtype), cond)
    keys = jax.random.split(jax.random.key(0), rows)
    out = G.flat(jax.jit(lambda job: sample(guided, job, SAMPLERS["unipc"], keys))(job))
    # The start is centred at 0 and not at alpha * mean, alpha = .0067 at -10.
    np.testing.assert_allclose(out[0], scale * mean, atol=0.1)
    spread = out[1:] - out[0]
    np.testing.assert_allclose(spread.T @ spread, G.covariance, atol=0.01)


def test_scale_one_is_off_exactly_and_the_interval_is_kept():
    z, cond, uncond = draw(0), draw(1), draw(2)

    def denoise_fn(z, logsnr, known, cond, **_):
        return jnp.tanh(0.7 * z + cond)  # element by element: the same bits in a batch of any size

    plain = call(denoise_fn, z, cond)
    np.testing.assert_array_equal(call(classifier_free(denoise_fn, uncond, 1.0), z, cond), plain)
    np.testing.assert_array_equal(call(classifier_free(denoise_fn, uncond, 1.0, rescale=0.7), z, cond), plain)
    inside = call(classifier_free(denoise_fn, uncond, 4.0, interval=(-1.0, 1.0)), z, cond)
    np.testing.assert_array_equal(inside[:, [0, 2]], plain[:, [0, 2]])
    full = call(classifier_free(denoise_fn, uncond, 4.0), z, cond)
    np.testing.assert_allclose(inside[:, 1], full[:, 1], atol=1e-12)
    assert float(jnp.abs(inside[:, 1] - plain[:, 1]).min()) > 1e-3


def test_known_tokens_are_untouched_by_guidance():
    z, cond, uncond, given = draw(0), draw(1), draw(2), draw(3)
    known = some_known(given)
    for rescale in (0.0, 0.7):
        out = call(classifier_free(G.denoise_fn, uncond, 6.0, rescale=rescale), z, cond, known)
        np.testing.assert_array_equal(out[:, 0], given[:, 0])
        np.testing.assert_array_equal(out[:, 1, 0, 1], given[:, 1, 0, 1])


def test_full_rescale_gives_the_conditional_deviation_over_unknown_tokens():
    z, cond, uncond = draw(0), draw(1), draw(2)
    known = some_known(draw(3))
    unknown = np.broadcast_to(np.asarray(known.mask) == 0, z.shape)
    plain = np.asarray(call(G.denoise_fn, z, cond, known))
    out = np.asarray(call(classifier_free(G.denoise_fn, uncond, 6.0, rescale=1.0), z, cond, known))
    for b in range(B):
        assert out[b][unknown[b]].std() == pytest.approx(plain[b][unknown[b]].std(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_any_kind_becomes_the_same_denoiser(kind):
    def predict_fn(params, z, logsnr, known_mask, context_logsnr, cond):
        known = Known(params["given"], known_mask, context_logsnr)
        x0_hat = G.denoise_fn(z, logsnr, known, cond, next_logsnr=logsnr, keys=KEYS)
        return convert(x0_hat, "x0", kind, z, logsnr)

    z, cond, given = draw(0), draw(1), draw(3)
    known = some_known(given)
    out = call(make_denoise_fn(predict_fn, {"given": given}, kind), z, cond, known)
    expected = jnp.where(known.mask == 1, given, call(G.denoise_fn, z, cond, known))
    np.testing.assert_allclose(out, expected, atol=1e-10)


def observation_posterior(z, cond, y, weights, noise):
    """E[x | z, y] for y = weights x + noise, by conditioning the joint Gaussian on both."""
    alpha, sigma = (np.repeat(np.asarray(s), N // F, axis=1) for s in alpha_sigma(jnp.asarray(LEVEL)))
    out = np.zeros((B, N))
    for b in range(B):
        h = np.concatenate([np.diag(alpha[b]), weights])
        r = np.diag(np.concatenate([sigma[b] ** 2, np.full(len(weights), noise**2)]))
        gain = G.covariance @ h.T @ np.linalg.inv(h @ G.covariance @ h.T + r)
        mean = G.flat(cond)[b]
        out[b] = mean + gain @ (np.concatenate([G.flat(z)[b], y[b]]) - h @ mean)
    return out


def test_gradient_guidance_with_the_exact_likelihood_is_the_exact_posterior():
    rng = np.random.default_rng(5)
    z, cond, noise = draw(0), draw(1), 0.3
    weights, y = rng.standard_normal((2, N)), rng.standard_normal((B, 2))
    level = jnp.asarray(LEVEL)
    known = jobs.nothing_known(z.shape, z.dtype)
    _, covariance = tweedie_covariance(G.denoise_fn, z, level, known, cond, next_logsnr=level, keys=KEYS)
    # y given z is Gaussian: mean W x0_hat, covariance W Cov[x | z] W^T + noise^2, the same for every sample.
    columns = np.stack([G.flat(covariance(jnp.broadcast_to(G.rows(w[None]), z.shape)))[0] for w in weights], axis=1)
    inverse = jnp.asarray(np.linalg.inv(weights @ columns + noise**2 * np.eye(2)))

    def log_prob(x0_hat, logsnr):
        residual = jnp.asarray(y) - x0_hat.reshape(B, N) @ jnp.asarray(weights).T
        return -0.5 * jnp.sum(residual @ inverse * residual, axis=1)

    out = call(gradient_guidance(G.denoise_fn, log_prob), z, cond)
    np.testing.assert_allclose(G.flat(out), observation_posterior(z, cond, y, weights, noise), atol=1e-9)


def test_tweedie_covariance_is_the_posterior_s_and_vanishes_at_known_tokens():
    z, level = draw(0), jnp.asarray(LEVEL)
    known = jobs.nothing_known(z.shape, z.dtype)
    x0_hat, covariance = tweedie_covariance(G.denoise_fn, z, level, known, draw(1), next_logsnr=level, keys=KEYS)
    np.testing.assert_allclose(x0_hat, call(G.denoise_fn, z, draw(1)), atol=1e-12)
    alpha, sigma = (np.repeat(np.asarray(s)[0], N // F) for s in alpha_sigma(level))
    exact = np.linalg.inv(np.linalg.inv(G.covariance) + np.diag((alpha / sigma) ** 2))
    direction = draw(7)
    np.testing.assert_allclose(G.flat(covariance(direction)), G.flat(direction) @ exact, atol=1e-10)
    _, covariance = tweedie_covariance(
        G.denoise_fn, z, level, some_known(draw(3)), draw(1), next_logsnr=level, keys=KEYS
    )
    assert float(jnp.abs(covariance(direction)[:, 0]).max()) == 0


def test_changing_scale_interval_or_rescale_does_not_compile_again():
    z, cond, uncond = draw(0), draw(1), draw(2)
    run = jax.jit(
        lambda scale, low, high, rescale: call(
            classifier_free(G.denoise_fn, uncond, scale, (low, high), rescale), z, cond
        )
    )
    first, second = run(2.0, -1.0, 4.0, 0.0), run(5.0, -6.0, 2.0, 0.5)
    assert run._cache_size() == 1
    assert float(jnp.abs(first - second).max()) > 1e-3


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'noise' is unknown"):
        make_denoise_fn(lambda *_: None, {}, "noise")  # pyright: ignore[reportArgumentType]
