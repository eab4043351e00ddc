"""Coloured objects in the frames of a shapes clip: coverage, connected components and tracks.

Backgrounds of the shapes world are grey, so the opponent plane `q = rgb - mean(rgb)` is zero but on objects. With `p`
the same vector of a palette colour, `<q, p> / |p|^2` is the coverage of a pixel by an object of that colour.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from vdiff_jax.data.shapes_render import NIGHT_GAIN
from vdiff_jax.data.shapes_world import COLOURS, PALETTE, ShapesWorld

SMOOTHING = 0.7
"""Std in pixels of the smoothing before anything is thresholded: noise of std 0.1 would break components up."""
_IN_FRAME = np.zeros((3, 3, 3), bool)
_IN_FRAME[1] = True  # 8 neighbours within a frame, none between frames


@dataclasses.dataclass(frozen=True)
class Segments:
    """Components of one clip, m of them over all frames.

    frame, colour: i64 [m], frame number and index into COLOURS. centre: f64 [m 2], (x, y) in pixels. area: f64 [m],
    soft area in pixels. border: bool [m], touches the image edge. labels: i32 [f h w], 1 + component index in a
    margin of 2 pixels around each component, else 0. cover: f32 [f h w], coverage by the colour of the label.
    gain: brightness, 1 by day and 0.5 at night. tint: chroma of the background, stray: daylight coverage of
    the strongest patch beside the components.
    """

    frame: np.ndarray
    colour: np.ndarray
    centre: np.ndarray
    area: np.ndarray
    border: np.ndarray
    labels: np.ndarray
    cover: np.ndarray
    gain: float
    tint: float
    stray: float

    def per_frame(self) -> np.ndarray:
        """Number of components in every frame: i64 [f]."""
        return np.bincount(self.frame, minlength=len(self.labels))


def to_unit(frames: np.ndarray) -> np.ndarray:
    """u8 frames or f32 video (-1..1), [f h w 3], as f32 in 0..1.

    Raises ValueError for another shape or a clip with non-finite values.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"The reader takes one clip [f h w 3], got the shape {frames.shape}.")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) / 255
    unit = (frames.astype(np.float32) + 1) / 2
    if not np.isfinite(unit).all():
        raise ValueError("The clip holds values that are not finite; check the sampler that made it.")
    return np.clip(unit, 0.0, 1.0)


def segment(unit: np.ndarray, world: ShapesWorld) -> Segments:
    """Finds the components of all colours of `world` in `unit` f32 [f h w 3] in 0..1."""
    opponent = unit - unit.mean(axis=-1, keepdims=True)
    edge = np.concatenate([opponent[:, 0], opponent[:, -1], opponent[:, :, 0], opponent[:, :, -1]], axis=1)
    tint = np.median(edge.reshape(-1, 3), axis=0)
    opponent = ndimage.gaussian_filter(opponent - tint, (0, SMOOTHING, SMOOTHING, 0), truncate=3.0)
    index = np.array([COLOURS.index(colour) for colour in world.colours])
    palette = PALETTE[index] - PALETTE[index].mean(axis=1, keepdims=True)
    norm = np.linalg.norm(palette, axis=1)
    along = opponent @ (palette / norm[:, None]).T
    nearest = along.argmax(axis=-1)
    strength = along.max(axis=-1) / norm[nearest]
    gain = _gain(strength, world)
    cover = along / (norm * gain)
    strength = strength / gain
    labels, colour = _label(strength, nearest, len(index), 8 * (unit.shape[1] / 32) ** 2)
    wide = np.where(labels > 0, labels, ndimage.maximum_filter(labels, size=(1, 5, 5)))
    own = np.append(-1, colour)[wide]
    cover = np.take_along_axis(cover, np.maximum(own, 0)[..., None], axis=-1)[..., 0]
    cover = np.where(wide > 0, cover, 0.0).astype(np.float32)
    outside = ndimage.maximum_filter(wide, size=(1, 3, 3)) == 0
    # Smoothed again and a high quantile, not the maximum: single noisy pixels are no object.
    patch = ndimage.gaussian_filter(np.where(outside, strength, 0.0), (0, 1.2, 1.2), truncate=3.0)
    stray = float(np.quantile(patch, 0.999)) * gain
    return _measure(labels, wide, cover, index[colour], gain, float(np.abs(tint).max()), stray)


def _gain(strength: np.ndarray, world: ShapesWorld) -> float:
    if "night" not in world.weathers:
        return 1.0
    strong = strength[strength > 0.25]
    if strong.size < 8:
        return 1.0
    return NIGHT_GAIN if np.quantile(strong, 0.97) < 0.5 * (1 + NIGHT_GAIN) else 1.0


def _label(
    strength: np.ndarray, nearest: np.ndarray, num_colours: int, least_area: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1..m of components with at least `least_area` pixels, and the colour number of each, [m]."""
    labels, colours, total = np.zeros(strength.shape, np.int32), [], 0
    for colour in range(num_colours):
        mask = (strength > 0.5) & (nearest == colour)
        if mask.sum() < least_area:
            continue
        found = np.zeros(mask.shape, np.int32)
        ndimage.label(mask, structure=_IN_FRAME, output=found)
        large = np.bincount(found.ravel(), minlength=1) >= least_area
        large[0] = False
        number = np.where(large, np.cumsum(large) + total, 0)
        labels += number[found].astype(np.int32)
        total += int(large.sum())
        colours += [colour] * int(large.sum())
    return labels, np.array(colours, np.int64)


def _measure(labels, wide, cover, colour, gain, tint, stray) -> Segments:
    m = len(colour)
    height, width = labels.shape[1:]
    inside = np.flatnonzero(wide.ravel())
    owner, weight = wide.ravel()[inside] - 1, cover.ravel()[inside].astype(np.float64)
    f, y, x = np.unravel_index(inside, wide.shape)
    area = np.maximum(np.bincount(owner, weight, m), 1.0)
    centre = np.stack([np.bincount(owner, weight * x, m) / area, np.bincount(owner, weight * y, m) / area], axis=1)
    frame = np.zeros(m, np.int64)
    frame[owner] = f
    border = np.zeros(m, bool)
    edge = ((x == 0) | (y == 0) | (x == width - 1) | (y == height - 1)) & (labels.ravel()[inside] > 0)
    border[owner[edge]] = True
    return Segments(frame, colour, centre, area, border, wide, cover, gain, tint, stray)


def link(segments: Segments, max_jump: float) -> list[np.ndarray]:
    """Tracks: component indices, one per frame seen, nearest first and of one colour, jumps up to `max_jump` pixels."""
    finished: list[list[int]] = []
    for frame in range(len(segments.labels)):
        fresh = [int(j) for j in np.flatnonzero(segments.frame == frame)]
        pairs = [
            (float(np.hypot(*(segments.centre[track[-1]] - segments.centre[j]))), i, j)
            for i, track in enumerate(finished)
            for j in fresh
            if segments.colour[track[-1]] == segments.colour[j] and segments.frame[track[-1]] < frame
        ]
        taken_track, taken = set(), set()
        for distance, i, j in sorted(pairs):
            if distance <= max_jump and i not in taken_track and j not in taken:
                finished[i].append(j)
                taken_track.add(i)
                taken.add(j)
        finished += [[j] for j in fresh if j not in taken]
    return [np.array(track) for track in finished]
