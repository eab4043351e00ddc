"""Metrics of images, clips and feature distributions, in numpy and float64."""

from __future__ import annotations

import numpy as np
from scipy import linalg, ndimage


def psnr(a: np.ndarray, b: np.ndarray, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio 10 log10(range^2 / mse) in dB over all elements; infinite for equal arrays.

    data_range: 2 for video in -1..1, 255 for u8 frames. Raises ValueError for different shapes.
    """
    a, b = _pair(a, b)
    mse = float(((a - b) ** 2).mean())
    return float("inf") if mse == 0 else 10 * float(np.log10(data_range**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray, data_range: float = 2.0) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of std 1.5 over 11 pixels, mean over [... h w c].

    The statistics are those of the window's weights (biased variances), over windows that lie inside the image.
    Raises ValueError for different shapes or images smaller than the window.
    """
    a, b = _pair(a, b)
    if a.ndim < 3 or min(a.shape[-3:-1]) < 11:
        raise ValueError(f"ssim needs images [... h w c] of at least 11 x 11 pixels, got {a.shape}.")

    def window(x: np.ndarray) -> np.ndarray:
        sigma = [0.0] * (x.ndim - 3) + [1.5, 1.5, 0.0]
        return ndimage.gaussian_filter(x, sigma, truncate=3.34)[..., 5:-5, 5:-5, :]  # radius 5: 11 pixels

    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return float((luminance * structure).mean())


def feature_moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d d] of features [n d], n >= 2."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Feature moments need [n d] with n >= 2, got {features.shape}.")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def gaussian_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Frechet distance between two Gaussians: |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The symmetric form needs only eigenvalues of positive matrices, so it stays real and exact for singular ones.
    """
    values, vectors = linalg.eigh(np.asarray(covariance_a, np.float64))
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = root @ np.asarray(covariance_b, np.float64) @ root
    shared = np.sqrt(np.clip(linalg.eigvalsh(0.5 * (product + product.T)), 0.0, None)).sum()
    gap = float(((np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)) ** 2).sum())
    return max(gap + float(np.trace(covariance_a) + np.trace(covariance_b)) - 2 * float(shared), 0.0)


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features [n d] and [m d] (FID, FVD; Heusel et al. 2017).

    Raises ValueError for different feature widths or fewer than 2 samples.
    """
    if np.shape(features_a)[-1] != np.shape(features_b)[-1]:
        raise ValueError(f"Feature widths differ: {np.shape(features_a)[-1]} and {np.shape(features_b)[-1]}.")
    return gaussian_distance(*feature_moments(features_a), *feature_moments(features_b))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"The two clips have different shapes: {a.shape} and {b.shape}.")
    return a, b
