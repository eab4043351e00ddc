"""Time lines of motion tasks by hand, and camera moves against shifts, ramps and an independent bilinear read."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.editing.motion import bridge, camera_move, continuation, spread, waypoints
from vdiff_jax.sampling.job import CLEAN_LOGSNR

RNG = np.random.default_rng(0)


def latents(num_frames, batch=2, size=(3, 4)):
    return jnp.asarray(RNG.standard_normal((batch, num_frames, *size, 2)), jnp.float32)


def given(timeline):
    """Which frames are given, and that they are so as a whole, in every clip, and clean."""
    mask = np.asarray(timeline.known.mask)
    frames = mask[0, :, 0, 0, 0]
    np.testing.assert_array_equal(mask, np.broadcast_to(frames[None, :, None, None, None], mask.shape))
    np.testing.assert_array_equal(timeline.known.logsnr, np.full(mask.shape[:2], CLEAN_LOGSNR))
    return frames.tolist()


def test_spread_puts_new_frames_between_given_ones_at_their_times():
    x = latents(3)
    line = spread(x, 4, spacing=2.0)
    assert given(line) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    np.testing.assert_array_equal(line.known.latents[:, ::4], x)
    np.testing.assert_allclose(line.times, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4])


def test_bridge_gives_both_ends_and_counts_time_through():
    head, tail = latents(2), latents(3)
    line = bridge(head, tail, 2, spacing=0.5)
    assert given(line) == [1, 1, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(line.known.latents[:, :2], head)
    np.testing.assert_array_equal(line.known.latents[:, 4:], tail)
    np.testing.assert_allclose(line.times, 0.5 * np.arange(7))


def test_continuation_starts_at_time_zero_with_anchors_before_it():
    context, anchors = latents(2), latents(1)
    line = continuation(context, 3, spacing=2.0)
    assert given(line) == [1, 1, 0, 0, 0]
    np.testing.assert_allclose(line.times, [0, 2, 4, 6, 8])
    line = continuation(context, 3, 2.0, anchors, jnp.asarray([-7.0]))
    assert given(line) == [1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(line.known.latents[:, :1], anchors)
    np.testing.assert_array_equal(line.known.latents[:, 1:3], context)
    np.testing.assert_allclose(line.times, [-7, 0, 2, 4, 6, 8])
    noisy = continuation(context, 1, context_logsnr=5.0)
    np.testing.assert_array_equal(noisy.known.logsnr, np.full((2, 3), 5.0))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: spread(latents(3), 1), "factor=1 of 3 frame"),
        (lambda: spread(latents(1), 2), "factor=2 of 1 frame"),
        (lambda: bridge(latents(1), latents(1), 0), "num_frames=0: a transition needs at least 1"),
        (lambda: bridge(latents(1), latents(1, size=(4, 4)), 1), "bring them to one size"),
    ],
)
def test_mistakes_are_told(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(("between", "overlap"), [(13, 3), (40, 3), (120, 3), (300, 3), (200, 1), (60, 0)])
def test_no_gap_is_longer_than_a_window_reaches_however_far_the_ends(between, overlap):
    given = np.array([True] * 3 + [False] * between + [True] * 3)
    known = given.copy()
    passes = waypoints(given, 16, overlap)
    for frames in passes:
        assert len(frames) <= 16 and (np.diff(frames) > 0).all()
        new = frames[~known[frames]]
        # New ones lie evenly, at least one frame from what is known, and something is known on either side.
        assert len(new) and frames[0] < new[0] and new[-1] < frames[-1]
        steps = np.diff([frames[frames < new[0]][-1], *new, frames[frames > new[-1]][0]])
        assert steps.max() - steps.min() <= 1
        known[frames] = True
    missing = np.diff(np.flatnonzero(known)) - 1
    assert missing.max() <= 16 - overlap - 1
    assert bool(passes) == (between + 6 > 16) and len(passes) < between / 4


def test_ends_that_fill_the_window_are_refused():
    assert waypoints(np.array([True, False, True]), 3, 1) == []
    with pytest.raises(ValueError, match="6 known frames leave no new one in a window of 6"):
        waypoints(np.array([True] * 3 + [False] * 9 + [True] * 3), 6, 3)


# The camera ------------------------------------------------------------------------------------------------------

FRAMES = RNG.integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)


def seen(frames, pan, zoom):
    """Camera moves pixel by pixel: where every pixel's middle looks, read bilinearly, with its coordinates."""
    count, height, width = frames.shape[:3]
    picture, rows_seen, columns_seen = np.zeros(frames.shape), [], []
    for index in range(count):
        part = index / max(count - 1, 1)
        scale = zoom**-part
        rows = (np.arange(height) - (height - 1) / 2) * scale + (height - 1) / 2 + part * pan[1]
        columns = (np.arange(width) - (width - 1) / 2) * scale + (width - 1) / 2 + part * pan[0]
        rows_seen.append(rows)
        columns_seen.append(columns)
        y, x = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
        top, left = np.minimum(y.astype(int), height - 2), np.minimum(x.astype(int), width - 2)
        fy, fx = (y - top)[:, None, None], (x - left)[None, :, None]
        image = frames[index].astype(np.float64)
        upper = image[top][:, left] * (1 - fx) + image[top][:, left + 1] * fx
        lower = image[top + 1][:, left] * (1 - fx) + image[top + 1][:, left + 1] * fx
        picture[index] = upper * (1 - fy) + lower * fy
    return picture, np.stack(rows_seen), np.stack(columns_seen)


def test_a_pan_by_whole_pixels_is_a_shift():
    moved, mask = camera_move(FRAMES, pan=(6, -3))  # 2 to the right and 1 up in every frame
    assert moved.dtype == np.uint8 and mask.dtype == np.float32 and mask.shape == FRAMES.shape[:3]
    for i in range(4):
        right, up = 2 * i, i
        np.testing.assert_array_equal(moved[i, up:, : 11 - right], FRAMES[i, : 9 - up, right:])
        expected = np.ones((9, 11))
        expected[up:, : 11 - right] = 0
        np.testing.assert_array_equal(mask[i], expected)
        # What is not known yet holds the nearest pixel of the frame's border.
        np.testing.assert_array_equal(moved[i, up:, 11 - right :], np.repeat(FRAMES[i, : 9 - up, -1:], right, axis=1))


def test_a_camera_that_stands_still_changes_nothing():
    for frames in (FRAMES, FRAMES[:1]):  # one frame has no time to move in
        moved, mask = camera_move(frames, pan=(0, 0) if len(frames) > 1 else (5, 5))
        np.testing.assert_array_equal(moved, frames)
        assert not mask.any()


def test_twice_as_close_a_ramp_rises_half_as_fast():
    ramp = np.broadcast_to((20 * np.arange(11)).astype(np.uint8)[None, None, :, None], (2, 9, 11, 3))
    moved, mask = camera_move(ramp, zoom=2.0)
    np.testing.assert_array_equal(moved[0], ramp[0])
    np.testing.assert_array_equal(moved[1, :, :, 0], np.broadcast_to(100 + 10 * (np.arange(11) - 5), (9, 11)))
    assert not mask.any()


def test_fine_stripes_seen_from_far_are_their_mean():
    stripes = np.broadcast_to((np.arange(64) % 2 * 255).astype(np.uint8)[None, None, :, None], (2, 64, 64, 3))
    moved, mask = camera_move(stripes, zoom=0.3)
    assert np.abs(moved[1][mask[1] < 0.5] - 127.5).max() < 8


@pytest.mark.parametrize(("pan", "zoom"), [((2.5, 1.0), 1.0), ((-4.0, 3.0), 1.7), ((0.0, 0.0), 0.6), ((3.0, 0.0), 0.5)])
def test_any_move_against_a_bilinear_read_of_its_own(pan, zoom):
    # Far off, detail is smoothed, but a ramp stays one.
    y, x = np.mgrid[0:9, 0:11]
    frames = FRAMES if zoom >= 1 else np.broadcast_to((10 * y + 12 * x)[None, ..., None].astype(np.uint8), FRAMES.shape)
    moved, mask = camera_move(frames, pan, zoom)
    picture, rows, columns = seen(frames, pan, zoom)
    away = np.ones(mask.shape, bool) if zoom >= 1 else (
        ((rows >= 3) & (rows <= 5))[:, :, None] & ((columns >= 3) & (columns <= 7))[:, None, :]
    )  # fmt: skip
    assert away[-1].any() and np.abs(moved - picture)[away].max() <= 0.5 + (zoom < 1) * 0.6
    height, width = FRAMES.shape[1:3]
    inside = ((rows >= -1e-9) & (rows <= height - 1 + 1e-9))[:, :, None] & (
        (columns >= -1e-9) & (columns <= width - 1 + 1e-9)
    )[:, None, :]
    np.testing.assert_array_equal(mask, ~inside)
    if zoom < 1:
        # At half the distance the old frame fills the middle half: a border on all four sides comes into view.
        assert mask[-1, 0].all() and mask[-1, -1].all() and mask[-1, :, -1].all() and not mask[-1, 4, 4]
