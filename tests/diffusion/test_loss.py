"""The loss: one noise error whatever the network predicts, weights as their closed forms, known tokens left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.loss import WEIGHTINGS, diffusion_loss, loss_by_bin, stratified_u, weight
from vdiff_jax.diffusion.prediction import KINDS, target, to_eps
from vdiff_jax.diffusion.process import add_noise


def clip(limit=10.0):
    rng = np.random.default_rng(0)
    x, eps, x0_hat = (jnp.asarray(rng.standard_normal((4, 3, 2, 2, 2))) for _ in range(3))
    logsnr = jnp.asarray(rng.uniform(-limit, limit, (4, 3)))
    known = jnp.asarray(rng.integers(0, 2, (4, 3, 2, 2, 1)), x.dtype).at[:, -1, 0, 0].set(0)
    return x, eps, x0_hat, add_noise(x, eps, logsnr), logsnr, known


def losses(kind, x0_hat, data, **settings):
    x, eps, _, z, logsnr, known = data
    implied = (z - jnp.sqrt(jax.nn.sigmoid(logsnr))[:, :, None, None, None] * x0_hat) / jnp.sqrt(
        jax.nn.sigmoid(-logsnr)
    )[:, :, None, None, None]
    return diffusion_loss(target(kind, x0_hat, implied, logsnr), kind, x, eps, z, logsnr, known, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_noise_error_of_its_estimate(kind):
    with jax.enable_x64(True):
        data = clip()
        _, eps, x0_hat, z, logsnr, known = data
        loss, eps_loss, by_frame, unknown = losses(kind, x0_hat, data, weighting="eps")
        squared = np.asarray(jnp.square(to_eps("x0", x0_hat, z, logsnr) - eps)).mean(-1)
        for b in range(4):
            expected = squared[b][np.asarray(known[b, ..., 0]) == 0].mean()
            np.testing.assert_allclose([loss[b], eps_loss[b]], expected, rtol=1e-5)
        free = np.asarray(known[..., 0]) == 0
        np.testing.assert_allclose(unknown, free.mean((2, 3)))
        expected = (squared * free).sum((2, 3)) / np.maximum(free.sum((2, 3)), 1)
        np.testing.assert_allclose(by_frame, expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_the_weighted_noise_error_in_every_kind(weighting):
    with jax.enable_x64(True):
        data = clip()
        _, eps, x0_hat, z, logsnr, known = data
        w = np.asarray(weight(weighting, logsnr))[:, :, None, None]
        squared = w * np.asarray(jnp.square(to_eps("x0", x0_hat, z, logsnr) - eps)).mean(-1)
        expected = [squared[b][np.asarray(known[b, ..., 0]) == 0].mean() for b in range(4)]
        for kind in KINDS:
            np.testing.assert_allclose(losses(kind, x0_hat, data, weighting=weighting)[0], expected, rtol=1e-5)


def test_weights_are_their_closed_forms():
    lam = np.linspace(-10, 10, 41)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-lam)), 1 / np.sqrt(1 + np.exp(lam))
    expected = {
        "eps": np.ones_like(lam),
        "x0": np.exp(-lam),
        "v": 1 / alpha**2,
        "flow": (alpha + sigma) ** 2 / alpha**2,
        "min_snr": np.minimum(np.exp(lam), 3.0) / np.exp(lam),
        "sigmoid": 1 / (1 + np.exp(lam - 1.5)),
    }
    for name in WEIGHTINGS:
        got = weight(name, jnp.asarray(lam, jnp.float32), bias=1.5, gamma=3.0)
        np.testing.assert_allclose(got, expected[name], rtol=2e-5)


def test_the_natural_weight_of_a_kind_is_its_plain_squared_error():
    data = clip()
    x, eps, x0_hat, z, logsnr, _ = data
    nothing = jnp.zeros_like(data[5])
    for kind, weighting in (("eps", "eps"), ("x0", "x0"), ("v", "v"), ("velocity", "flow")):
        prediction = x0_hat
        loss = diffusion_loss(prediction, kind, x, eps, z, logsnr, nothing, weighting=weighting).loss
        plain = jnp.square(prediction - target(kind, x, eps, logsnr)).mean((1, 2, 3, 4))
        np.testing.assert_allclose(loss, plain, rtol=1e-5)


def test_channel_weights_move_the_loss_and_leave_the_noise_error():
    data = clip()
    x, eps, _, z, logsnr, known = data
    wrong = jnp.zeros_like(eps).at[..., 1].set(0.5)
    plain, plain_eps, *_ = diffusion_loss(eps + wrong, "eps", x, eps, z, logsnr, known, weighting="eps")
    np.testing.assert_allclose(plain, 0.125, rtol=1e-5)
    for weights, expected in (([1.0, 1.0], 0.125), ([0.5, 1.5], 0.1875), ([2.0, 0.0], 0.0)):
        loss, eps_loss, *_ = diffusion_loss(
            eps + wrong, "eps", x, eps, z, logsnr, known, weighting="eps", channel_weights=jnp.asarray(weights)
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(eps_loss, plain_eps)


def test_single_precision_is_stable_at_the_ends_and_at_pure_noise():
    x, eps, x0_hat, _, _, _ = clip()
    nothing = jnp.zeros((4, 3, 2, 2, 1))
    for level in (-10.0, 10.0, -np.inf):
        logsnr = jnp.full((4, 3), level)
        z = add_noise(x, eps, logsnr)
        for kind in ("x0", "v", "velocity"):
            for weighting in WEIGHTINGS:
                measured = diffusion_loss(x0_hat, kind, x, eps, z, logsnr, nothing, weighting=weighting)
                assert all(np.isfinite(value).all() for value in measured), (level, kind, weighting)
    logsnr = jnp.full((4, 3), -jnp.inf)
    loss, eps_loss, *_ = diffusion_loss(x0_hat, "v", x, eps, eps, logsnr, nothing, weighting="v")
    np.testing.assert_allclose(loss, jnp.square(x0_hat + x).mean((1, 2, 3, 4)), rtol=1e-4)  # v is -x there
    assert float(eps_loss.max()) < 1e-6


def test_known_tokens_take_no_part_in_value_or_gradient():
    x, eps, x0_hat, z, logsnr, known = clip()

    def total(prediction):
        return diffusion_loss(prediction, "v", x, eps, z, logsnr, known)[0].sum()

    gradient = jax.grad(total)(x0_hat)
    unknown = np.broadcast_to(known == 0, x.shape)
    assert np.abs(np.where(unknown, 0, gradient)).max() == 0
    assert np.abs(gradient[unknown]).min() > 0
    np.testing.assert_array_equal(total(jnp.where(known == 1, 1e3, x0_hat)), total(x0_hat))


def test_stratified_levels_fill_every_stratum_once():
    for seed in range(5):
        u = np.sort(np.asarray(stratified_u(jax.random.key(seed), 16)))
        assert u.min() >= 0 and u.max() < 1
        np.testing.assert_array_equal(np.floor(u * 16), np.arange(16))
        np.testing.assert_allclose(np.diff(u), 1 / 16, atol=1e-6)


def test_bins_sum_to_what_went_in():
    logsnr = np.random.default_rng(0).uniform(-12, 12, 50).astype(np.float32)
    values = np.abs(logsnr) + 1
    edges = np.linspace(-10, 10, 6)
    total, count = loss_by_bin(jnp.asarray(logsnr), jnp.asarray(values), jnp.asarray(edges, jnp.float32))
    inside = np.clip(logsnr, -9.99, 9.99)
    np.testing.assert_array_equal(count, np.histogram(inside, edges)[0])
    np.testing.assert_allclose(total, np.histogram(inside, edges, weights=values)[0], rtol=1e-5)
    half = np.where(np.arange(50) % 2, 0.5, 0.0).astype(np.float32)
    total, count = loss_by_bin(*map(jnp.asarray, (logsnr, values)), jnp.asarray(edges, jnp.float32), jnp.asarray(half))
    np.testing.assert_allclose(count, np.histogram(inside, edges, weights=half)[0])
    np.testing.assert_allclose(total, np.histogram(inside, edges, weights=half * values)[0], rtol=1e-5)


def test_mistakes_are_named():
    x, eps, x0_hat, z, logsnr, known = clip()
    with pytest.raises(ValueError, match="weighting 'snr' is unknown"):
        diffusion_loss(x0_hat, "v", x, eps, z, logsnr, known, weighting="snr")
    with pytest.raises(ValueError, match="a network keeps the shape"):
        diffusion_loss(x0_hat[:, :2], "v", x, eps, z, logsnr, known)
