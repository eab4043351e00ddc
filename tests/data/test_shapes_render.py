"""Rendered scenes agree with closed forms: areas, tracks, motion between frames, collisions, camera and light."""

import functools
import math

import jax
import numpy as np
import pytest

from vdiff_jax.data import shapes
from vdiff_jax.data.shapes_world import (
    BACKGROUND_LEVEL,
    COLLISION_LENGTH,
    MOTIONS,
    PALETTE,
    RADIUS,
    SHAPES,
    bounce_limits,
)

SMALL = shapes.small_world(32)
FULL = shapes.full_world(64, shapes=SHAPES)
render = jax.jit(shapes.render, static_argnames="world")
masks = jax.jit(shapes.masks, static_argnames="world")
tracks = jax.jit(shapes.tracks, static_argnames="world")
N = 24


@functools.cache
def small():
    records = shapes.draw_records(shapes.split_rng("iid", 1), SMALL, "iid", N)
    return records, shapes.native_times(SMALL, N)


@functools.cache
def full(n=64):
    return shapes.draw_records(shapes.split_rng("iid", 2), FULL, "iid", n), shapes.native_times(FULL, n)


def polygon_area(points):
    x, y = np.array(points).T
    return 0.5 * abs((x * np.roll(y, 1) - y * np.roll(x, 1)).sum())


def ring_of_points(radii, turn=0.0):
    angles = turn + 2 * math.pi * np.arange(len(radii)) / len(radii)
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def true_area(shape):
    """Areas in units of the squared nominal radius, from vertices and radii."""
    if shape in ("circle", "ring"):
        return math.pi if shape == "circle" else math.pi * (1.05**2 - 0.5**2)
    if shape == "cross":
        a, b = 1.05, 0.38
        quarter = [(a, b), (b, b), (b, a)]
        turned = [(-y, x) for x, y in quarter]
        return polygon_area([*quarter, *turned, *((-x, -y) for x, y in quarter), *((-x, -y) for x, y in turned)])
    if shape == "square":
        return 1.74**2
    if shape == "triangle":
        return polygon_area(ring_of_points([1.25] * 3))
    inner = 1.45 * math.cos(math.radians(72)) / math.cos(math.radians(36))
    return polygon_area(ring_of_points([1.45, inner] * 5))


def one_still_object(world, shape, size="large", angle=0.0):
    records = shapes.draw_records(shapes.split_rng("train", 3), world, "iid", 1)
    for name in ("velocity", "spin", "growth", "pan", "texture", "weather", "camera"):
        records[name][:] = 0
    records["count"][:], records["motion"][:], records["position"][:] = 1, MOTIONS.index("still"), 0.503
    records["shape"][:], records["size"][:], records["angle"][:] = SHAPES.index(shape), size == "large", angle
    records["time_on"][:], records["time_off"][:] = -1e6, 1e6
    return records


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_its_area_and_centre_at_any_angle(shape):
    for angle in (0.0, 0.4):
        cover = np.asarray(masks(one_still_object(FULL, shape, angle=angle), np.zeros((1, 1), np.float32), world=FULL))
        cover = cover[0, 0, :, :, 0]
        expected = true_area(shape) * (RADIUS[1] * 64) ** 2
        assert abs(cover.sum() / expected - 1) < 0.015
        y, x = np.mgrid[:64, :64]
        centre = (cover * x).sum() / cover.sum(), (cover * y).sum() / cover.sum()
        assert np.allclose(centre, 0.503 * 64 - 0.5, atol=0.12)


def test_edges_cover_pixels_by_the_part_inside():
    cover = np.asarray(masks(one_still_object(FULL, "square"), np.zeros((1, 1), np.float32), world=FULL))[
        0, 0, 32, :, 0
    ]
    middle, half, pixel = 0.503 * 64 - 0.5, 0.87 * RADIUS[1] * 64, np.arange(64)
    overlap = np.minimum(pixel + 0.5, middle + half) - np.maximum(pixel - 0.5, middle - half)
    np.testing.assert_allclose(cover, np.clip(overlap, 0, 1), atol=1e-4)


def test_an_upright_triangle_points_up_and_turns_clockwise_in_the_image():
    rows = []
    for angle in (0.0, math.pi / 2):
        records = one_still_object(FULL, "triangle", angle=angle)
        cover = np.asarray(masks(records, np.zeros((1, 1), np.float32), world=FULL))[0, 0, :, :, 0] > 0.5
        rows.append((cover.any(axis=1).nonzero()[0], cover.any(axis=0).nonzero()[0]))
    middle = 0.503 * 64 - 0.5
    assert middle - rows[0][0].min() > 1.5 * (rows[0][0].max() - middle)  # tip above
    assert rows[1][1].max() - middle > 1.5 * (middle - rows[1][1].min())  # a quarter turn (y down): tip to the right


def test_video_is_background_and_colour_mixed_by_the_mask():
    records, times = small()
    video = np.asarray(render(records, times, world=SMALL))
    cover = np.asarray(masks(records, times, world=SMALL))
    back = BACKGROUND_LEVEL[records["background"]][:, None, None, None, None]
    colour = PALETTE[records["colour"][:, 0]][:, None, None, None, :]
    assert video.shape == (N, 16, 32, 32, 3) and video.dtype == np.float32
    np.testing.assert_allclose((video + 1) / 2, back * (1 - cover) + colour * cover, atol=1e-5)
    assert cover.min() == 0 and cover.max() == 1


def test_jit_equals_eager():
    records, times = full(2)
    times = times[:, :2]
    np.testing.assert_allclose(render(records, times, world=FULL), shapes.render(records, times, FULL), atol=2e-4)


def centroids(records, times, world=SMALL):
    cover = np.asarray(masks(records, times, world=world))[..., 0].astype(np.float64)
    y, x = np.mgrid[: world.size, : world.size]
    total = cover.sum(axis=(2, 3))
    return np.stack([(cover * x).sum(axis=(2, 3)) / total, (cover * y).sum(axis=(2, 3)) / total], axis=-1)


def test_tracks_are_the_centroids_of_the_masks_also_between_frames():
    records, times = small()
    inside = np.flatnonzero(records["size"][:, 0] == 0)  # small ones never touch the border
    whole = centroids(records, times)
    truth = np.asarray(tracks(records, times, world=SMALL))[:, :, 0]
    assert np.abs(whole - truth)[inside].max() < 0.13
    between = centroids(records, times * 0.5 + 3.37)
    straight = whole[:, :1] + (whole[:, -1:] - whole[:, :1]) * ((times * 0.5 + 3.37) / 15)[..., None]
    assert np.abs(between - straight)[inside].max() < 0.2


def test_a_bouncing_path_is_what_small_steps_with_reflection_give():
    records, _ = full()
    rows, cols = np.nonzero(records["motion"] == MOTIONS.index("bouncing"))
    present = (cols < records["count"][rows]) & (records["camera"][rows] == 0)
    rows, cols = rows[present], cols[present]
    assert len(rows) > 1
    fine = np.tile(np.linspace(0, 15, 1501, dtype=np.float32), (64, 1))
    path = (np.asarray(tracks(records, fine, world=FULL)) + 0.5) / 64
    low, high = bounce_limits(RADIUS[records["size"][rows, cols]][:, None], 0)
    place, velocity = records["position"][rows, cols].astype(float), records["velocity"][rows, cols] * 0.01
    for step in range(1501):
        assert np.abs(place - path[rows, step, cols]).max() < 0.002
        place = place + velocity
        hit = ((place > high) & (velocity > 0)) | ((place < low) & (velocity < 0))
        velocity = np.where(hit, -velocity, velocity)
    assert (np.sign(velocity) != np.sign(records["velocity"][rows, cols])).any(axis=1).all()  # each met a wall


def test_a_collision_touches_and_passes_the_velocity_on():
    records, _ = full()
    rows = np.flatnonzero((records["target"][:, 0] == 1) & (records["camera"] == 0))
    assert rows.size
    event = records["time_off"][:, :1]
    stamps = np.concatenate([0 * event, event - 2, event, event + 2, 0 * event + 15], axis=1).astype(np.float32)
    path = (np.asarray(tracks(records, stamps, world=FULL))[rows] + 0.5) / 64
    moved = np.linalg.norm(np.diff(path, axis=1), axis=-1)  # [rows, 4 pieces, 2 objects]
    step = 2 * COLLISION_LENGTH / 15
    np.testing.assert_allclose(moved[:, 1], [[step, 0]] * len(rows), atol=1e-4)
    np.testing.assert_allclose(moved[:, 2], [[0, step]] * len(rows), atol=1e-4)
    gap = np.linalg.norm(path[:, 2, 0] - path[:, 2, 1], axis=-1)
    np.testing.assert_allclose(gap, 2 * RADIUS[0], atol=1e-4)


def test_growing_and_spinning_follow_their_rates():
    records = one_still_object(FULL, "square")
    records["growth"][:] = math.log(1.8) / 15
    ends = np.array([[0.0, 15.0]], np.float32)
    area = np.asarray(masks(records, ends, world=FULL))[0, ..., 0].sum(axis=(1, 2))
    assert abs(area[1] / area[0] / 1.8**2 - 1) < 0.02
    spinning = one_still_object(FULL, "square")
    spinning["spin"][:] = math.pi / 15
    cover = np.asarray(masks(spinning, np.array([[0.0, 3.75, 7.5]], np.float32), world=FULL))[0, ..., 0]
    np.testing.assert_allclose(cover[2], cover[0], atol=1e-3)  # a quarter turn
    assert np.abs(cover[1] - cover[0]).max() > 0.9  # an eighth


def test_a_panning_camera_shifts_texture_and_object_together_against_its_way():
    records = one_still_object(FULL, "circle")
    records["texture"][:] = 1
    records["camera"][:] = 1  # to the left: the content goes right
    records["pan"][:] = [[0.15 / 15, 0]]
    one_pixel = 1 / (0.15 * 64 / 15)
    middle = np.asarray(tracks(records, np.array([[7.5]], np.float32), world=FULL))[0, 0, 0]
    np.testing.assert_allclose(middle, 0.503 * 64 - 0.5, atol=1e-4)  # the pan is centred in the clip
    video = np.asarray(render(records, np.array([[5, 5 + 3 * one_pixel]], np.float32), world=FULL))[0]
    np.testing.assert_allclose(video[1][:, 3:], video[0][:, :-3], atol=2e-3)
    assert video[0][:20].std() > 0.03  # there is a texture


def test_weather_is_grey_light_and_night_halves_it():
    records = one_still_object(FULL, "circle")
    records["count"][:] = 0
    times = np.array([[0.0, 4.0]], np.float32)
    seen = {}
    for index, name in enumerate(FULL.weathers):
        records["weather"][:] = index
        seen[name] = (np.asarray(render(records, times, world=FULL)) + 1) / 2
        assert np.ptp(seen[name], axis=-1).max() < 1e-5
    np.testing.assert_allclose(seen["night"], 0.5 * seen["clear"], atol=1e-5)
    for name in ("snow", "rain"):
        assert (seen[name] >= seen["clear"] - 1e-5).all() and (seen[name] > seen["clear"] + 0.2).mean() > 0.004
        assert np.abs(seen[name][0, 0] - seen[name][0, 1]).max() > 0.2  # it falls
