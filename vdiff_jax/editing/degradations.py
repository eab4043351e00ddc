"""What happened to a clip before it reached us: differentiable maps from video to measurement, for restoration.

    y = degradation(video) + noise,        video f32 [b f h w 3] in -1..1

A `Degradation` is a pytree, so one compiled function takes others of the same kind and shapes as data. All are linear
but `quantize`. Blurs mirror the picture at its border with the edge pixel repeated, `d c b a | a b c d | d c b a`
(scipy's "reflect", numpy's "symmetric"), so that a flat picture stays flat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax.editing import classical
from vdiff_jax.editing.classical import LUMA
from vdiff_jax.editing.inpaint import fill_hole
from vdiff_jax.types import Array, Video, static, struct

DOWNSAMPLE_KINDS = ("area", "bicubic")


def _unchanged(video: Video) -> Array:
    return video


@struct
class Degradation:
    """A differentiable map `degradation(video f32 [b f h w 3]) -> y`, as data: `apply(video, *settings, *parameters)`.

    parameters: arrays or pytrees of them, traced. apply, guess: functions of a module, not made for the call, or every
    new one compiles again. settings: hashable numbers that decide shapes. name: for messages and provenance.
    guess: classical answers, `guess(y, noise_std, num_frames, *settings, *parameters) -> videos` in numpy.
    """

    parameters: tuple[Any, ...] = ()
    apply: Callable[..., Any] = static(_unchanged)
    settings: tuple[Any, ...] = static(())
    name: str = static("identity")
    guess: Callable[..., list[np.ndarray]] | None = static(None)

    def __call__(self, video: Video) -> Any:
        return self.apply(video, *self.settings, *self.parameters)

    def first_guesses(self, observed: Any, noise_std: Any, num_frames: int) -> list[np.ndarray]:
        """Videos f32 `[b num_frames h w 3]` to start from, each the answer of a classical method.

        Several where the measurement leaves open what no method can tell, as `grayscale` does hue; none where `guess`
        is None. noise_std: of the measurement in -1..1, scalar or of its shape, inf = not observed.
        """
        if self.guess is None:
            return []
        y, noise_std = np.asarray(observed, np.float32), np.asarray(noise_std, np.float32)
        if np.isinf(noise_std).any():
            y = fill_hole(y, np.max(np.isinf(np.broadcast_to(noise_std, y.shape)), axis=-1))
        return self.guess(y, noise_std, num_frames, *self.settings, *self.parameters)


def identity() -> Degradation:
    """y = video: only noise is to be removed."""
    return Degradation(guess=_cleaned)


def _cleaned(y: np.ndarray, noise_std: Any, num_frames: int) -> list[np.ndarray]:
    """Strong noise smoothed."""
    return [classical.median_denoise(y) if _smallest(noise_std) > 0.05 else y]


def _smallest(noise_std: Any) -> float:
    return float(max(np.min(noise_std), 1e-3))


def from_function(
    function: Callable[..., Any],
    *parameters: Any,
    name: str = "function",
    guess: Callable[..., list[np.ndarray]] | None = None,
) -> Degradation:
    """The user's own: `function(video, *parameters)`, made of JAX operations with derivatives of both modes.

    Parameters are traced. y of sample i may depend on video i only. guess: see `Degradation`; without one the clip that
    is restored is the first guess.
    """
    return Degradation(parameters, function, (), name, guess)


def compose(first: Degradation, then: Degradation) -> Degradation:
    """`then(first(video))`."""
    guess = None if first.guess is None or then.guess is None else _guess_back
    return Degradation((first, then), _compose, (), f"{first.name}, {then.name}", guess)


def _compose(video: Video, first: Degradation, then: Degradation) -> Any:
    return then(first(video))


def _guess_back(y: Any, noise_std: Any, num_frames: int, first: Degradation, then: Degradation) -> list[np.ndarray]:
    """One after another; what `first` left has the noise of y, spread over all of it."""
    left = len(_kept_indices(first.settings[0], num_frames)) if first.apply is _keep_frames else num_frames
    seen, rest = then.first_guesses(y, noise_std, left), _smallest(noise_std)
    return [guess for video in seen for guess in first.first_guesses(video, rest, num_frames)]


# Resolution -------------------------------------------------------------------------------------------------------


def downsample(factor: int, kind: str = "area") -> Degradation:
    """Height and width divided by `factor`, y `[b f h/factor w/factor 3]`.

    kind: "area" (mean of factor x factor pixels) or "bicubic" (Keys' cubic with a = -1/2, widened by the factor so
    that nothing aliases, weights renormalised at the border: Pillow's BICUBIC).

    Raises:
        ValueError: factor below 1 or an unknown kind; when applied, a size that factor does not divide.
    """
    _at_least("factor", factor, 1)
    if kind not in DOWNSAMPLE_KINDS:
        raise ValueError(f"downsampling kind {kind!r} is unknown; use one of {', '.join(DOWNSAMPLE_KINDS)}.")
    return Degradation((), _downsample, (int(factor), kind), f"downsample x{factor} {kind}", _enlarged)


def _enlarged(y: np.ndarray, noise_std: Any, num_frames: int, factor: int, kind: str) -> list[np.ndarray]:
    return [classical.bicubic_upsample(y, factor)]


def _downsample(video: Video, factor: int, kind: str) -> Array:
    b, f, h, w, c = video.shape
    if h % factor or w % factor:
        raise ValueError(f"video of {h} x {w} cannot be downsampled by {factor}; crop it to a multiple.")
    if kind == "area":
        return jnp.mean(video.reshape(b, f, h // factor, factor, w // factor, factor, c), axis=(3, 5))
    return jax.image.resize(video, (b, f, h // factor, w // factor, c), "cubic", antialias=True)


def mosaic(block: int) -> Degradation:
    """Every block x block pixels replaced by their mean, y of the video's shape; blocks at the border may be smaller.

    The pixels of a block count as separate measurements. Where they share one error, as by rounding, give `block` times
    its standard deviation.
    """
    _at_least("block", block, 1)
    return Degradation((), _mosaic, (int(block),), f"mosaic {block}", _smoothed)


def _smoothed(y: np.ndarray, noise_std: Any, num_frames: int, block: int) -> list[np.ndarray]:
    return [np.asarray(ndimage.gaussian_filter(y, (0, 0, block / 3, block / 3, 0), mode="reflect"))]


def _mosaic(video: Video, block: int) -> Array:
    def averaging(size: int) -> Array:
        index = np.arange(size) // block
        same = index[:, None] == index[None]
        return jnp.asarray(same / same.sum(axis=1, keepdims=True), video.dtype)

    rows, columns = averaging(video.shape[2]), averaging(video.shape[3])
    return jnp.einsum("yh,xw,bfhwc->bfyxc", rows, columns, video, precision="highest")


# Blur -------------------------------------------------------------------------------------------------------------


def gaussian_blur(std_px: float) -> Degradation:
    """Gaussian blur of every frame; the kernel ends at 4 standard deviations. Border: see the module."""
    if not std_px > 0:
        raise ValueError(f"std_px={std_px} of a blur must be above 0.")
    reach = np.arange(-int(4 * std_px + 0.5), int(4 * std_px + 0.5) + 1)
    line = np.exp(-0.5 * (reach / std_px) ** 2)
    line = jnp.asarray(line / line.sum(), jnp.float32)
    return Degradation((line[:, None], line[None]), _blur, (), f"gaussian blur {std_px:g}", _sharpened)


def motion_blur(length: float, angle: float) -> Degradation:
    """Blur of every frame along a line of `length` pixels at `angle` degrees, counter-clockwise from pointing right.

    Each point of the line is shared by the four pixels around it. Border: see the module.
    """
    kernel = jnp.asarray(motion_kernel(length, angle))
    return Degradation((kernel,), _blur, (), f"motion blur {length:g} at {angle:g}", _sharpened)


def _sharpened(y: np.ndarray, noise_std: Any, num_frames: int, *kernels: Array) -> list[np.ndarray]:
    kernel = functools.reduce(np.multiply, [np.asarray(kernel) for kernel in kernels])  # a column times a row
    return [classical.wiener_deconvolve(y, kernel, _smallest(noise_std))]


def motion_kernel(length: float, angle: float) -> np.ndarray:
    """f32 [2r+1 2r+1], summing to 1: a line through the middle, its points spread bilinearly.

    Raises:
        ValueError: length below 1.
    """
    _at_least("length", length, 1)
    reach = int(np.ceil((length - 1) / 2))
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, 8 * (2 * reach + 1))
    y, x = -np.sin(np.deg2rad(angle)) * along, np.cos(np.deg2rad(angle)) * along
    grid = np.arange(-reach, reach + 1)
    rows = np.maximum(1 - np.abs(y[:, None] - grid), 0)
    columns = np.maximum(1 - np.abs(x[:, None] - grid), 0)
    kernel = rows.T @ columns
    return (kernel / kernel.sum()).astype(np.float32)


def _blur(video: Video, *kernels: Array) -> Array:
    """Convolution of every frame and channel with kernels [kh kw] of odd sizes, one after another."""
    b, f, h, w, c = video.shape
    planes = jnp.moveaxis(video, 4, 2).reshape(b * f * c, 1, h, w)
    for kernel in kernels:
        reach_y, reach_x = kernel.shape[0] // 2, kernel.shape[1] // 2
        planes = jnp.pad(planes, ((0, 0), (0, 0), (reach_y, reach_y), (reach_x, reach_x)), mode="symmetric")
        flipped = kernel[None, None, ::-1, ::-1].astype(video.dtype)  # XLA's convolution is a correlation
        planes = jax.lax.conv(planes, flipped, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(planes.reshape(b, f, c, h, w), 2, 4)


# Missing parts ----------------------------------------------------------------------------------------------------


def mask_pixels(mask: Any) -> Degradation:
    """Only some pixels are seen, y = video * mask; the others read 0 (mid-grey).

    mask: `[f h w]` or `[b f h w 1]`, bool or 0..1, 1 = observed. Mind: a user-facing mask, white = change this, is one
    minus this.

    Raises:
        ValueError: a mask of another number of axes.
    """
    return Degradation((_pixel_mask(mask),), _seen_through, (), "mask", _filled)


def _filled(y: np.ndarray, noise_std: Any, num_frames: int, mask: Array) -> list[np.ndarray]:
    return [fill_hole(y, 1.0 - np.broadcast_to(np.asarray(mask), (*y.shape[:4], 1))[..., 0])]


def _seen_through(video: Video, mask: Array) -> Array:
    return video * mask


def _pixel_mask(mask: Any) -> Array:
    mask = jnp.asarray(mask, jnp.float32)
    if mask.ndim == 3:
        mask = mask[None, ..., None]
    if mask.ndim != 5 or mask.shape[-1] != 1:
        raise ValueError(f"mask of shape {mask.shape} must be [f h w] or [b f h w 1], 1 where the video is observed.")
    return mask


def block_mask(shape: Sequence[int], block: int, missing: float, seed: int = 0) -> Degradation:
    """Lost blocks, as of a broken transmission: in every frame the share `missing` of them, drawn anew.

    shape: (f, h, w) of the video. Blocks at the lower and right border may be smaller. y = video * mask as for
    `mask_pixels`.

    Raises:
        ValueError: a share outside 0..1 or a block below 1.
    """
    _at_least("block", block, 1)
    if not 0 <= missing <= 1:
        raise ValueError(f"missing={missing} is a share of the blocks and must lie in 0..1.")
    f, h, w = shape
    rows, columns = -(-h // block), -(-w // block)
    rng = np.random.default_rng(seed)
    lost = np.arange(rows * columns) < round(missing * rows * columns)
    observed = ~np.stack([rng.permutation(lost) for _ in range(f)]).reshape(f, rows, columns)
    mask = observed.repeat(block, axis=1).repeat(block, axis=2)[:, :h, :w]
    return Degradation((_pixel_mask(mask),), _seen_through, (), f"blocks of {block} missing", _filled)


def keep_frames(frames: Sequence[int] | np.ndarray) -> Degradation:
    """Only some frames are seen, y `[b k h w 3]`.

    frames: their indices in order (negative from the end), or a bool vector `[f]`.

    Raises:
        ValueError: no frames; when applied, an index outside the clip or a bool vector of another length.
    """
    chosen = np.asarray(frames)
    if chosen.ndim != 1 or not chosen.size or (chosen.dtype == np.bool_ and not chosen.any()):
        raise ValueError(
            f"frames {chosen.tolist()} must be a list of indices or a bool vector with at least one frame."
        )
    return Degradation((), _keep_frames, (tuple(chosen.tolist()),), "some frames", _blended)


def _blended(
    y: np.ndarray, noise_std: Any, num_frames: int, frames: tuple[int, ...] | tuple[bool, ...]
) -> list[np.ndarray]:
    kept, order = np.unique(_kept_indices(frames, num_frames), return_index=True)
    return [classical.blend_frames(y[:, order], kept, num_frames)]


def _keep_frames(video: Video, frames: tuple[int, ...] | tuple[bool, ...]) -> Array:
    return video[:, _kept_indices(frames, video.shape[1])]


def _kept_indices(frames: tuple[int, ...] | tuple[bool, ...], num_frames: int) -> np.ndarray:
    chosen = np.asarray(frames)
    if chosen.dtype == np.bool_:
        if len(chosen) != num_frames:
            raise ValueError(f"the bool vector of kept frames has {len(chosen)} entries; the clip has {num_frames}.")
        chosen = np.flatnonzero(chosen)
    if chosen.min() < -num_frames or chosen.max() >= num_frames:
        raise ValueError(f"kept frames {chosen.tolist()} lie outside a clip of {num_frames} frames.")
    return chosen % num_frames


# Colour and depth -------------------------------------------------------------------------------------------------


def grayscale() -> Degradation:
    """BT.709 luma of the gamma-coded values, y `[b f h w 1]`; a gray clip's is the gray itself."""
    return Degradation((), _grayscale, (), "grayscale", _tinted)


HUES = 24
"""First guesses of a grey clip, one for each of so many hues."""


def _tinted(y: np.ndarray, noise_std: Any, num_frames: int) -> list[np.ndarray]:
    return [classical.tint(y, 2 * np.pi * number / HUES) for number in range(HUES)]


def _grayscale(video: Video) -> Array:
    return jnp.sum(video * jnp.asarray(LUMA, video.dtype)[None, None, None, None], axis=-1, keepdims=True)


def quantize(levels: int) -> Degradation:
    """Rounding to `levels` equally spaced values from -1 to 1; the derivative is taken as one (straight through).

    Its error is about uniform: a fitting noise_std is 2 / (levels - 1) / sqrt(12).

    Raises:
        ValueError: fewer than 2 levels.
    """
    _at_least("levels", levels, 2)
    return Degradation((jnp.float32(levels - 1),), _quantize, (), f"quantize {levels}", _as_seen)


def _as_seen(y: np.ndarray, noise_std: Any, num_frames: int, intervals: Array) -> list[np.ndarray]:
    return [y]


def _quantize(video: Video, steps: Array) -> Array:
    steps = steps.astype(video.dtype)
    rounded = jnp.round((jnp.clip(video, -1, 1) + 1) * steps / 2) * 2 / steps - 1
    return video + jax.lax.stop_gradient(rounded - video)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}={value} must be at least {least}.")
