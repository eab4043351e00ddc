"""Random scenes: splits keep apart what they promise, words are truthful, objects stay in the picture."""

import jax
import numpy as np
import pytest

from vdiff_jax.data import shapes
from vdiff_jax.data.shapes_scenes import HELD_OUT_COMBOS
from vdiff_jax.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    PATH_LENGTH,
    RADIUS,
    SHAPES,
    positions,
)

SMALL = shapes.small_world(32)
FULL = shapes.full_world(64)


def draw(world, split, n=2000, seed=0, **options):
    return shapes.draw_records(shapes.split_rng(split, seed), world, split, n, **options)


def present(records):
    return np.arange(records["shape"].shape[1])[None] < records["count"][:, None]


def pairs(records):
    here = present(records)
    return {(COLOURS[c], SHAPES[s]) for c, s in zip(records["colour"][here], records["shape"][here])}


def held_out_motion(records):
    triangle = (records["shape"] == SHAPES.index("triangle")) & (records["motion"] == MOTIONS.index("moving"))
    triangle &= records["direction"] == DIRECTIONS.index("up-left")
    ring = (records["shape"] == SHAPES.index("ring")) & (records["motion"] == MOTIONS.index("bouncing"))
    return (triangle | ring) & present(records)


@pytest.mark.parametrize("world", [SMALL, FULL], ids=["small", "full"])
def test_held_out_pairs_and_motions_are_only_in_their_splits(world):
    every = {(c, s) for c in world.colours for s in world.shapes}
    held = set(HELD_OUT_COMBOS)
    for split in ("train", "iid", "count", "speed"):
        records = draw(world, split)
        assert pairs(records) == every - held  # all the others occur
        assert not held_out_motion(records).any()
    assert pairs(draw(world, "combo")) == held
    motion = draw(world, "motion")
    assert held_out_motion(motion)[present(motion)].all()


def test_streams_of_different_splits_and_seeds_differ_and_equal_seeds_repeat():
    first = {(split, seed): draw(SMALL, split, 8, seed)["position"] for split in ("train", "iid") for seed in (0, 1)}
    values = list(first.values())
    for i in range(4):
        for j in range(i):
            assert not np.isin(values[i], values[j]).any()
    np.testing.assert_array_equal(first["train", 1], draw(SMALL, "train", 8, 1)["position"])
    raw = [shapes.split_rng(split, 7).random() for split in shapes.SPLITS]
    assert len(set(raw)) == len(shapes.SPLITS)


def test_all_values_of_a_world_occur_and_no_others():
    records = draw(FULL, "train")
    here = present(records)
    for name, size in {"colour": 6, "shape": 5, "size": 2, "motion": 7}.items():
        assert set(records[name][here]) == set(range(size)), name
    for name, size in {"background": 3, "texture": 2, "weather": 4, "camera": 5}.items():
        assert set(records[name]) == set(range(size)), name
    moving = here & (records["motion"] == MOTIONS.index("moving"))
    assert set(records["direction"][moving]) == set(range(8)) and set(records["speed"][moving]) == {0, 1}
    assert 0.01 < (records["count"] == 0).mean() < 0.08 and set(records["count"]) == {0, 1, 2}
    assert (draw(FULL, "iid")["count"] > 0).all()
    assert (records["texture"][records["camera"] > 0] == 1).all()  # else the pan could not be seen


def test_records_have_fixed_shapes_and_types():
    for split in shapes.SPLITS:
        records = draw(FULL, split, 5)
        k = 3 if split == "count" else 2
        assert records["position"].shape == (5, k, 2) and records["waves"].shape == (5, 24, 3)
        for name, value in records.items():
            assert value.dtype in (np.int32, np.float32), name
            assert len(value) == 5 and np.isfinite(value).all()
    assert (draw(FULL, "count", 50)["count"] == 3).all()
    assert (draw(SMALL, "count", 50)["count"] == 2).all()


def test_objects_stay_inside_over_the_clip():
    records = draw(SMALL, "iid", 200)
    cover = np.asarray(jax.jit(shapes.masks, static_argnames="world")(records, shapes.native_times(SMALL, 200), SMALL))
    area = cover.sum(axis=(2, 3))[..., 0]
    assert (area.min(axis=1) > 0.9 * area.max(axis=1)).all()


def test_the_words_slow_and_fast_are_path_lengths_of_the_clip():
    for frames in (8, 16):
        world = shapes.small_world(32, num_frames=frames)
        records = draw(world, "iid", 500)
        path = positions(records, shapes.native_times(world, 500), world)[:, :, 0]
        length = np.linalg.norm(path[:, -1] - path[:, 0], axis=-1)
        moving = records["speed"][:, 0] >= 0
        np.testing.assert_allclose(length[moving], PATH_LENGTH[records["speed"][moving, 0]], rtol=1e-4)
        assert length[~moving].max() < 1e-6 and moving.any() and not moving.all()
        angle = np.arctan2(*(path[:, -1] - path[:, 0])[moving].T[::-1])
        np.testing.assert_allclose(np.cos(angle - records["direction"][moving, 0] * np.pi / 4), 1, atol=1e-5)
    fast = draw(SMALL, "speed", 50)
    np.testing.assert_allclose(np.linalg.norm(fast["velocity"], axis=-1) * 15, 1.5 * PATH_LENGTH[1], rtol=1e-4)


def test_a_longer_window_is_centred_and_slow_paths_still_fit():
    span = np.where(np.arange(400) % 2 == 0, 15.0, 30.0)
    start = np.where(np.arange(400) % 3 == 0, -10.0, 0.0)
    records = draw(SMALL, "iid", 400, span=span, start=start)
    ends = np.stack([start, span, 0.5 * (start + span)], axis=1).astype(np.float32)
    path = positions(records, ends, SMALL)[:, :, 0]
    radius = RADIUS[records["size"][:, 0]][:, None, None]
    long = np.linalg.norm(records["velocity"][:, 0], axis=-1) * (span - start) > 0.6
    assert (np.abs(path - 0.5) < 0.5 - radius + 0.041)[~long].all()
    assert np.abs(path[:, 2] - 0.5).max() < 0.38 and long.any()
    assert np.abs(path[long, 2] - 0.5).min(axis=1).max() < 0.08  # along a long way the middle is in the middle


def test_two_objects_differ_in_colour_and_do_not_overlap():
    records = draw(FULL, "iid", 300)
    both = (records["count"] == 2) & (records["target"][:, 0] < 0)
    assert (records["colour"][both, 0] != records["colour"][both, 1]).all()
    path = positions(records, shapes.native_times(FULL, 300), FULL)
    gap = np.linalg.norm(path[:, :, 0] - path[:, :, 1], axis=-1).min(axis=1)
    assert (gap > RADIUS[records["size"]].sum(axis=1))[both].mean() > 0.98


def test_edits_change_their_word_and_nothing_else():
    records = draw(SMALL, "iid", 40)
    edited = shapes.edit_records(records, SMALL, colour="blue", background="grey")
    assert (edited["colour"] == COLOURS.index("blue")).all()
    assert (edited["background"] == BACKGROUNDS.index("grey")).all()
    same = set(records) - {"colour", "background"}
    assert all(np.array_equal(records[name], edited[name]) for name in same)
    assert not (records["colour"] == COLOURS.index("blue")).all()  # the original is untouched


def test_a_new_direction_turns_the_path_about_its_middle():
    records = draw(SMALL, "iid", 40)
    edited = shapes.edit_records(records, SMALL, motion="moving", direction="up", speed="fast")
    stamps = np.tile(np.array([0, 7.5, 15], np.float32), (40, 1))
    before, after = (positions(r, stamps, SMALL)[:, :, 0] for r in (records, edited))
    np.testing.assert_allclose(after[:, 1], before[:, 1], atol=1e-5)
    np.testing.assert_allclose(after[:, 2] - after[:, 0], [[0, -PATH_LENGTH[1]]] * 40, atol=1e-5)
    assert shapes.attributes(edited, 0)["objects"][0]["direction"] == "up"
    still = shapes.edit_records(records, SMALL, motion="still")
    assert np.abs(still["velocity"]).max() == 0 and "speed" not in shapes.attributes(still, 0)["objects"][0]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="'tiny'"):
        shapes.make_world("tiny")
    with pytest.raises(ValueError, match="'test'"):
        draw(SMALL, "test", 1)
    with pytest.raises(ValueError, match="colours"):
        shapes.small_world(32, colours=("pink",))
    with pytest.raises(ValueError, match="size"):
        shapes.small_world(8)
    with pytest.raises(ValueError, match="pink"):
        shapes.edit_records(draw(SMALL, "iid", 1), SMALL, colour="pink")
    with pytest.raises(ValueError, match="direction"):
        shapes.edit_records(shapes.edit_records(draw(SMALL, "iid", 3), SMALL, motion="still"), SMALL, motion="moving")
    with pytest.raises(ValueError, match="combo"):
        draw(shapes.small_world(32, colours=("cyan",)), "combo", 1)
