"""Holes: which tokens stay, what fills them before encoding, and how the new is pasted over the old."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vdiff_jax.editing.inpaint import fill_hole, known_outside, known_tokens, paste
from vdiff_jax.sampling.job import CLEAN_LOGSNR

RNG = np.random.default_rng(0)


def hole(shape, rows, columns):
    mask = np.zeros(shape, np.float32)
    mask[..., rows, columns] = 1
    return mask


# Tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_stays_if_no_pixel_of_its_cell_is_covered():
    mask = hole((1, 2, 8, 12), slice(3, 5), slice(7, 8))  # cells of 2 x 3 pixels: rows 1 and 2, column 2
    mask[0, 1] = 0
    expected = np.ones((1, 2, 4, 4, 1))
    expected[0, 0, 1:3, 2] = 0
    known = known_tokens(mask, 4, 4, margin=0)
    assert known.dtype == jnp.float32
    np.testing.assert_array_equal(known, expected)
    np.testing.assert_array_equal(known_tokens(mask * 0.5, 4, 4), np.ones((1, 2, 4, 4, 1)))  # above 0.5 = change


def test_the_margin_goes_round_the_hole_in_space_and_stops_at_the_border():
    mask = hole((1, 3, 12, 12), slice(0, 1), slice(6, 7))
    mask[0, 1] = mask[0, 2] = 0
    expected = np.ones((1, 3, 6, 6, 1))
    expected[0, 0, 0:3, 1:6] = 0  # token (0, 3), two on every side
    np.testing.assert_array_equal(known_tokens(mask, 6, 6, margin=2), expected)


def test_known_outside_carries_the_latents_clean():
    latents = jnp.asarray(RNG.standard_normal((1, 2, 4, 4, 3)), jnp.float32)
    known = known_outside(latents, hole((1, 2, 8, 8), slice(0, 2), slice(0, 2)))
    np.testing.assert_array_equal(known.latents, latents)
    np.testing.assert_array_equal(known.logsnr, np.full((1, 2), CLEAN_LOGSNR))
    assert float(known.mask.sum()) == 2 * (16 - 4)


def test_a_mask_that_does_not_fit_the_tokens_is_refused():
    with pytest.raises(ValueError, match="a mask of 9x8 does not fit latents of 4x4"):
        known_tokens(np.zeros((1, 1, 9, 8)), 4, 4)


# Filling ---------------------------------------------------------------------------------------------------------


def test_filling_is_exact_outside_and_leaks_nothing_of_the_hole():
    video = RNG.uniform(-1, 1, (2, 3, 13, 18, 3)).astype(np.float32)
    mask = (ndimage.gaussian_filter(RNG.standard_normal((2, 3, 13, 18)), (0, 0, 2, 2)) > 0).astype(np.float32)
    filled = fill_hole(video, mask)
    assert filled.dtype == np.float32 and np.abs(filled).max() <= 1 + 1e-6
    np.testing.assert_array_equal(filled[mask == 0], video[mask == 0])
    other = np.where(mask[..., None] > 0, RNG.uniform(-1, 1, video.shape), video).astype(np.float32)
    np.testing.assert_array_equal(fill_hole(other, mask), filled)


def test_a_flat_picture_stays_flat():
    video = np.broadcast_to(np.float32([0.3, -0.7, 1.0]), (1, 2, 15, 20, 3))
    np.testing.assert_allclose(fill_hole(video, hole((1, 2, 15, 20), slice(2, 13), slice(0, 17))), video, atol=1e-6)


@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_a_ramp_goes_on_through_the_hole(direction):
    ramp = np.broadcast_to(np.linspace(-1, 1, 32, dtype=np.float32)[:, None, None], (32, 32, 3))
    video = (ramp if direction == "rows" else ramp.transpose(1, 0, 2))[None, None]
    mask = hole((1, 1, 32, 32), slice(10, 22), slice(9, 23))
    error = np.abs(fill_hole(video, mask) - video)[mask > 0]
    # The mean of what is around, the next simplest fill, is wrong by up to half the ramp over the hole, 0.36.
    assert error.max() < 0.2 and error.mean() < 0.08, (error.max(), error.mean())


def test_the_fill_is_as_smooth_as_what_surrounds_it():
    rows, columns = np.mgrid[0:32, 0:32] / 32.0
    video = np.stack([rows, columns, rows * columns], -1)[None, None].astype(np.float32)
    filled = fill_hole(video, hole((1, 1, 32, 32), slice(8, 24), slice(6, 26)))
    steps = max(np.abs(np.diff(filled, axis=axis)).max() for axis in (2, 3))
    assert steps < 5 / 32  # a picture that rises by 1 / 32 a pixel; a hole left grey has a step of 0.8


def test_a_frame_that_is_wholly_covered_gets_the_mean_of_the_others_or_grey():
    video = RNG.uniform(-1, 1, (1, 3, 8, 8, 3)).astype(np.float32)
    mask = np.zeros((1, 3, 8, 8), np.float32)
    mask[0, 1] = 1
    expected = video[0, [0, 2]].mean(axis=(0, 1, 2), dtype=np.float64)
    filled = fill_hole(video, mask)
    np.testing.assert_allclose(filled[0, 1], np.broadcast_to(expected, (8, 8, 3)), atol=1e-5)
    np.testing.assert_array_equal(filled[0, [0, 2]], video[0, [0, 2]])
    np.testing.assert_array_equal(fill_hole(video, np.ones_like(mask)), np.zeros_like(video))


# Pasting ---------------------------------------------------------------------------------------------------------

ORIGINAL = RNG.integers(0, 256, (2, 12, 14, 3), dtype=np.uint8)
MADE = RNG.integers(0, 256, (2, 12, 14, 3), dtype=np.uint8)


@pytest.mark.parametrize("feather", [0.0, 1.0, 3.0])
def test_pasting_leaves_every_pixel_outside_bit_for_bit(feather):
    mask = hole((2, 12, 14), slice(3, 9), slice(0, 8))
    mask[1] *= 0.5  # not above 0.5: covers nothing
    pasted = paste(ORIGINAL, MADE, mask, feather)
    assert pasted.dtype == np.uint8
    np.testing.assert_array_equal(pasted[mask < 0.6], ORIGINAL[mask < 0.6])
    assert (pasted[0, 5:7, 0:5] != ORIGINAL[0, 5:7, 0:5]).mean() > 0.9
    if feather == 0:
        np.testing.assert_array_equal(pasted[mask > 0.5], MADE[mask > 0.5])


def test_the_feather_is_a_straight_line_by_the_depth_inside_the_mask():
    old, new = np.zeros((1, 15, 15, 3), np.uint8), np.full((1, 15, 15, 3), 240, np.uint8)
    mask = hole((1, 15, 15), slice(2, 13), slice(2, 13))
    row = paste(old, new, mask, feather=3.0)[0, 7, :, 0]
    # Depths 1, 2, 3, 4, ... over 1 + 3 pixels: a quarter, a half, three quarters, all.
    np.testing.assert_array_equal(row, [0, 0, 60, 120, 180, 240, 240, 240, 240, 240, 180, 120, 60, 0, 0])


def test_the_border_of_the_frame_is_no_edge_of_the_mask():
    old, new = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 200, np.uint8)
    strip = paste(old, new, hole((1, 8, 8), slice(None), slice(0, 4)), feather=1.0)[0, ..., 0]
    np.testing.assert_array_equal(strip, np.broadcast_to(np.uint8([200, 200, 200, 100, 0, 0, 0, 0]), (8, 8)))
    np.testing.assert_array_equal(paste(old, new, np.ones((1, 8, 8)), feather=5.0), new)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="feather=-1"):
        paste(ORIGINAL, MADE, np.ones((2, 12, 14)), feather=-1.0)
