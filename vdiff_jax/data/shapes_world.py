"""A world of captioned moving shapes: its attributes, and the motion of its objects.

A scene is a small record of numbers. Positions are in units of the image side H (0..1, x right, y down), times in
native frame intervals. Motion is closed form in the real-valued time `t`, so a scene can be rendered at any stamp:

    centre(t) = fold(position + velocity * clip(t, time_on, time_off)) + pan * (t - mid)
    angle(t)  = angle + spin * t
    radius(t) = radius(size) * exp(clip(growth * (t - mid), -0.45, 0.45)),      mid = (num_frames - 1) / 2

`fold` is the triangle wave between the walls and acts on bouncing objects only. `time_on`/`time_off` are infinite but
for a head-on elastic collision of equal masses, where the first object stops and the second takes its velocity.

Speeds are distances per clip, not per frame: slow = 0.30 H and fast = 0.525 H over the `num_frames - 1` intervals of a
clip of native length. So the words "slowly" and "fast" mean the same at every stride, and a large object on a fast path
still fits into the image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")  # "star" is held out of the presets
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange")  # "orange" is held out of the presets
SIZES = ("small", "large")
BACKGROUNDS = ("black", "dark", "grey")
TEXTURES = ("plain", "textured")
WEATHERS = ("clear", "snow", "rain", "night")
MOTIONS = ("moving", "still", "bouncing", "spinning", "growing", "shrinking", "colliding")
SPEEDS = ("slow", "fast")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
CAMERAS = ("static", "left", "right", "up", "down")

_SATURATED = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0.5, 0))
PALETTE = (0.45 + 0.5 * np.array(_SATURATED)).astype(np.float32)
"""[7 3] in 0..1. Light colours: all share one luminance contrast to the background, so text edits keep the object."""
BACKGROUND_LEVEL = np.array([0.05, 0.17, 0.30], np.float32)
RADIUS = np.array([0.125, 0.19], np.float32)
PATH_LENGTH = np.array([0.30, 0.525], np.float32)
BOUNCE_LENGTH = 0.75
COLLISION_LENGTH = 0.42
PAN_LENGTH = 0.15
SPIN_ANGLE = math.pi  # rad per clip
GROWTH_LOG = math.log(1.8)  # radius ratio, last frame to first frame of a clip, is 1.8
ANGLES = np.arange(8) * (math.pi / 4)
PAN_VECTORS = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)  # content moves against the camera

FAR_TIME = 1e6

Records = dict[str, np.ndarray]
"""Scenes as host arrays, all with the scene axis n first, k objects per scene (absent ones have index >= count).

    count, background, texture, weather, camera          i32 [n]      indices into the tuples above
    shape, colour, size, motion                          i32 [n k]
    direction, speed, target                             i32 [n k]    -1 where the motion has none
    position, velocity                                   f32 [n k 2]  H, H per frame interval; (x, y)
    angle, spin, growth, time_on, time_off               f32 [n k]    rad, rad and log radius per interval, intervals
    pan                                                  f32 [n 2]    H per frame interval
    waves                                                f32 [n w 3]  texture: wave vector (rad per H) and phase
    specks                                               f32 [n p 3]  weather: x, y (H) and fall speed factor
"""
OBJECT_FIELDS = ("shape", "colour", "size", "motion", "direction", "speed", "target", "position", "velocity")
OBJECT_FIELDS += ("angle", "spin", "growth", "time_on", "time_off")


@dataclasses.dataclass(frozen=True)
class ShapesWorld:
    """What a world may contain. Hashable: pass it as a static argument to `jax.jit`.

    size: image side H in pixels. num_frames: native clip length, which defines the speeds. num_objects: most objects
    in a scene. tilt: largest initial rotation in rad. empty_rate: share of scenes without objects in the train split.
    """

    size: int = 64
    num_frames: int = 16
    num_objects: int = 2
    shapes: tuple[str, ...] = SHAPES[:5]
    colours: tuple[str, ...] = COLOURS[:6]
    sizes: tuple[str, ...] = SIZES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    textures: tuple[str, ...] = TEXTURES
    weathers: tuple[str, ...] = WEATHERS
    motions: tuple[str, ...] = MOTIONS
    speeds: tuple[str, ...] = SPEEDS
    cameras: tuple[str, ...] = CAMERAS
    tilt: float = math.pi
    empty_rate: float = 0.04

    def __post_init__(self):
        for field, allowed in _ALLOWED.items():
            values = tuple(getattr(self, field))
            unknown = [value for value in values if value not in allowed]
            if unknown or not values:
                raise ValueError(f"ShapesWorld.{field} is {values}; give a non-empty tuple from {allowed}.")
            object.__setattr__(self, field, values)
        if self.size < 16 or self.num_frames < 2 or self.num_objects < 1:
            raise ValueError(
                f"ShapesWorld needs size >= 16, num_frames >= 2 and num_objects >= 1, "
                f"got {self.size}, {self.num_frames} and {self.num_objects}."
            )

    @property
    def intervals(self) -> int:
        """Frame intervals of a clip of native length."""
        return self.num_frames - 1

    @property
    def middle(self) -> float:
        """Time stamp of the middle of a clip of native length."""
        return self.intervals / 2


_ALLOWED = {
    "shapes": SHAPES,
    "colours": COLOURS,
    "sizes": SIZES,
    "backgrounds": BACKGROUNDS,
    "textures": TEXTURES,
    "weathers": WEATHERS,
    "motions": MOTIONS,
    "speeds": SPEEDS,
    "cameras": CAMERAS,
}


def full_world(size: int = 64, **overrides: Any) -> ShapesWorld:
    """Everything: up to two objects, all motions, textures, weathers and camera pans."""
    return ShapesWorld(size=size, **overrides)


def small_world(size: int = 32, **overrides: Any) -> ShapesWorld:
    """One upright object moving in one of 8 directions or standing still, on a plain background."""
    fields: dict[str, Any] = dict(
        num_objects=1,
        textures=("plain",),
        weathers=("clear",),
        motions=("moving", "still"),
        cameras=("static",),
        tilt=0.0,
    )
    return ShapesWorld(size=size, **(fields | overrides))


WORLDS: dict[str, Callable[..., ShapesWorld]] = {"full": full_world, "small": small_world}


def make_world(name: str, **overrides: Any) -> ShapesWorld:
    """The preset `name` ("full" or "small") with fields of `ShapesWorld` overridden.

    Raises ValueError for an unknown name, field or value.
    """
    if name not in WORLDS:
        raise ValueError(f"Unknown shapes world {name!r}; choose one of {sorted(WORLDS)}.")
    known = {field.name for field in dataclasses.fields(ShapesWorld)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"a shapes world has no {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    return WORLDS[name](**overrides)


def bounce_limits(radius: Any, panning: Any) -> tuple[Any, Any]:
    """Lowest and highest centre coordinate (H) of a bouncing object; a panning camera leaves room for the shift."""
    inset = radius + 0.5 * PAN_LENGTH * panning
    return inset, 1.0 - inset


def positions(records: Any, times: Any, world: ShapesWorld, xp: Any = np) -> Any:
    """Object centres at `times` [n f] in units of H: f32 [n f k 2], (x, y). `xp` is numpy or jax.numpy."""
    t = times[:, :, None]
    on, off = records["time_on"][:, None], records["time_off"][:, None]
    path = records["position"][:, None] + records["velocity"][:, None] * xp.clip(t, on, off)[..., None]
    if "bouncing" in world.motions:
        panning = (records["camera"] > 0)[:, None].astype(np.float32)
        low, high = bounce_limits(xp.asarray(RADIUS)[records["size"]], panning)
        low, width = low[:, None, :, None], (high - low)[:, None, :, None]
        folded = low + width - xp.abs(xp.mod(path - low, 2 * width) - width)
        path = xp.where((records["motion"] == MOTIONS.index("bouncing"))[:, None, :, None], folded, path)
    return path + records["pan"][:, None, None] * (t[..., None] - world.middle)


def kinematics(records: Records, world: ShapesWorld, speed_factor: float = 1.0) -> Records:
    """velocity, spin, growth, direction and speed as the motion words ask for (-1 where a motion has no such word)."""
    is_a = {name: records["motion"] == MOTIONS.index(name) for name in MOTIONS}
    direction = np.where(is_a["moving"] | is_a["bouncing"], records["direction"], -1).astype(np.int32)
    speed = np.where(is_a["moving"], records["speed"], -1).astype(np.int32)
    length = np.where(is_a["moving"], PATH_LENGTH[speed] * speed_factor, np.where(is_a["bouncing"], BOUNCE_LENGTH, 0.0))
    way = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1).round(12)[direction]
    growth = np.where(is_a["growing"], GROWTH_LOG, np.where(is_a["shrinking"], -GROWTH_LOG, 0.0)) / world.intervals
    return {
        "direction": direction,
        "speed": speed,
        "velocity": (way * (length / world.intervals)[..., None]).astype(np.float32),
        "spin": np.where(is_a["spinning"], SPIN_ANGLE / world.intervals, 0.0).astype(np.float32),
        "growth": growth.astype(np.float32),
    }
