"""Classical restoration without a model: where a learned one starts, and what it has to beat. In numpy and scipy.

All take video f32 [b f h w c] in about -1..1, return the same and work on every clip alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

LUMA = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue in BT.709 luma."""


def bicubic_upsample(video: np.ndarray, factor: int) -> np.ndarray:
    """Height and width times `factor`, by Keys' cubic with a = -1/2 (Pillow's BICUBIC)."""
    video = _video(video)
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1.")
    rows, columns = (_cubic_matrix(size, factor) for size in video.shape[2:4])
    return np.einsum("yh,xw,bfhwc->bfyxc", rows, columns, video, optimize=True).astype(np.float32)


def _cubic_matrix(size: int, factor: int) -> np.ndarray:
    """[size * factor, size]; weights beyond the border are dropped, and the others rescaled to sum to 1."""
    centre = (np.arange(size * factor) + 0.5) / factor - 0.5
    d = np.abs(centre[:, None] - np.arange(size))
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def median_denoise(video: np.ndarray, size: int = 3) -> np.ndarray:
    """Median over size x size x size neighbours in time and space, borders mirrored."""
    return ndimage.median_filter(_video(video), size=(1, size, size, size, 1), mode="reflect").astype(np.float32)


def fill_missing(video: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Missing pixels by the median of the observed ones among their 3 x 3 x 3 neighbours, from the rim inwards.

    Pixels filled in one round count as observed in the next. Observed pixels are returned as they are.

    Args:
        observed: [f h w] or [b f h w 1], 1 = observed.
    Raises:
        ValueError: a clip in which nothing is observed.
    """
    video = _video(video)
    observed = np.asarray(observed, bool)
    observed = np.broadcast_to(observed[None, ..., None] if observed.ndim == 3 else observed, (*video.shape[:4], 1))
    if not observed.any(axis=(1, 2, 3, 4)).all():
        raise ValueError("a clip in which no pixel is observed cannot be filled.")
    filled = np.where(observed, video, np.nan)
    while np.isnan(filled).any():
        padded = np.pad(filled, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3), axis=(1, 2, 3))
        rim = np.isnan(filled) & ~np.isnan(windows).all(axis=(5, 6, 7))
        filled[rim] = np.nanmedian(windows[rim].reshape(-1, 27), axis=1)
    return filled.astype(np.float32)


def wiener_deconvolve(video: np.ndarray, kernel: np.ndarray, noise_std: float) -> np.ndarray:
    """Wiener filter of every frame for a blur by `kernel` and white noise.

    The frame is mirrored to twice its size, so that it is periodic; for a symmetric kernel this is the blur of
    `editing.degradations`, exactly. The picture's own power is taken as A / |frequency|^2, its mean aside, with A
    such that it adds up to the variance of the frame (noise taken off).

    Args:
        kernel: [kh kw] of odd sizes. noise_std: of the blurred video, above 0.
    """
    video, kernel = _video(video).astype(np.float64), np.asarray(kernel, np.float64)
    if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"blur kernel of shape {kernel.shape} must be [kh kw] of odd sizes.")
    if not noise_std > 0:
        raise ValueError(f"noise_std={noise_std} must be above 0.")
    h, w = video.shape[2:4]
    doubled = np.pad(video, ((0, 0), (0, 0), (0, h), (0, w), (0, 0)), mode="symmetric")
    response = _response(kernel, (2 * h, 2 * w))[:, :, None]

    square = np.fft.fftfreq(2 * h)[:, None] ** 2 + np.fft.fftfreq(2 * w)[None] ** 2
    shape = np.where(square > 0, 1 / np.where(square > 0, square, 1), 0)[:, :, None]
    variance = doubled.var(axis=(2, 3), keepdims=True) - noise_std**2
    blurred_share = (shape * np.abs(response) ** 2).mean()
    power = np.maximum(variance, 1e-8) / blurred_share * shape
    power[:, :, 0, 0] = np.inf  # the mean is kept

    gain = np.conj(response) / (np.abs(response) ** 2 + noise_std**2 / power)
    restored = np.fft.ifft2(gain * np.fft.fft2(doubled, axes=(2, 3)), axes=(2, 3)).real
    return restored[:, :, :h, :w].astype(np.float32)


def _response(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Transfer function of a centred kernel on a periodic grid, [*size] complex; a kernel may be larger than it."""
    grid = np.zeros(size)
    rows, columns = (np.arange(n) - n // 2 for n in kernel.shape)
    np.add.at(grid, (rows[:, None] % size[0], columns[None] % size[1]), kernel)
    return np.fft.fft2(grid)


def unsharp(video: np.ndarray, std_px: float, amount: float = 1.0) -> np.ndarray:
    """video + amount * (video - Gaussian blur of it), borders mirrored."""
    video = _video(video)
    blurred = ndimage.gaussian_filter(video, (0, 0, std_px, std_px, 0), mode="reflect")
    return (video + amount * (video - blurred)).astype(np.float32)


def repeat_frames(kept: np.ndarray, frames: Sequence[int] | np.ndarray, num_frames: int) -> np.ndarray:
    """Every missing frame by the last kept one before it (the first kept one at the start).

    kept: video [b k h w c] of the frames at the ascending indices `frames`.
    """
    frames = _kept(kept, frames, num_frames)
    last = np.searchsorted(frames, np.arange(num_frames), side="right") - 1
    return _video(kept)[:, np.maximum(last, 0)]


def blend_frames(kept: np.ndarray, frames: Sequence[int] | np.ndarray, num_frames: int) -> np.ndarray:
    """Missing frames by linear interpolation in time; the ends repeat the nearest kept one. Arguments as above."""
    frames = _kept(kept, frames, num_frames)
    place = np.interp(np.arange(num_frames), frames, np.arange(len(frames)))
    before = np.floor(place).astype(int)
    after = np.minimum(before + 1, len(frames) - 1)
    share = (place - before)[None, :, None, None, None]
    kept = _video(kept)
    return ((1 - share) * kept[:, before] + share * kept[:, after]).astype(np.float32)


def gray_copy(luma: np.ndarray) -> np.ndarray:
    """Luma [b f h w 1] as all three channels."""
    return np.repeat(_one_channel(luma), 3, axis=-1)


def tint(luma: np.ndarray, angle: float) -> np.ndarray:
    """Luma [b f h w 1] in -1..1 coloured by one hue, all luma kept.

    angle: of the hue in radians; 0 is red, a third of the circle green. Bright parts are coloured nearly as strongly as
    the range of values allows, dark ones hardly, as dark parts of pictures mostly are.
    """
    brightness = np.clip((_one_channel(luma) + 1) / 2, 0.0, 1.0)
    colour = np.cos(angle) * np.array([1.0, -0.5, -0.5]) + np.sin(angle) * np.sqrt(0.75) * np.array([0.0, 1.0, -1.0])
    colour = colour - colour @ LUMA
    room = np.where(colour > 0, 1 - brightness, brightness) / np.abs(colour).clip(1e-6)
    strength = 0.9 * np.minimum(1.0, brightness / 0.45) ** 2 * room.min(axis=-1, keepdims=True)
    return (2 * (brightness + strength * colour) - 1).astype(np.float32)


def _one_channel(luma: np.ndarray) -> np.ndarray:
    luma = _video(luma)
    if luma.shape[-1] != 1:
        raise ValueError(f"luma must be [b f h w 1], got {luma.shape}.")
    return luma


def _video(video: np.ndarray) -> np.ndarray:
    video = np.asarray(video, np.float32)
    if video.ndim != 5:
        raise ValueError(f"video must be [b f h w c], got {video.shape}.")
    return video


def _kept(kept: np.ndarray, frames: Sequence[int] | np.ndarray, num_frames: int) -> np.ndarray:
    frames = np.asarray(frames, int)
    inside = frames.size and frames.min() >= 0 and frames.max() < num_frames
    if not inside or (np.diff(frames) <= 0).any() or len(frames) != np.shape(kept)[1]:
        raise ValueError(
            f"frames {frames.tolist()} must be ascending indices below {num_frames}, one per frame of {np.shape(kept)}."
        )
    return frames
