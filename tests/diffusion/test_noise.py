"""Noise kinds: moments, correlations over frames, one key per sample."""

import jax
import numpy as np
import pytest

from vdiff_jax.diffusion.noise import NOISE_KINDS, draw_noise

SHAPE = (3, 4, 4, 2)
KEYS = jax.random.split(jax.random.key(0), 2000)


def frame_correlation(noise):
    """Mean product of the same token in two frames, and of two tokens in one frame."""
    other_frame = (noise[:, 0] * noise[:, 1]).mean()
    other_token = (noise[:, :, 0, 0] * noise[:, :, 1, 1]).mean()
    return other_frame, other_token


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_has_unit_variance_and_the_documented_correlation(kind):
    noise = np.asarray(draw_noise(KEYS, SHAPE, kind, correlation=0.3, offset=0.5), np.float64)
    assert noise.shape == (2000, *SHAPE)
    error = 4 / np.sqrt(2000)  # every element has its own 2000 draws; 96 elements
    assert np.abs(noise.mean(0)).max() < error
    assert np.abs(noise.var(0) - 1).max() < 1.5 * error
    expected = {"correlated": (0.3, 0.0), "offset": (0.0, 0.25 / 1.25)}.get(kind, (0.0, 0.0))
    np.testing.assert_allclose(frame_correlation(noise), expected, atol=0.04)
    if kind == "uniform":
        assert np.abs(noise).max() <= np.sqrt(3) + 1e-6


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_a_sample_depends_on_its_own_key_only(kind):
    together = draw_noise(KEYS[:4], SHAPE, kind)
    np.testing.assert_array_equal(draw_noise(KEYS[2:3], SHAPE, kind)[0], together[2])
    assert np.abs(together[2] - together[3]).max() > 0.1


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="noise kind 'pink' is unknown"):
        draw_noise(KEYS[:1], SHAPE, "pink")
