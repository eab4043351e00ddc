"""The reader: what does a shapes clip show? Measured with fixed arithmetic, nothing learned.

Components of the opponent plane are linked to tracks; a template match over rotations and blurs names the shape; the
soft area gives the size; line fits of the track, of the log radius and of the angular moment give the motion. A clip
that does not show crisp, lasting objects is unreadable and scores zero, so that blurry mush never earns a point.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from vdiff_jax.data.shapes_render import UNIT_AREA
from vdiff_jax.data.shapes_world import (
    ANGLES,
    COLLISION_LENGTH,
    COLOURS,
    DIRECTIONS,
    GROWTH_LOG,
    PATH_LENGTH,
    RADIUS,
    SIZES,
    SPIN_ANGLE,
    ShapesWorld,
)
from vdiff_jax.evaluation.shapes_backdrop import read_backdrop, read_camera
from vdiff_jax.evaluation.shapes_segments import SMOOTHING, Segments, link, segment, to_unit
from vdiff_jax.evaluation.shapes_templates import SYMMETRY, grid, soft_iou, templates

_EXTRA_BLUR = (0.0, 0.75, 1.2, 1.7, 2.4)  # px at 32 pixels a side, blur of the clip itself
_LARGEST_BLUR = 1.5
_GRID_BLUR = 0.45  # px, from pixel area and resampling
_LEAST_IOU = 0.5
_LARGEST_AREA_JUMP = 1.5
_LARGEST_STRAY = 0.28
_LARGEST_TINT = 0.08


@dataclasses.dataclass(frozen=True)
class ObjectReading:
    """One object. Words as in `shapes.attributes`; `direction`, `speed` and `target` are None where they do not apply.

    track: f64 [f 2], centre (x, y) in pixels, NaN where it was not seen. radius: in units of the image side. iou: mean
    template match. identity: share of its frames in which the frame alone shows the same shape. velocity: (x, y) in
    image sides per frame interval, relative to the background.
    """

    colour: str
    shape: str
    size: str
    motion: str
    direction: str | None
    speed: str | None
    target: str | None
    track: np.ndarray
    radius: float
    iou: float
    identity: float
    velocity: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows. `readable` is False where `reason` says why not; then the other fields are not to be used."""

    objects: tuple[ObjectReading, ...]
    background: str
    texture: str
    weather: str
    camera: str
    readable: bool
    reason: str = ""


def read(frames: np.ndarray, world: ShapesWorld, times: np.ndarray | None = None) -> Reading:
    """Reads one clip: u8 frames or f32 video (-1..1), [f h w 3].

    world: which values to expect (held-out shapes are found if the world names them) and what "slow" means.
    times: time stamps f32 [f] in native frame intervals, default 0, 1, 2, ...
    Raises ValueError for clips of another shape or with non-finite values.
    """
    unit = to_unit(frames)
    stamps = np.arange(len(unit), dtype=np.float64) if times is None else np.asarray(times, np.float64)
    if stamps.shape != (len(unit),):
        raise ValueError(f"times must hold one stamp per frame, got {stamps.shape} for {len(unit)} frames.")
    side = unit.shape[1]
    segments = segment(unit, world)
    luminance = unit.mean(axis=-1)
    background, texture, weather, plausible = read_backdrop(luminance, segments, world)
    camera, pan = read_camera(luminance, segments, world, stamps, texture)
    tracks = [track for track in link(segments, 0.35 * side) if len(track) >= len(unit) / 2]
    reason = _scene_problem(segments, len(tracks), plausible)
    objects = []
    for track in tracks:
        item, problem = _read_object(segments, track, world, stamps, pan, side)
        objects.append(item)
        reason = reason or problem
    objects = _read_collision(objects, stamps, world, pan, side)
    return Reading(tuple(objects), background, texture, weather, camera, not reason, reason)


def read_batch(video: np.ndarray, world: ShapesWorld, times: np.ndarray | None = None) -> list[Reading]:
    """Reads clips [b f h w 3] (u8 or -1..1), `times` [b f] or None."""
    stamps = [None] * len(video) if times is None else list(np.asarray(times))
    return [read(clip, world, stamp) for clip, stamp in zip(np.asarray(video), stamps, strict=True)]


def _scene_problem(segments: Segments, count: int, plausible: bool) -> str:
    frames = len(segments.labels)
    if segments.tint > _LARGEST_TINT:
        return "the background is coloured"
    if not plausible:
        return "the background is none of the known ones"
    if (segments.per_frame() != count).sum() > frames // 8:
        return "the number of objects changes"
    if segments.stray > _LARGEST_STRAY:
        return "there is a faint or blurred patch beside the objects"
    return ""


def _read_object(
    segments: Segments, track: np.ndarray, world: ShapesWorld, stamps: np.ndarray, pan: np.ndarray, side: int
) -> tuple[ObjectReading, str]:
    """One object and why it is unreadable ("" if it is not)."""
    whole = track[~segments.border[track]]
    if len(whole) < max(2, len(track) // 3):  # cut off most of the time: better the cut frames than none
        whole = track
    cover = _crops(segments, whole)
    shape, iou, identity, blur = _read_shape(cover, segments.area[whole], world, side)
    radius = np.sqrt(segments.area[whole] / UNIT_AREA[shape]) / side
    when = stamps[segments.frame[whole]]
    place = segments.centre[whole] / side - pan * (when[:, None] - world.middle)
    motion, direction, speed, velocity = _read_motion(cover, place, radius, when, shape, world)
    mean_radius = float(np.exp(np.log(radius).mean()))
    size = SIZES[int(mean_radius > math.sqrt(RADIUS[0] * RADIUS[1]))]
    path = np.full((len(segments.labels), 2), np.nan)
    path[segments.frame[track]] = segments.centre[track]
    jump = np.abs(np.diff(np.log(segments.area[whole])))[np.diff(segments.frame[whole]) == 1]
    problem = ""
    if iou < _LEAST_IOU:
        problem = "an object has no known shape"
    elif blur > _LARGEST_BLUR:
        problem = "an object is blurred"
    elif jump.size and jump.max() > math.log(_LARGEST_AREA_JUMP) * max(1.0, float(np.diff(when).max())):
        problem = "an object changes its area from one frame to the next"
    colour = COLOURS[segments.colour[track[0]]]
    item = ObjectReading(
        colour, shape, size, motion, direction, speed, None, path, mean_radius, iou, identity, velocity
    )
    return item, problem


def _crops(segments: Segments, track: np.ndarray) -> np.ndarray:
    """Coverage of the components of a track on the template grid: f32 [m 441] in 0..1."""
    x, y = grid()
    scale = np.sqrt(np.maximum(segments.area[track], 1.0) / math.pi)[:, None]
    xs = segments.centre[track, 0][:, None] + scale * x
    ys = segments.centre[track, 1][:, None] + scale * y
    frame = segments.frame[track][:, None]
    x0, y0 = np.floor(xs).astype(int), np.floor(ys).astype(int)
    height, width = segments.labels.shape[1:]
    result = np.zeros(xs.shape, np.float32)
    for i in (0, 1):
        for j in (0, 1):
            weight = np.where(j, xs - x0, 1 - (xs - x0)) * np.where(i, ys - y0, 1 - (ys - y0))
            row, column = np.clip(y0 + i, 0, height - 1), np.clip(x0 + j, 0, width - 1)
            valid = (row == y0 + i) & (column == x0 + j)
            valid &= segments.labels[frame, row, column] == track[:, None] + 1
            result += np.where(valid, weight * segments.cover[frame, row, column], 0.0).astype(np.float32)
    return np.clip(result, 0.0, 1.0)


def _read_shape(cover: np.ndarray, area: np.ndarray, world: ShapesWorld, side: int) -> tuple[str, float, float, float]:
    """Best shape over rotations and blurs, its mean match, the share of frames that agree on it, and the best blur."""
    radius = math.sqrt(float(np.median(area)) / math.pi)
    best, best_iou, identity, best_blur = 0, -1.0, 0.0, 0.0
    for extra in _EXTRA_BLUR:
        blur = math.sqrt(SMOOTHING**2 + _GRID_BLUR**2 + (extra * side / 32) ** 2)
        table, owner = templates(world.shapes, blur / radius)
        match = soft_iou(cover, table)
        by_shape = np.stack([match[:, owner == i].max(axis=1) for i in range(len(world.shapes))], axis=1)
        mean = by_shape.mean(axis=0)
        if mean.max() > best_iou:
            best, best_iou, best_blur = int(mean.argmax()), float(mean.max()), extra
            identity = float((by_shape.argmax(axis=1) == best).mean())
    return world.shapes[best], best_iou, identity, best_blur


def _line(when: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares slope [d] and residuals [m d] of values [m d] over time."""
    centred = when - when.mean()
    spread = max(float((centred**2).sum()), 1e-9)
    deviation = values - values.mean(axis=0)
    slope = (centred[:, None] * deviation).sum(axis=0) / spread
    return slope, deviation - centred[:, None] * slope


def _read_motion(
    cover: np.ndarray, place: np.ndarray, radius: np.ndarray, when: np.ndarray, shape: str, world: ShapesWorld
) -> tuple[str, str | None, str | None, tuple[float, float]]:
    """Motion, direction and speed words and the velocity, from places [m 2] in image sides."""
    slope, residual = _line(when, place)
    velocity = (float(slope[0]), float(slope[1]))
    path = float(np.hypot(*slope)) * world.intervals
    if "bouncing" in world.motions and np.sqrt((residual**2).sum(axis=1).mean()) > 0.05:
        early = when <= when[0] + max(2.0, 0.34 * world.intervals)
        return "bouncing", _nearest_direction(_line(when[early], place[early])[0]), None, velocity
    if path > 0.4 * PATH_LENGTH[0]:
        middle = math.sqrt(PATH_LENGTH[0] * PATH_LENGTH[1])
        return "moving", _nearest_direction(slope), "slow" if path < middle else "fast", velocity
    growth = float(_line(when, np.log(radius)[:, None])[0][0]) * world.intervals
    if abs(growth) > 0.5 * GROWTH_LOG and {"growing", "shrinking"} & set(world.motions):
        return "growing" if growth > 0 else "shrinking", None, None, velocity
    if "spinning" in world.motions and SYMMETRY[shape] and abs(_turn(cover, when, shape, world)) > 0.4 * SPIN_ANGLE:
        return "spinning", None, None, velocity
    return "still", None, None, velocity


def _turn(cover: np.ndarray, when: np.ndarray, shape: str, world: ShapesWorld) -> float:
    """Rotation over a native clip in rad, from the phase of the angular moment of the shape's symmetry."""
    order = SYMMETRY[shape]
    x, y = grid()
    phase = np.unwrap(np.angle(cover @ (x + 1j * y) ** order)) / order
    return float(_line(when, phase[:, None])[0][0]) * world.intervals


def _nearest_direction(velocity: np.ndarray) -> str:
    angle = math.atan2(velocity[1], velocity[0])
    return DIRECTIONS[int(np.cos(angle - ANGLES).argmax())]


def _read_collision(
    objects: list[ObjectReading], stamps: np.ndarray, world: ShapesWorld, pan: np.ndarray, side: int
) -> list[ObjectReading]:
    """Renames a pair of which one runs into the other, stops, and sends it on."""
    if "colliding" not in world.motions or len(objects) < 2:
        return objects
    span = stamps[-1] - stamps[0]
    unit = COLLISION_LENGTH / world.intervals
    paths = [item.track / side - pan * (stamps[:, None] - world.middle) for item in objects]
    early = [_speed(path, stamps, stamps <= stamps[0] + 0.36 * span) / unit for path in paths]
    late = [_speed(path, stamps, stamps >= stamps[-1] - 0.36 * span) / unit for path in paths]
    fast, rest = 0.6, 0.3
    result = list(objects)
    for i, hitter in enumerate(objects):
        for j, target in enumerate(objects):
            if i == j or not (early[i] > fast and late[i] < rest and early[j] < rest and late[j] > fast):
                continue
            name = f"{target.colour} {target.shape}"
            result[i] = dataclasses.replace(hitter, motion="colliding", direction=None, speed=None, target=name)
            result[j] = dataclasses.replace(target, motion="still", direction=None, speed=None)
    return result


def _speed(path: np.ndarray, stamps: np.ndarray, part: np.ndarray) -> float:
    """Speed of a straight line through the part of `path` [f 2] where it was seen; 0 where it was not."""
    seen = part & np.isfinite(path[:, 0])
    return float(np.hypot(*_line(stamps[seen], path[seen])[0])) if seen.sum() > 1 else 0.0
