"""Captioned moving shapes: an infinite, file-free video dataset with exact ground truth.

The pieces: `shapes_world` (attributes, motion), `shapes_scenes` (random scenes by split), `shapes_render` (video,
masks, tracks), `shapes_captions` (text). This module gathers them and edits scenes.

    world = make_world("small", size=32)
    records = draw_records(split_rng("train", seed), world, "train", 16)
    times = np.tile(np.arange(world.num_frames, dtype=np.float32), (16, 1))
    video = jax.jit(render, static_argnames="world")(records, times, world=world)
    text = captions(records, rng)
"""

from __future__ import annotations

import numpy as np

from vdiff_jax.data.shapes_captions import (
    Attributes,
    attributes,
    caption,
    captions,
    derange,
    parse_caption,
    vocabulary,
)
from vdiff_jax.data.shapes_render import masks, render, tracks
from vdiff_jax.data.shapes_scenes import SPLITS, draw_records, split_rng
from vdiff_jax.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    WEATHERS,
    Records,
    ShapesWorld,
    full_world,
    kinematics,
    make_world,
    positions,
    small_world,
)

__all__ = [
    "SPLITS",
    "Attributes",
    "Records",
    "ShapesWorld",
    "attributes",
    "caption",
    "captions",
    "derange",
    "draw_records",
    "edit_records",
    "full_world",
    "make_world",
    "masks",
    "native_times",
    "parse_caption",
    "render",
    "select",
    "small_world",
    "split_rng",
    "tracks",
    "vocabulary",
]

_SCENE_WORDS = {"background": BACKGROUNDS, "texture": TEXTURES, "weather": WEATHERS}
_OBJECT_WORDS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "motion": MOTIONS,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
}
_FREE_MOTIONS = ("moving", "still", "spinning", "growing", "shrinking")


def native_times(world: ShapesWorld, n: int, num_frames: int | None = None) -> np.ndarray:
    """Time stamps 0, 1, 2, ... for `n` clips: f32 [n f]."""
    return np.tile(np.arange(num_frames or world.num_frames, dtype=np.float32), (n, 1))


def select(records: Records, index: np.ndarray | slice) -> Records:
    """The scenes `records[index]` along the scene axis."""
    return {name: value[index] for name, value in records.items()}


def edit_records(records: Records, world: ShapesWorld, object_index: int = 0, **changes: str) -> Records:
    """A copy of all scenes with words changed: the truth after a text edit, as `edit_records(r, world, colour="blue")`.

    Scene words: background, texture, weather. Words of the object `object_index`: colour, shape, size, direction,
    speed, motion. A change of motion, direction or speed turns about the object's position in the middle of the clip;
    an object that becomes "moving" needs a direction and a speed.

    Raises ValueError for an unknown attribute or value, and for motions that bounce or collide.
    """
    edited = {name: value.copy() for name, value in records.items()}
    for name, value in changes.items():
        allowed = (_SCENE_WORDS | _OBJECT_WORDS).get(name)
        if allowed is None or value not in allowed:
            raise ValueError(f"Cannot change {name} to {value!r}; choose one of {allowed or sorted(_OBJECT_WORDS)}.")
        if name in _SCENE_WORDS:
            edited[name][:] = allowed.index(value)
        else:
            edited[name][:, object_index] = allowed.index(value)
    if changes.keys() & {"motion", "direction", "speed"}:
        _move_again(edited, records, world, object_index)
    return edited


def _move_again(edited: Records, records: Records, world: ShapesWorld, index: int) -> None:
    """Derives the motion of an object from its words, keeping its place in the middle of the clip."""
    free = [MOTIONS.index(name) for name in _FREE_MOTIONS]
    bound = (records["time_on"][:, index] > -1e5) | ~np.isin(edited["motion"][:, index], free)
    if (bound | ~np.isin(records["motion"][:, index], free)).any():
        raise ValueError(f"Motion edits work between {_FREE_MOTIONS}; an object of these scenes bounces or collides.")
    moving = edited["motion"][:, index] == MOTIONS.index("moving")
    if (moving & ((edited["direction"][:, index] < 0) | (edited["speed"][:, index] < 0))).any():
        raise ValueError("An object that starts to move needs both: give direction=... and speed=....")
    middle = np.full((len(moving), 1), world.middle, np.float32)
    place = positions(records, middle, world)[:, 0, index]
    derived = kinematics(edited, world)
    for name, value in derived.items():
        edited[name][:, index] = value[:, index]
    edited["position"][:, index] = place - edited["velocity"][:, index] * world.middle
