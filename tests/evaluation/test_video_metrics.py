"""Metrics against closed forms and independent computation."""

import numpy as np
import pytest
from scipy import linalg

from vdiff_jax.evaluation.metrics import frechet_distance, gaussian_distance, psnr, ssim
from vdiff_jax.evaluation.shapes_scores import flicker_ratio, psnr_outside

rng = np.random.default_rng(0)


def test_psnr_of_a_known_error():
    a = rng.uniform(-1, 1, (3, 8, 8, 3))
    assert psnr(a, a + 0.02) == pytest.approx(40.0)
    assert psnr(255 * a, 255 * a + 255.0, data_range=255) == pytest.approx(0.0, abs=1e-9)
    assert psnr(a, a) == float("inf")
    with pytest.raises(ValueError, match="different shapes"):
        psnr(a, a[:1])


def slow_ssim(a, b):
    """One window at a time, from the definition."""
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(line, line) / line.sum() ** 2
    c1, c2 = 0.02**2, 0.06**2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            cov = (weight * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_is_its_definition():
    a, b = rng.uniform(-1, 1, (2, 16, 18))
    assert ssim(a[..., None], b[..., None]) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    pair = np.stack([a, b])[..., None]
    assert ssim(pair, pair[::-1]) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    assert ssim(pair, pair) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a[:8, :, None], b[:8, :, None])


def test_frechet_distance_of_gaussians():
    diagonal_a, diagonal_b = rng.uniform(0.1, 2, (2, 6))
    mean_a, mean_b = rng.normal(size=(2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(diagonal_a) - np.sqrt(diagonal_b)) ** 2).sum()
    assert gaussian_distance(mean_a, np.diag(diagonal_a), mean_b, np.diag(diagonal_b)) == pytest.approx(expected)
    roots = rng.normal(size=(2, 6, 6))
    a, b = roots[0] @ roots[0].T, roots[1] @ roots[1].T
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert gaussian_distance(mean_a, a, mean_a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_features():
    features = rng.normal(size=(400, 5)).astype(np.float32)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(20.0, rel=1e-5)
    centred = features.astype(np.float64) - features.mean(axis=0)
    expected = np.trace(np.cov(centred, rowvar=False))  # the same shape three times as wide: (3 - 1)^2 tr C
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * expected, rel=1e-6)
    few = features[:3]  # a singular covariance stays finite
    assert np.isfinite(frechet_distance(few, features))
    with pytest.raises(ValueError, match="widths"):
        frechet_distance(features, features[:, :3])


def test_psnr_outside_sees_only_what_lies_outside_the_widened_mask():
    truth = rng.uniform(-1, 1, (2, 16, 16, 3))
    mask = np.zeros((2, 16, 16, 1))
    mask[:, 6:9, 6:9] = 1
    video = truth.copy()
    video[:, 4:11, 4:11] += 0.5
    assert psnr_outside(video, truth, mask, margin=2) == float("inf")
    assert psnr_outside(video, truth, mask, margin=1) < 30
    video[:, 0] += 0.1
    outside = 16 * 16 - 49
    assert psnr_outside(video, truth, mask) == pytest.approx(10 * np.log10(4 / (0.01 * 16 / outside)))
    with pytest.raises(ValueError, match="whole clip"):
        psnr_outside(video, truth, np.ones_like(mask))


def test_flicker_ratio_of_a_parabola_and_of_noise():
    time = np.arange(8.0)[:, None, None, None]
    truth = np.broadcast_to(time**2, (8, 4, 4, 3))
    assert flicker_ratio(2 * truth, truth) == pytest.approx(4.0)
    assert flicker_ratio(truth + 5 * time, truth) == pytest.approx(1.0)  # linear motion adds nothing
    assert flicker_ratio(truth + np.where(time % 2 == 0, 1, -1), truth) > 1.5
