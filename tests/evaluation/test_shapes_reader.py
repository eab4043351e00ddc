"""The reader reads true clips, also blurred and noisy ones, and gives nothing for mush."""

import functools

import jax
import numpy as np
import pytest
from scipy import ndimage

from vdiff_jax.data import shapes
from vdiff_jax.data.shapes_world import MOTIONS
from vdiff_jax.evaluation.shapes_reader import read, read_batch
from vdiff_jax.evaluation.shapes_scores import centroid_track, count_objects_per_frame, mean_scores, score, track_rmse

N = 120
render = jax.jit(shapes.render, static_argnames="world")


def world_of(name):
    return shapes.full_world(64) if name == "full64" else shapes.small_world(int(name[-2:]))


@functools.cache
def clips(name):
    world = world_of(name)
    n = N if name != "full64" else 60
    records = shapes.draw_records(shapes.split_rng("iid", 11), world, "iid", n)
    video = np.asarray(render(records, shapes.native_times(world, n), world=world))
    return world, records, video


def blur(video, sigma):
    return ndimage.gaussian_filter(video, (0, 0, sigma, sigma, 0))


def noise(video, std):
    """Noise of `std` on the 0..1 scale, then rounded to u8."""
    noisy = video + 2 * std * np.random.default_rng(0).normal(size=video.shape)
    return np.clip((noisy + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


CORRUPTIONS = {
    "clean": lambda video: video,
    "blur and noise": lambda video: noise(blur(video, 0.8), 0.05),
    "noise": lambda video: noise(video, 0.1),
}


def scores_of(name, corrupt):
    world, records, video = clips(name)
    readings = read_batch(corrupt(video), world)
    return [score(reading, shapes.attributes(records, i)) for i, reading in enumerate(readings)]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("name", ["small32", "small64"])
def test_true_clips_are_read_right(name, corruption):
    means = mean_scores(scores_of(name, CORRUPTIONS[corruption]))
    keys = {"readable", "count", "colour", "shape", "size", "motion", "direction", "speed", "background", "all"}
    assert keys <= means.keys()
    assert all(value >= 0.98 for value in means.values()), means


def test_two_objects_weather_and_camera_are_read_right():
    means = mean_scores(scores_of("full64", CORRUPTIONS["clean"]))
    assert {"target", "texture", "weather", "camera"} <= means.keys()
    assert all(value >= 0.98 for value in means.values()), means


MUSH = {
    "constant": lambda video: np.full_like(video, -0.4),
    "noise": lambda video: noise(np.full_like(video, -0.4), 0.4),
    "blur of 4 pixels": lambda video: blur(video, 4.0),
    "blur of 2.2 pixels": lambda video: blur(video, 2.2),
    "half faded": lambda video: 0.5 * video - 0.35,
}


@pytest.mark.parametrize("kind", MUSH)
def test_mush_scores_nothing(kind):
    allowed = 0.02 if kind == "blur of 2.2 pixels" else 0.0  # a ring may survive this one
    assert mean_scores(scores_of("small32", MUSH[kind]))["all"] <= allowed


def test_an_empty_clip_earns_no_attribute_and_noise_is_unreadable():
    for row in scores_of("small32", MUSH["constant"])[:10]:
        assert not any(value for key, value in row.items() if key != "readable")
    assert not any(row["readable"] for row in scores_of("small32", MUSH["noise"])[:10])


def moving_fast():
    world, records, video = clips("small32")
    return world, video[(records["speed"][:, 0] == 1)], shapes.select(records, records["speed"][:, 0] == 1)


def test_ghosts_are_found():
    world, video, records = moving_fast()
    ghosts = 0.5 * (video + video[:, ::-1])  # every frame is a cross-fade of two frames
    readings = read_batch(ghosts, world)
    assert not any(score(reading, shapes.attributes(records, i))["all"] for i, reading in enumerate(readings))
    doubled = np.maximum(video, video[:, ::-1])
    counts = np.array([count_objects_per_frame(clip, world) for clip in doubled])
    assert (counts[:, 0] == 2).mean() > 0.9 and (counts[:, [7, 8]] == 1).all()
    singles = np.array([count_objects_per_frame(clip, world) for clip in video[:10]])
    assert (singles == 1).all() and singles.shape == (10, 16)


def test_an_object_that_changes_is_unreadable():
    world, _, video = clips("small32")
    swapped = np.concatenate([video[:10, :8], video[10:20, 8:]], axis=1)  # two different clips
    assert sum(reading.readable for reading in read_batch(swapped, world)) <= 1
    flicker = video[:5].copy()
    flicker[:, 5:9] = -0.4
    assert not any(reading.readable for reading in read_batch(flicker, world))


def test_a_bar_is_no_known_shape_and_a_faint_patch_spoils_a_clip():
    world, _, video = clips("small32")
    bar = np.full((16, 32, 32, 3), -0.66, np.float32)
    bar[:, 14:17, 6:25] = [0.9, -0.1, -0.1]
    reading = read(bar, world)
    assert not reading.readable and "no known shape" in reading.reason and len(reading.objects) == 1
    spoilt = video[:1].copy()
    corner = spoilt[0, :, 3:9, 3:9] if centroid_track(read(video[0], world))[:, 0].min() > 14 else spoilt[0, :, -9:-3]
    corner += 0.4 * (np.array([0.9, -0.1, -0.1]) - corner)  # a ghost at 40 % opacity
    assert read(video[0], world).readable and not read(spoilt[0], world).readable


def test_wrong_prompts_score_near_chance():
    world, records, video = clips("small32")
    readings = read_batch(video, world)
    texts = shapes.captions(records)
    wrong = shapes.derange(texts, np.random.default_rng(0))
    means = mean_scores([score(r, shapes.parse_caption(text)) for r, text in zip(readings, wrong)])
    assert means["count"] == 1 and means["all"] == 0
    assert means["colour"] < 0.35 and means["direction"] < 0.3 and means["shape"] < 0.4


def test_swapped_bindings_are_wrong_and_the_order_does_not_matter():
    world, records, video = clips("full64")
    index = next(i for i, text in enumerate(shapes.captions(records)) if " and " in text and "hitting" not in text)
    truth = shapes.attributes(records, index)
    reading = read(video[index], world)
    first, second = truth["objects"]
    assert score(reading, truth | {"objects": [second, first]})["all"]
    crossed = [first | {"colour": second["colour"]}, second | {"colour": first["colour"]}]
    assert not score(reading, truth | {"objects": crossed})["all"]
    assert not score(reading, truth | {"objects": [first]})["colour"]


def test_tracks_are_the_true_centres():
    world, records, video = clips("small32")
    truth = np.asarray(shapes.tracks(records, shapes.native_times(world, N), world))[:, :, 0]
    small = np.flatnonzero(records["size"][:, 0] == 0)[:30]
    error = [track_rmse(centroid_track(read(video[i], world)), truth[i]) for i in small]
    assert np.max(error) < 0.25
    assert track_rmse(truth[0] + [3.0, 4.0], truth[0]) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="number 1"):
        centroid_track(read(video[0], world), 1)


def test_time_stamps_decide_slow_and_fast():
    world, records, _ = clips("small32")
    chosen = shapes.select(records, np.flatnonzero(records["motion"][:, 0] == MOTIONS.index("moving")))
    chosen = shapes.select(chosen, slice(0, 24))
    stamps = shapes.native_times(world, 24) * 0.5 + 3  # slow motion of the middle
    video = np.asarray(render(chosen, stamps, world=world))
    rows = [score(r, shapes.attributes(chosen, i)) for i, r in enumerate(read_batch(video, world, stamps))]
    assert mean_scores(rows)["all"] == 1
    assert (
        mean_scores([score(r, shapes.attributes(chosen, i)) for i, r in enumerate(read_batch(video, world))])["speed"]
        < 0.8
    )  # read as if at native speed, everything looks slower


def test_bytes_and_floats_read_alike_and_bad_clips_are_refused():
    world, _, video = clips("small32")
    a, b = read(video[0], world), read(noise(video[:1], 0.0)[0], world)
    assert (a.objects[0].colour, a.objects[0].shape, a.background) == (
        b.objects[0].colour,
        b.objects[0].shape,
        b.background,
    )
    with pytest.raises(ValueError, match="shape"):
        read(video, world)
    with pytest.raises(ValueError, match="finite"):
        read(np.full((4, 32, 32, 3), np.nan, np.float32), world)
    with pytest.raises(ValueError, match="stamp"):
        read(video[0], world, np.arange(3))
