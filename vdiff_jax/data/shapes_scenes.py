"""Random scenes of the shapes world, by split.

The held-out values never meet in "train" and "iid": five (colour, shape) pairs are only in "combo", two
(shape, motion) pairs only in "motion". Each value alone is seen everywhere. Streams of different splits are disjoint.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vdiff_jax.data.shapes_world import (
    ANGLES,
    BACKGROUNDS,
    CAMERAS,
    COLLISION_LENGTH,
    COLOURS,
    DIRECTIONS,
    FAR_TIME,
    MOTIONS,
    OBJECT_FIELDS,
    PAN_LENGTH,
    PAN_VECTORS,
    RADIUS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    WEATHERS,
    Records,
    ShapesWorld,
    bounce_limits,
    kinematics,
    positions,
)

SPLITS = ("train", "iid", "combo", "motion", "count", "long", "speed")
HELD_OUT_COMBOS = (
    ("red", "ring"),
    ("green", "triangle"),
    ("blue", "cross"),
    ("yellow", "square"),
    ("magenta", "circle"),
)
HELD_OUT_MOTIONS = (("triangle", "moving", "up-left"), ("ring", "bouncing", None))
_ROUND = ("circle", "ring")  # spinning would be invisible


def split_rng(split: str, *seed: int) -> np.random.Generator:
    """A generator for `split`: equal seeds give disjoint streams in different splits."""
    return np.random.default_rng(np.random.SeedSequence(list(seed), spawn_key=(_split_index(split),)))


def _split_index(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {SPLITS}.")
    return SPLITS.index(split)


def draw_records(
    rng: np.random.Generator,
    world: ShapesWorld,
    split: str,
    n: int,
    *,
    span: Any = None,
    start: Any = 0.0,
) -> Records:
    """Draws `n` scenes of a split.

    Splits: "train" and "iid" leave out the held-out (colour, shape) pairs and motions; "combo" has only those pairs,
    "motion" only those motions, "count" one object more than `world.num_objects`, "long" is to be rendered at 4 times
    the frames, "speed" has fast paths 1.5 times as long.

    span, start: last and first time stamp (scalars or [n]) that will be rendered; default the native clip, or 4 clips
    in "long". Moving objects are placed so that they stay inside over this range; where a path is longer than the
    image, its middle is centred and the object leaves at the far stamps.

    Raises ValueError where the world has no scene of this split.
    """
    _split_index(split)
    last = (4 * world.num_frames - 1 if split == "long" else world.intervals) if span is None else span
    window = np.stack([np.broadcast_to(np.asarray(v, np.float32), (n,)) for v in (start, last)], axis=1)
    k = world.num_objects + 1 if split == "count" else world.num_objects
    scene = _draw_scenes(rng, world, split, n, k)
    records = scene | _draw_objects(rng, world, split, scene, window, k)
    for _ in range(60 if k > 1 else 0):
        bad = np.flatnonzero(_conflicts(records, world, window))
        if not bad.size:
            break
        subset = {name: value[bad] for name, value in scene.items()}
        for name, value in _draw_objects(rng, world, split, subset, window[bad], k).items():
            records[name][bad] = value
    return records


def _pick(rng: np.random.Generator, names: tuple[str, ...], values: tuple[str, ...], shape: Any) -> np.ndarray:
    return np.array([names.index(value) for value in values], np.int32)[rng.integers(len(values), size=shape)]


def _draw_scenes(rng: np.random.Generator, world: ShapesWorld, split: str, n: int, k: int) -> Records:
    count = np.full(n, k, np.int32) if split == "count" else rng.integers(1, k + 1, size=n).astype(np.int32)
    if split == "train":
        count[rng.random(n) < world.empty_rate] = 0
    camera = _pick(rng, CAMERAS, world.cameras, n)
    if "static" in world.cameras:  # half of the clips stand
        camera[rng.random(n) < 0.5] = 0
    texture = _pick(rng, TEXTURES, world.textures, n)
    if "textured" in world.textures:  # a pan over a plain background could not be seen
        texture[camera > 0] = 1
    waves = np.zeros((n, 24 if "textured" in world.textures else 0, 3), np.float32)
    waves[..., :2] = rng.normal(size=waves[..., :2].shape) * (32 / (2 * math.sqrt(2)))
    waves[..., 2] = rng.uniform(0, 2 * math.pi, waves.shape[:2])
    specks = rng.random((n, 14 if {"snow", "rain"} & set(world.weathers) else 0, 3)).astype(np.float32)
    return {
        "count": count,
        "background": _pick(rng, BACKGROUNDS, world.backgrounds, n),
        "texture": texture,
        "weather": _pick(rng, WEATHERS, world.weathers, n),
        "camera": camera,
        "pan": (PAN_VECTORS[camera] * (PAN_LENGTH / world.intervals)).astype(np.float32),
        "waves": waves,
        "specks": specks,
    }


def _draw_pairs(rng: np.random.Generator, world: ShapesWorld, split: str, shape: Any) -> tuple[np.ndarray, np.ndarray]:
    """(colour, shape) indices: held-out pairs in "combo", the other ones in every other split."""
    every = [(c, s) for c in world.colours for s in world.shapes]
    pairs = [pair for pair in every if (pair in HELD_OUT_COMBOS) == (split == "combo")]
    if split == "motion":
        held = {s for s, m, _ in HELD_OUT_MOTIONS if m in world.motions}
        pairs = [pair for pair in pairs if pair[1] in held]
    if not pairs:
        raise ValueError(f"This world has no (colour, shape) pair for the split {split!r}; add shapes or colours.")
    chosen = np.array([(COLOURS.index(c), SHAPES.index(s)) for c, s in pairs], np.int32)
    chosen = chosen[rng.integers(len(pairs), size=shape)]
    return chosen[..., 0], chosen[..., 1]


def _draw_motions(rng: np.random.Generator, world: ShapesWorld, split: str, shapes: np.ndarray) -> dict[str, Any]:
    """motion, direction and speed of every object, held-out motions only in "motion"."""
    singles = tuple(m for m in world.motions if m != "colliding")
    if split == "long" and "bouncing" in singles:  # those that never leave the image
        singles = tuple(m for m in singles if m in ("bouncing", "still", "spinning"))
    if split == "speed":
        singles = tuple(m for m in singles if m == "moving")
    if not singles:
        raise ValueError(f"This world has no motion for the split {split!r}; add 'moving' to its motions.")
    weight = np.array([4.0 if m == "moving" else 1.0 for m in singles])
    motion = np.array([MOTIONS.index(m) for m in singles], np.int32)
    motion = rng.choice(motion, size=shapes.shape, p=weight / weight.sum())
    fallback = MOTIONS.index("moving" if "moving" in singles else singles[0])
    is_round = np.isin(shapes, [SHAPES.index(s) for s in _ROUND])
    motion = np.where(is_round & (motion == MOTIONS.index("spinning")), fallback, motion)
    direction = rng.integers(8, size=shapes.shape).astype(np.int32)
    for shape, name, way in HELD_OUT_MOTIONS:
        if name not in world.motions:
            continue
        mine = shapes == SHAPES.index(shape)
        if split == "motion":
            motion = np.where(mine, MOTIONS.index(name), motion)
            direction = np.where(mine & (way is not None), DIRECTIONS.index(way or "right"), direction)
            continue
        mine &= motion == MOTIONS.index(name)
        if way is None:
            motion = np.where(mine, fallback, motion)
        else:
            turned = (DIRECTIONS.index(way) + 1 + rng.integers(7, size=shapes.shape)) % 8
            direction = np.where(mine & (direction == DIRECTIONS.index(way)), turned, direction)
    quick = split == "speed" or (split == "long" and "bouncing" not in world.motions)
    speeds = (("fast",) if split == "speed" else ("slow",)) if quick else world.speeds
    speed = _pick(rng, SPEEDS, speeds, shapes.shape)
    return {"motion": motion.astype(np.int32), "direction": direction, "speed": speed}


def _draw_objects(
    rng: np.random.Generator, world: ShapesWorld, split: str, scene: Records, window: np.ndarray, k: int
) -> Records:
    n = len(window)
    colour, shape = _draw_pairs(rng, world, split, (n, k))
    size = _pick(rng, SIZES, world.sizes if k < 3 else world.sizes[:1], (n, k))
    drawn = _draw_motions(rng, world, split, shape)
    records = scene | {"colour": colour, "shape": shape, "size": size, **drawn}
    records |= kinematics(records, world, speed_factor=1.5 if split == "speed" else 1.0)
    records["angle"] = (world.tilt * rng.uniform(-1, 1, (n, k))).astype(np.float32)
    records["target"] = np.full((n, k), -1, np.int32)
    records["time_on"] = np.full((n, k), -FAR_TIME, np.float32)
    records["time_off"] = np.full((n, k), FAR_TIME, np.float32)
    records["position"] = _place(rng, records, world, window)
    if "colliding" in world.motions and k > 1 and split in ("train", "iid", "combo"):
        _collide(rng, records, world, np.flatnonzero((rng.random(n) < 0.12) & (scene["count"] > 1)))
    return {name: records[name] for name in OBJECT_FIELDS}


def _place(rng: np.random.Generator, records: Records, world: ShapesWorld, window: np.ndarray) -> np.ndarray:
    """Positions at t = 0 that keep every object inside over its window of time stamps."""
    n, k = records["shape"].shape
    radius = RADIUS[records["size"]][..., None]
    grown = radius * np.exp(0.5 * world.intervals * np.abs(records["growth"]))[..., None]
    pan = records["pan"][:, None]
    total = records["velocity"] + pan
    middle, half = window.mean(axis=1)[:, None, None], 0.5 * (window[:, 1] - window[:, 0])[:, None, None]
    room = np.maximum(0.5 - grown - np.abs(total) * half, 0.04)
    centre = 0.5 + room * rng.uniform(-1, 1, (n, k, 2))
    straight = centre - total * middle + pan * world.middle
    low, high = bounce_limits(radius, (records["camera"] > 0)[:, None, None])
    hit = world.intervals * rng.uniform(0.35, 0.65, (n, k, 2))  # a wall is met well inside the clip
    wall = np.where(records["velocity"] > 0, high, low)
    moving_axis = np.abs(records["velocity"]) > 1e-9
    free = low + (high - low) * rng.random((n, k, 2))
    bounced = np.where(moving_axis, np.clip(wall - records["velocity"] * hit, low, high), free)
    bouncing = (records["motion"] == MOTIONS.index("bouncing"))[..., None]
    return np.where(bouncing, bounced, straight).astype(np.float32)


def _collide(rng: np.random.Generator, records: Records, world: ShapesWorld, rows: np.ndarray) -> None:
    """Turns objects 0 and 1 of `rows` into a head-on elastic collision: 0 runs into 1, stops, and 1 moves on."""
    if not rows.size:
        return
    angle = ANGLES[rng.integers(8, size=rows.size)]
    way = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    for name in ("spin", "growth"):
        records[name][rows, :2] = 0.0
    records["size"][rows, :2] = SIZES.index(world.sizes[0])
    contact = 2 * RADIUS[records["size"][rows, 0]][:, None]
    event = (world.intervals * rng.uniform(0.4, 0.6, rows.size)).astype(np.float32)
    velocity = way * (COLLISION_LENGTH / world.intervals)
    meeting = 0.5 + rng.uniform(-0.03, 0.03, (rows.size, 2))
    before = velocity * event[:, None]
    records["velocity"][rows, :2] = velocity[:, None]
    records["position"][rows, 0] = meeting - 0.5 * way * contact - before
    records["position"][rows, 1] = meeting + 0.5 * way * contact - before
    records["time_off"][rows, 0] = event
    records["time_on"][rows, 1] = event
    records["motion"][rows, 0] = MOTIONS.index("colliding")
    records["motion"][rows, 1] = MOTIONS.index("still")
    records["target"][rows, 0] = 1
    records["direction"][rows, :2] = -1
    records["speed"][rows, :2] = -1


def _conflicts(records: Records, world: ShapesWorld, window: np.ndarray) -> np.ndarray:
    """bool [n]: two present objects of one colour, or nearer than their radii allow at some time."""
    steps = np.linspace(0.0, 1.0, 2 * world.num_frames, dtype=np.float32)
    times = window[:, :1] + (window[:, 1:] - window[:, :1]) * steps
    centre = positions(records, times, world)
    radius = RADIUS[records["size"]]
    bad = np.zeros(len(window), bool)
    for i in range(radius.shape[1]):
        for j in range(i + 1, radius.shape[1]):
            gap = np.sqrt(((centre[:, :, i] - centre[:, :, j]) ** 2).sum(-1)).min(axis=1)
            near = (gap < 1.35 * (radius[:, i] + radius[:, j])) & (records["target"][:, i] != j)
            bad |= (near | (records["colour"][:, i] == records["colour"][:, j])) & (records["count"] > j)
    return bad
