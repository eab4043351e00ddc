"""Exact effects on the pixels of one clip: colour, disc blur, size. No model, numpy on the host.

Frames u8 go to f32 in 0..1, are changed, and are rounded once (halves to even, clipped). The values are the coded ones
of the file (gamma is not undone), as in most editors. An effect that changes nothing returns equal frames exactly.
Every effect keeps fps, sound and metadata, and adds its own text to the list `metadata["effects"]`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec

import numpy as np

from vdiff_jax.data.transforms import resize_frames
from vdiff_jax.data.video_io import Clip, Limits

BT709_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
_P = ParamSpec("_P")


def recorded(function: Callable[_P, Clip]) -> Callable[_P, Clip]:
    """Decorator of effects: the result has the first clip's metadata with `name=arguments` added to its "effects".

    Numbers are written as they are, other clips as "clip" and masks as "mask".
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def effect(*args: _P.args, **kwargs: _P.kwargs) -> Clip:
        result = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        listed = [value if isinstance(value, (list, tuple)) else [value] for value in bound.arguments.values()]
        first, *others = [value for values in listed for value in values]
        texts = [_as_text(value) for value in others if value is not None]
        return noted(result, first, "=".join([function.__name__, *([",".join(texts)] if texts else [])]))

    return effect


def noted(result: Clip, source: Clip, text: str) -> Clip:
    """`result` with the metadata of `source` and one more entry in its list of effects."""
    before = source.metadata.get("effects", [])
    before = before if isinstance(before, list) else [before]
    return dataclasses.replace(result, metadata={**source.metadata, "effects": [*before, text]})


def _as_text(value: object) -> str:
    if isinstance(value, Clip):
        return "clip"
    return "mask" if isinstance(value, np.ndarray) else f"{value:.10g}"


def check_range(effect: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high (NaN fails)."""
    if not low <= value <= high:
        raise ValueError(f"{effect}: {name} must be {low:g}..{high:g}, got {value}")


def to_levels(image: np.ndarray) -> np.ndarray:
    """f32 in 0..1 of any shape -> u8, clipped and rounded: the one rounding of an effect."""
    return np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)


def to_unit(frames: np.ndarray) -> np.ndarray:
    """u8 of any shape -> f32 in 0..1."""
    return frames.astype(np.float32) / np.float32(255)


def masks_like(effect: str, mask: np.ndarray | None, clip: Clip) -> np.ndarray:
    """A mask in 0..1, [h w] or [f h w], as f32 [f h w] of the clip's size; None is white everywhere.

    Raises ValueError for another shape or range.
    """
    f, h, w = clip.frames.shape[:3]
    mask = np.ones((h, w), np.float32) if mask is None else np.asarray(mask)
    if mask.shape not in ((h, w), (f, h, w)):
        raise ValueError(f"{effect}: the mask must be {h} x {w} or {f} x {h} x {w} as the frames are, got {mask.shape}")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"{effect}: a mask holds 0..1, got {mask.min()}..{mask.max()}; divide 8-bit levels by 255")
    return np.broadcast_to(mask.astype(np.float32), (f, h, w))


def _by_level(clip: Clip, curve: Callable[[np.ndarray], np.ndarray]) -> Clip:
    """One curve 0..1 -> 0..1 for all pixels and channels, as a table of the 256 levels."""
    table = to_levels(curve(to_unit(np.arange(256, dtype=np.uint8))))
    return dataclasses.replace(clip, frames=table[clip.frames])


def _by_image(clip: Clip, change: Callable[[np.ndarray], np.ndarray]) -> Clip:
    """One function f32 [h w 3] -> [h w 3], frame by frame, so that only one frame is held as floats."""
    return dataclasses.replace(clip, frames=np.stack([to_levels(change(to_unit(image))) for image in clip.frames]))


# ---- colour -----------------------------------------------------------------------------------------------------


@recorded
def brightness(clip: Clip, amount: float) -> Clip:
    """Add amount (-1..1, 1 = black to white) to every pixel."""
    check_range("brightness", "amount", amount, -1, 1)
    return _by_level(clip, lambda x: x + np.float32(amount))


@recorded
def contrast(clip: Clip, factor: float) -> Clip:
    """Multiply the distance from mid grey (0.5) by factor; 1 = unchanged, 0 = all grey."""
    check_range("contrast", "factor", factor, 0, 1000)
    return _by_level(clip, lambda x: (x - np.float32(0.5)) * np.float32(factor) + np.float32(0.5))


@recorded
def gamma(clip: Clip, value: float) -> Clip:
    """Raise every pixel to 1 / value; above 1 the middle tones get brighter, black and white stay."""
    check_range("gamma", "value", value, 0.01, 100)
    return _by_level(clip, lambda x: x ** np.float32(1 / value))


@recorded
def invert(clip: Clip) -> Clip:
    """The negative: 255 minus every level."""
    return _by_level(clip, lambda x: 1 - x)


@recorded
def grayscale(clip: Clip) -> Clip:
    """Every pixel becomes its BT.709 luma in all three channels."""
    return _by_image(clip, lambda x: np.repeat((x @ BT709_LUMA)[..., None], 3, axis=2))


@recorded
def saturation(clip: Clip, factor: float) -> Clip:
    """Multiply the distance from the pixel's own BT.709 luma by factor; 1 = unchanged, 0 = grey."""
    check_range("saturation", "factor", factor, 0, 1000)

    def change(x: np.ndarray) -> np.ndarray:
        luma = (x @ BT709_LUMA)[..., None]
        return luma + np.float32(factor) * (x - luma)

    return _by_image(clip, change)


@recorded
def hue(clip: Clip, degrees: float) -> Clip:
    """Turn all colours round the colour circle by degrees (120 = red to green); greys and luma stay.

    A colour is its BT.709 luma and two opponent coordinates, `r - (g + b) / 2` and `sqrt(3) / 2 (g - b)`; the latter
    are rotated. A turned colour outside the range of the screen gets paler, at its luma and hue, until it fits.
    """
    check_range("hue", "degrees", degrees, -36_000, 36_000)
    angle = math.radians(degrees % 360)
    opponent = np.array([[0.2126, 0.7152, 0.0722], [1, -0.5, -0.5], [0, math.sqrt(0.75), -math.sqrt(0.75)]])
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
    )  # fmt: skip
    matrix = (np.linalg.inv(opponent) @ turn @ opponent).T.astype(np.float32)

    def change(x: np.ndarray) -> np.ndarray:
        luma = (x @ BT709_LUMA)[..., None]
        chroma = x @ matrix - luma
        room = np.where(chroma > 0, 1 - luma, luma) / np.maximum(np.abs(chroma), np.float32(1e-6))
        return luma + chroma * np.minimum(room.min(-1, keepdims=True), 1)

    return _by_image(clip, change)


# ---- blur -------------------------------------------------------------------------------------------------------


@recorded
def lens_blur(clip: Clip, radius: float, mask: np.ndarray | None = None) -> Clip:
    """Out of focus: each point spreads over a disc of radius pixels; with a mask only where it is white.

    mask: 0..1, [h w] or [f h w]. The blurred part is a normalised convolution, `blur(mask x) / blur(mask)`, so the
    sharp part and the world beyond the border do not bleed into it; grey mixes blurred and sharp.
    """
    check_range("lens_blur", "radius", radius, 0, max(clip.frames.shape[1:3]))
    masks, kernel = masks_like("lens_blur", mask, clip), disc(radius)
    h, w = (_fast_length(length + len(kernel) - 1) for length in clip.frames.shape[1:3])
    spectrum = np.fft.rfft2(kernel, (h, w))

    def spread(planes: np.ndarray) -> np.ndarray:
        """Convolution of [c h w] with the disc, zeros outside; in f64, because faint masks are divided by."""
        reach, size = len(kernel) // 2, planes.shape[1:]
        whole = np.fft.irfft2(np.fft.rfft2(planes.astype(np.float64), (h, w)) * spectrum, (h, w))
        return whole[:, reach : reach + size[0], reach : reach + size[1]]

    frames = []
    for image, white in zip(map(to_unit, clip.frames), masks):
        summed = spread(np.concatenate([np.moveaxis(image * white[..., None], -1, 0), white[None]]))
        soft = np.moveaxis(summed[:3] / np.maximum(summed[3], 1e-12), 0, -1).astype(np.float32)
        frames.append(to_levels(image + white[..., None] * (soft - image)))
    return dataclasses.replace(clip, frames=np.stack(frames))


def disc(radius: float) -> np.ndarray:
    """f64 [k k], k odd: the share of each pixel that a centred disc of `radius` pixels covers, with sum 1."""
    reach = max(0, math.ceil(radius - 0.5))
    edges = np.arange(-reach, reach + 1) - 0.5
    columns = edges[:, None] + (np.arange(64) + 0.5) / 64  # 64 lines in each column of pixels
    half = np.sqrt(np.maximum(radius**2 - columns**2, 0))  # the disc reaches from -half to half on that line
    below, above = np.maximum(edges[:, None, None], -half), np.minimum(edges[:, None, None] + 1, half)
    covered = np.maximum(above - below, 0).mean(-1)
    return covered / covered.sum() if covered.sum() else np.ones((1, 1))


def _fast_length(length: int) -> int:
    """The next number that is a product of 2, 3 and 5, fast to transform."""
    while 2**40 * 3**25 * 5**17 % length:
        length += 1
    return length


# ---- size -------------------------------------------------------------------------------------------------------


@recorded
def resize(clip: Clip, height_or_scale: float, width: int | None = None) -> Clip:
    """Stretch to height, width in pixels, or with one number by that scale; Lanczos, without aliasing."""
    h, w = clip.frames.shape[1:3]
    if width is None:
        check_range("resize", "scale", height_or_scale, 0.001, 1000)
        new_h, new_w = max(1, round(h * height_or_scale)), max(1, round(w * height_or_scale))
    else:
        new_h, new_w = int(height_or_scale), int(width)
        if (new_h, new_w) != (height_or_scale, width) or min(new_h, new_w) < 1:
            raise ValueError(f"resize: need whole pixels from 1 on, got height={height_or_scale:g}, width={width:g}")
    limits = Limits()
    if new_h * new_w > limits.max_pixels or clip.num_frames * new_h * new_w * 3 > limits.max_bytes:
        raise ValueError(f"resize: {clip.num_frames} frames of {new_h} x {new_w} are too large; choose a smaller size")
    return dataclasses.replace(clip, frames=resize_frames(clip.frames, new_h, new_w))


@recorded
def crop(clip: Clip, x: int, y: int, height: int, width: int) -> Clip:
    """Keep height x width pixels whose top left corner is column x, row y."""
    h, w = clip.frames.shape[1:3]
    if min(x, y) < 0 or min(height, width) < 1 or y + height > h or x + width > w:
        raise ValueError(f"crop: {height} x {width} pixels at x={x}, y={y} do not lie inside frames of {h} x {w}")
    return dataclasses.replace(clip, frames=clip.frames[:, y : y + height, x : x + width].copy())
