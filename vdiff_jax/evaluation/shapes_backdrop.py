"""The scene behind the objects of a shapes clip: background level, texture, weather and camera."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from vdiff_jax.data.shapes_render import NIGHT_GAIN
from vdiff_jax.data.shapes_world import (
    BACKGROUND_LEVEL,
    BACKGROUNDS,
    CAMERAS,
    PAN_LENGTH,
    PAN_VECTORS,
    ShapesWorld,
)
from vdiff_jax.evaluation.shapes_segments import Segments

_LEVEL_TOLERANCE = 0.12
_TEXTURE_STD = 0.022


def _free(segments: Segments) -> np.ndarray:
    """bool [f h w]: pixels that no object and no blurred edge of one reaches."""
    return ndimage.maximum_filter(segments.labels, size=(1, 5, 5)) == 0


def read_backdrop(luminance: np.ndarray, segments: Segments, world: ShapesWorld) -> tuple[str, str, str, bool]:
    """Background, texture and weather words of `luminance` [f h w] in 0..1, and whether the level is a known one."""
    free = _free(segments)
    if free.mean() < 0.1:
        return world.backgrounds[0], world.textures[0], world.weathers[0], False
    light = luminance / segments.gain
    level = float(np.median(light[free]))
    levels = BACKGROUND_LEVEL[[BACKGROUNDS.index(name) for name in world.backgrounds]]
    nearest = int(np.abs(levels - level).argmin())
    plausible = bool(abs(levels[nearest] - level) < _LEVEL_TOLERANCE)
    weather = _read_weather(light, free, level, segments, world)
    texture = world.textures[0]
    if len(world.textures) > 1:
        smooth = ndimage.gaussian_filter(light, (0, 1.2, 1.2))
        low, high = np.quantile(smooth[free], (0.1, 0.5))  # below the median, where neither snow nor rain reaches
        texture = "textured" if (high - low) / 1.28 > _TEXTURE_STD else "plain"
    return world.backgrounds[nearest], texture, weather, plausible


def _read_weather(light: np.ndarray, free: np.ndarray, level: float, segments: Segments, world: ShapesWorld) -> str:
    """Specks or streaks that stand out of the background mean snow or rain."""
    if segments.gain == NIGHT_GAIN:
        return "night"
    if not {"snow", "rain"} & set(world.weathers):
        return world.weathers[0]
    bright = light - ndimage.gaussian_filter(light, (0, 3.0, 3.0))
    bright = ndimage.gaussian_filter(bright, (0, 0.5, 0.5))
    spread = 1.48 * float(np.median(np.abs(bright[free])))
    bright = np.where(free, np.clip(bright, 0.0, None), 0.0)
    speck = bright > max(0.1, 4 * spread)
    if speck.sum() < 0.002 * free.sum():
        return "clear"
    # Streaks run down the image: the pixels some way below a bright one are bright too, those beside it are not.
    strong = np.where(speck, bright, 0.0)
    lag = max(1, round(2 * light.shape[1] / 32))
    along = (strong[:, lag:] * strong[:, :-lag]).sum()
    across = (strong[:, :, lag:] * strong[:, :, :-lag]).sum()
    return "rain" if along - across > 0.1 * (strong**2).sum() else "snow"


def read_camera(
    luminance: np.ndarray, segments: Segments, world: ShapesWorld, stamps: np.ndarray, texture: str
) -> tuple[str, np.ndarray]:
    """Camera word and the shift of the content (x, y) in image sides per frame interval.

    Each known pan is undone by an exact Fourier shift; the right one makes the background stand still.
    """
    still = np.zeros(2)
    if texture != "textured" or set(world.cameras) <= {"static"}:
        return "static", still
    free = _free(segments)
    light = ndimage.gaussian_filter(luminance, (0, 1.0, 1.0))
    middle = np.median(light[free])
    light = np.minimum(np.where(free, light, middle), middle + 0.1)  # snow and rain fall, they do not pan
    margin = light.shape[1] // 8  # the shift wraps around at the edges
    inner = (slice(None), slice(margin, -margin), slice(margin, -margin))
    best, least = "static", np.inf
    for name in world.cameras:
        pan = PAN_VECTORS[CAMERAS.index(name)] * (PAN_LENGTH / world.intervals)
        shift = pan * (stamps - stamps.mean())[:, None]
        undone = _shift_back(light - middle, shift)[inner]
        weight = (_shift_back(free.astype(np.float32), shift)[inner] > 0.7).astype(np.float32)
        total = np.maximum(weight.sum(axis=0), 1.0)
        mean = (weight * undone).sum(axis=0) / total
        change = float((weight * (undone - mean) ** 2).sum() / max(weight.sum(), 1.0))
        if change < least:
            best, least = name, change
    return best, PAN_VECTORS[CAMERAS.index(best)] * (PAN_LENGTH / world.intervals)


def _shift_back(clip: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Moves every frame of `clip` [f h w] back by `shift` [f 2] (x, y), in image sides; wraps around."""
    height, width = clip.shape[1:]
    ky = np.fft.fftfreq(height)[None, :, None] * height
    kx = np.fft.rfftfreq(width)[None, None, :] * width
    turn = np.exp(2j * np.pi * (kx * shift[:, :1, None] + ky * shift[:, 1:, None]))
    return np.fft.irfft2(np.fft.rfft2(clip) * turn, s=(height, width))
