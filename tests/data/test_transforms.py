"""Range converters against all 256 levels and ties; crops, resizes and flips against what pixels must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.data.transforms import can_flip, centre_crop_resize, random_crop, random_flip, to_uint8, to_video

LEVELS = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_all_levels_there_and_back(convert):
    video = to_video(convert(LEVELS))
    assert isinstance(video, type(convert(LEVELS))) and video.dtype == np.float32
    np.testing.assert_allclose(video, LEVELS.astype(np.float64) / 127.5 - 1, atol=2e-7)
    back = to_uint8(video)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, LEVELS)


def test_jit_equals_numpy():
    video = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 3, 4, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(to_uint8)(video), to_uint8(video))


def test_clipping_ties_and_nan():
    video = np.array([-5.0, 5.0, np.nan, np.inf, -np.inf, 0.0], np.float32)  # 0.0 is 127.5, a tie
    np.testing.assert_array_equal(to_uint8(video), [0, 255, 0, 255, 0, 128])
    np.testing.assert_array_equal(to_uint8(jnp.asarray(video)), [0, 255, 0, 255, 0, 128])


def test_wrong_types_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        to_video(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="floating"):
        to_uint8(LEVELS)


def test_centre_crop_takes_the_middle():
    frames = np.zeros((2, 20, 40, 3), np.uint8)
    frames[:, :, 10:30] = 200  # exactly the centred square
    np.testing.assert_array_equal(centre_crop_resize(frames, 10), np.full((2, 10, 10, 3), 200))
    np.testing.assert_array_equal(centre_crop_resize(frames, (20, 20)), np.full((2, 20, 20, 3), 200))
    assert centre_crop_resize(frames, (20, 40)) is frames


def test_shrinking_does_not_alias():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # one pixel on, one off: shrunk it is grey, picked it would be black or white
    assert np.abs(centre_crop_resize(stripes, 8).astype(int) - 127).max() < 12


def test_random_crop_is_one_window_for_all_frames():
    y, x = np.mgrid[0:9, 0:11]
    frames = np.broadcast_to(np.stack([y, x, y], -1).astype(np.uint8), (3, 9, 11, 3))
    corners = set()
    for seed in range(60):
        crop = random_crop(frames, (4, 5), np.random.default_rng(seed))
        top, left = crop[0, 0, 0, :2]
        np.testing.assert_array_equal(crop, frames[:, top : top + 4, left : left + 5])
        corners.add((int(top), int(left)))
    assert {t for t, _ in corners} == set(range(6)) and {c for _, c in corners} == set(range(7))
    with pytest.raises(ValueError, match="10 x 10 from frames of 9 x 11"):
        random_crop(frames, 10, np.random.default_rng(0))


def test_flips_never_contradict_the_caption():
    frames = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    for caption, flips in (("a ball moving Left,", False), ("turns right", False), ("a bright leftover", True)):
        assert can_flip(caption) == flips
        flipped = random_flip({"frames": frames, "caption": caption}, np.random.default_rng(0), probability=1.0)
        np.testing.assert_array_equal(flipped["frames"], frames[:, :, ::-1] if flips else frames)
    assert not can_flip("a clock", frozenset({"clock"}))
    count = sum(
        random_flip({"frames": frames, "caption": ""}, np.random.default_rng(s), 0.5)["frames"] is not frames
        for s in range(200)
    )
    assert 70 < count < 130
