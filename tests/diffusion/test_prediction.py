"""Prediction kinds: each target means the same clean latent and noise; there and back over all pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.prediction import KINDS, check_kind, convert, target, to_eps, to_x0, x0_to_eps, x0_to_score
from vdiff_jax.diffusion.process import add_noise

PAIRS = list(itertools.permutations(KINDS, 2))


def clip(limit, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, eps = (jnp.asarray(rng.standard_normal((3, 8, 2, 2, 2)), dtype) for _ in range(2))
    logsnr = jnp.asarray(np.linspace(-limit, limit, 24).reshape(3, 8), dtype)
    return x, eps, add_noise(x, eps, logsnr), logsnr


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_in_every_kind_gives_back_x_and_eps(kind):
    with jax.enable_x64(True):
        x, eps, z, logsnr = clip(10, np.float64)
        prediction = target(kind, x, eps, logsnr)
        np.testing.assert_allclose(to_x0(kind, prediction, z, logsnr), x, atol=1e-12)
        np.testing.assert_allclose(to_eps(kind, prediction, z, logsnr), eps, atol=1e-12)


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_conversions_return_in_single_precision(source, to):
    _, eps, z, logsnr = clip(7)  # beyond, x0 <-> eps loses digits by its nature: sigma / alpha exceeds 33
    there = convert(eps, source, to, z, logsnr)
    assert float(jnp.abs(there - eps).max()) > 0.1
    # An error in the middle may be amplified by at most sigma / alpha on the way back: compare at that scale.
    scale = float(jnp.maximum(jnp.abs(there).max(), 1))
    np.testing.assert_allclose(convert(there, to, source, z, logsnr), eps, atol=1e-5 * scale)


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_conversions_return_in_double_precision_at_every_training_level(source, to):
    with jax.enable_x64(True):
        _, eps, z, logsnr = clip(10, np.float64)
        np.testing.assert_allclose(convert(convert(eps, source, to, z, logsnr), to, source, z, logsnr), eps, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density():
    # For x ~ N(0, 4): z ~ N(0, 4 alpha^2 + sigma^2), and the exact denoiser is linear.
    with jax.enable_x64(True):
        logsnr = 0.7
        alpha2 = float(jax.nn.sigmoid(logsnr))
        variance = 4 * alpha2 + 1 - alpha2
        z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 1, 1, 3)))
        x0_hat = 4 * np.sqrt(alpha2) / variance * z
        np.testing.assert_allclose(x0_to_score(x0_hat, z, logsnr), -z / variance, atol=1e-12)
        np.testing.assert_allclose(x0_to_eps(x0_hat, z, logsnr), np.sqrt(1 - alpha2) * z / variance, atol=1e-12)


@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_pure_noise_has_a_clean_estimate_in_all_kinds_but_eps(kind):
    x, eps, _, _ = clip(1)
    z = add_noise(x, eps, -jnp.inf)
    np.testing.assert_array_equal(z, eps)
    np.testing.assert_allclose(to_x0(kind, target(kind, x, eps, -jnp.inf), z, -jnp.inf), x, atol=1e-6)
    check_kind(kind, -np.inf)


def test_eps_at_pure_noise_is_refused_and_finite():
    with pytest.raises(ValueError, match="eps-prediction has no clean estimate"):
        check_kind("eps", -np.inf)
    check_kind("eps", -10.0)
    _, eps, _, _ = clip(1)
    assert np.isfinite(to_x0("eps", eps * 0.9, eps, -jnp.inf)).all()
    with pytest.raises(ValueError, match="'epsilon' is unknown"):
        check_kind("epsilon", -10.0)
