"""How far two clips are apart in style: palette, contrast and local texture, wherever in the frame they are.

Features of a clip are means over all its frames and positions, so a moving clip can be compared with a single image:

    mean, deviation     of every colour channel                                                         3 + 3
    texture             sqrt(mean_p relu(r_i(p)) relu(r_j(p))), i <= j, r = a fixed bank of filters      per scale

The bank is random (seed and size below): for telling textures apart, random filters do about as well as trained ones
(Ustyuzhaninov et al. 2017), and nothing has to be fetched. Its filters have zero mean in every colour channel, so flat
areas of any colour answer 0: what colours an image has is in the first six features, how they meet is in the Gram
matrix (Gatys et al. 2016). The root puts the Gram matrix in the units of the pixels. Each of the three groups is
divided by the root of its size, so that they count alike in `style_distance`.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

SEED, FILTERS, KERNEL, SCALES = 2015, 16, 5, 2
"""The fixed bank: draws of `numpy.random.default_rng(SEED)`, 16 filters of 5 x 5 pixels, at full and half size."""

COLOUR_FEATURES = 6
"""The first of the features: means and deviations, which do not change when pixels change places."""


def style_features(video: np.ndarray) -> np.ndarray:
    """`video [b f h w 3]` (f32 in -1..1, or u8) -> features f64 `[b d]`, see the module.

    Raises:
        ValueError: another shape, or frames smaller than the filters at the coarsest scale.
    """
    video = np.asarray(video)
    least = KERNEL * 2 ** (SCALES - 1)
    if video.ndim != 5 or video.shape[-1] != 3 or min(video.shape[2:4]) < least:
        raise ValueError(f"style features need video [b f h w 3] of at least {least} x {least} pixels: {video.shape}")
    if video.dtype == np.uint8:
        video = video / 127.5 - 1.0
    video = video.astype(np.float64)
    pixels = video.reshape(len(video), -1, 3)
    parts = [pixels.mean(axis=1) / np.sqrt(3), pixels.std(axis=1) / np.sqrt(3)]
    first, second = np.triu_indices(FILTERS)
    for scale in range(SCALES):
        if scale:  # half the size, without aliasing
            video = ndimage.gaussian_filter(video, (0, 0, 0.8, 0.8, 0), mode="nearest")[:, :, ::2, ::2]
        answers = np.maximum(_responses(video), 0.0)
        gram = np.einsum("bpi,bpj->bij", answers, answers) / answers.shape[1]
        parts.append(np.sqrt(gram[:, first, second]) / np.sqrt(SCALES * len(first)))
    return np.concatenate(parts, axis=1)


def style_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[b]` f64: the root of the summed squared differences of the features of two clips, 0 for the same style.

    a, b: video as `style_features` takes it, of any lengths and sizes; a batch of one is compared with each of the
    other. 2 is the distance from black to white. It grows with the change like a distance, not like its square.
    """
    return np.sqrt(np.square(style_features(a) - style_features(b)).sum(axis=1))


@functools.cache
def filter_bank() -> np.ndarray:
    """`[k k 3 n]` f64: fixed random filters of unit norm and zero mean per colour channel, under a Gaussian window."""
    bank = np.random.default_rng(SEED).standard_normal((KERNEL, KERNEL, 3, FILTERS))
    place = np.arange(KERNEL) - KERNEL // 2
    window = np.exp(-(place**2) / (2 * (KERNEL / 4) ** 2))
    window = np.outer(window, window)[:, :, None, None]
    bank = window * bank
    bank -= window * bank.sum(axis=(0, 1)) / window.sum()
    return bank / np.sqrt(np.square(bank).sum(axis=(0, 1, 2)))


def _responses(video: np.ndarray) -> np.ndarray:
    """`[b f h w 3]` -> `[b p n]`: the answers of the bank at every position where a filter fits."""
    windows = np.lib.stride_tricks.sliding_window_view(video, (KERNEL, KERNEL), axis=(2, 3))
    answers = np.einsum("bfyxcij,ijcn->bfyxn", windows, filter_bank(), optimize=True)
    return answers.reshape(len(video), -1, FILTERS)
