"""The process: scales at all levels, the three families, broadcasting of levels."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.process import add_noise, alpha_sigma, expand, from_vp, to_vp, token_logsnr

LEVELS = np.linspace(-30, 30, 61)


@pytest.mark.parametrize(
    ("process", "constraint"),
    [("vp", lambda a, s: a**2 + s**2), ("flow", lambda a, s: a + s), ("edm", lambda a, s: a)],
)
def test_scales_have_the_level_and_the_family_s_constraint(process, constraint):
    alpha, sigma = (np.asarray(value, np.float64) for value in alpha_sigma(jnp.asarray(LEVELS, jnp.float32), process))
    np.testing.assert_allclose(2 * np.log(alpha / sigma), LEVELS, atol=2e-5)
    np.testing.assert_allclose(constraint(alpha, sigma), 1, atol=1e-6)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_infinite_levels_are_exact(process):
    alpha, sigma = alpha_sigma(jnp.array([-jnp.inf, jnp.inf]), process)
    np.testing.assert_array_equal(alpha, [0, 1])
    np.testing.assert_array_equal(sigma, [1, 0])


def test_edm_stays_finite_at_infinite_levels():
    _, sigma = alpha_sigma(jnp.array([-jnp.inf, jnp.inf]), "edm")
    assert np.isfinite(sigma).all() and sigma[0] > 1e8 and sigma[1] < 1e-8


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_a_family_s_z_rescaled_is_the_variance_preserving_one(process):
    rng = np.random.default_rng(0)
    x, eps = (jnp.asarray(rng.standard_normal((2, 5, 1, 1, 3)), jnp.float32) for _ in range(2))
    logsnr = jnp.asarray(rng.uniform(-10, 10, (2, 5)), jnp.float32)
    z = add_noise(x, eps, logsnr, process)
    np.testing.assert_allclose(to_vp(z, logsnr, process), add_noise(x, eps, logsnr), atol=2e-6)
    np.testing.assert_allclose(from_vp(to_vp(z, logsnr, process), logsnr, process), z, rtol=1e-5)


def test_every_form_of_a_level_broadcasts():
    x = jnp.ones((2, 3, 4, 5, 6))
    eps = jnp.zeros_like(x)
    frames = jnp.asarray(np.random.default_rng(0).uniform(-5, 5, (2, 3)), jnp.float32)
    alpha, _ = alpha_sigma(frames)
    for b in range(2):
        for f in range(3):
            np.testing.assert_allclose(add_noise(x, eps, frames)[b, f], alpha[b, f], rtol=1e-6)
    tokens = jnp.broadcast_to(expand(frames, x), (2, 3, 4, 5, 1))
    np.testing.assert_array_equal(add_noise(x, eps, tokens), add_noise(x, eps, frames))
    clips = jnp.broadcast_to(frames[:, :1], (2, 3))
    np.testing.assert_array_equal(add_noise(x, eps, frames[:, 0]), add_noise(x, eps, clips))
    np.testing.assert_array_equal(add_noise(x, eps, 1.5), add_noise(x, eps, jnp.full((2, 3), 1.5)))


def test_token_levels_follow_the_mask():
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (1, 2, 3, 3, 1)), jnp.float32)
    levels = token_logsnr(jnp.array([[-1.0, -2.0]]), mask, jnp.array([[7.0, 8.0]]))
    for f in range(2):
        np.testing.assert_array_equal(levels[0, f], np.where(mask[0, f] == 1, 7.0 + f, -1.0 - f))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="process 've' is unknown"):
        alpha_sigma(jnp.zeros(1), "ve")
    with pytest.raises(ValueError, match="does not fit latents"):
        expand(jnp.zeros((3, 2)), jnp.zeros((2, 3, 1, 1, 1)))
