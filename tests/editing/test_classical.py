"""Classical restoration against other programs, closed forms and what it is for."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vdiff_jax.editing import classical as base
from vdiff_jax.editing.degradations import block_mask, gaussian_blur
from vdiff_jax.evaluation.metrics import psnr

RNG = np.random.default_rng(0)


def smooth_video(f=5, h=24, w=32):
    rough = RNG.standard_normal((2, f, h, w, 3))
    smooth = ndimage.gaussian_filter(rough, (0, 1, 3, 3, 0))
    return (0.4 * smooth / smooth.std()).astype(np.float32)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_upsampling_is_pillow_s(factor):
    video = smooth_video(2, 6, 8)
    large = base.bicubic_upsample(video, factor)
    assert large.shape == (2, 2, 6 * factor, 8 * factor, 3) and large.dtype == np.float32
    for channel in range(3):
        image = Image.fromarray(video[1, 0, :, :, channel]).resize((8 * factor, 6 * factor), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(large[1, 0, :, :, channel], np.asarray(image), atol=1e-5)


def test_the_median_removes_impulses_and_keeps_edges():
    clean = np.broadcast_to((np.arange(16) > 7)[None, None, None, :, None], (1, 6, 12, 16, 3)).astype(np.float32)
    noisy = np.where(RNG.random(clean.shape) < 0.03, 1 - clean, clean)
    assert (noisy != clean).any()
    np.testing.assert_array_equal(base.median_denoise(noisy), clean)


def test_filling_uses_what_is_seen_around_in_space_and_time():
    still = np.broadcast_to(smooth_video(1), (2, 5, 24, 32, 3))
    observed = np.ones((5, 24, 32), bool)
    observed[2, 4:16, 8:20] = False
    filled = base.fill_missing(np.where(observed[None, ..., None], still, 9.0), observed)
    np.testing.assert_array_equal(filled[:, [0, 1, 3, 4]], still[:, [0, 1, 3, 4]])
    assert psnr(filled, still) > 40
    # A hole in all frames is closed from its rim, and a flat clip stays flat.
    observed[:, 4:16, 8:20] = False
    flat = np.where(observed[None, ..., None], np.float32(0.3), np.nan) * np.ones((2, 1, 1, 1, 3), np.float32)
    np.testing.assert_allclose(base.fill_missing(flat, observed), 0.3, atol=1e-7)
    # Masks per clip are taken as they are: the median of the 26 neighbours of one pixel.
    each = np.ones((2, 5, 24, 32, 1), bool)
    each[1, 2, 10, 10] = False
    moving = smooth_video()
    around = moving[1, 1:4, 9:12, 9:12].reshape(27, 3)
    filled = base.fill_missing(moving, each)
    np.testing.assert_allclose(filled[1, 2, 10, 10], np.median(np.delete(around, 13, axis=0), axis=0), atol=1e-7)
    assert (filled != moving).sum() == 3


def test_lost_blocks_of_a_still_clip_come_back_from_other_frames():
    video = np.broadcast_to(smooth_video(1), (2, 5, 24, 32, 3))
    mask = np.asarray(block_mask(video.shape[1:4], 8, 0.5).parameters[0])
    assert psnr(base.fill_missing(video * mask, mask > 0.5), video) > psnr(video * mask, video) + 6


def test_wiener_deconvolution_undoes_a_blur():
    y, x = np.mgrid[0:24, 0:32]
    squares = 0.8 * ((abs(y - 12) < 6) & (abs(x - 10) < 5)) - 0.5 * ((abs(y - 8) < 4) & (abs(x - 24) < 5))
    video = np.broadcast_to(squares[None, None, ..., None], (2, 2, 24, 32, 3)).astype(np.float32)
    degradation = gaussian_blur(1.5)
    column, row = (np.asarray(line) for line in degradation.parameters)
    blurred = np.asarray(degradation(video))
    # With the same border and next to no noise, the blur is undone.
    smooth = smooth_video(2)
    undone = base.wiener_deconvolve(np.asarray(degradation(smooth)), column * row, 1e-5)
    assert psnr(undone, smooth) > 60 > psnr(np.asarray(degradation(smooth)), smooth) + 20
    noisy = blurred + 0.02 * RNG.standard_normal(blurred.shape)
    restored = base.wiener_deconvolve(noisy, column * row, 0.02)
    assert psnr(restored, video) > psnr(noisy, video) + 1
    flat = np.full((1, 1, 8, 8, 3), 0.4, np.float32)
    np.testing.assert_allclose(base.wiener_deconvolve(flat, column * row, 0.1), flat, atol=1e-6)


def test_a_moved_kernel_is_a_moved_picture():
    video = smooth_video(1)
    shift = np.zeros((3, 3))
    shift[1, 2] = 1  # convolution with it moves the picture one pixel to the right
    blurred = ndimage.convolve(video, shift[None, None, :, :, None], mode="reflect")
    np.testing.assert_array_equal(blurred[:, :, :, 1:], video[:, :, :, :-1])
    restored = base.wiener_deconvolve(blurred, shift, 1e-6)
    assert psnr(restored[..., 4:-4, 4:-4, :], video[..., 4:-4, 4:-4, :]) > 40


def test_a_tint_keeps_all_luma_and_leaves_the_dark_grey():
    luma = np.linspace(-1, 1, 21, dtype=np.float32).reshape(1, 1, 3, 7, 1)
    for angle in np.linspace(0, 2 * np.pi, 9):
        video = base.tint(luma, angle)
        np.testing.assert_allclose(video @ np.array(base.LUMA), luma[..., 0], atol=1e-6)
        assert np.abs(video).max() <= 1 + 1e-6
        np.testing.assert_allclose(video[0, 0, 0, 1], video[0, 0, 0, 1].mean(), atol=0.02)  # luma .05 of 1
        y, i = np.unravel_index(12, (3, 7))  # luma .6
        red, green, blue = video[0, 0, y, i]
        found = np.arctan2(np.sqrt(0.75) * (green - blue), red - (green + blue) / 2)
        assert np.cos(found - angle) > 0.999


def test_unsharp_masking_steepens_an_edge_and_keeps_flat_parts():
    edge = np.broadcast_to((np.arange(32) > 15)[None, None, None, :, None], (1, 1, 8, 32, 3)).astype(np.float32)
    soft = ndimage.gaussian_filter(edge, (0, 0, 2, 2, 0))
    sharp = base.unsharp(soft, 2.0, 1.0)
    slope = [np.diff(clip[0, 0, 4, :, 0]).max() for clip in (soft, sharp)]
    # Slope of an edge of width 2 and of width 2 sqrt 2: 2 s(2) - s(2.83).
    assert slope[1] / slope[0] == pytest.approx(2 - 1 / np.sqrt(2), rel=0.02)
    np.testing.assert_allclose(sharp[..., 0, :], 0, atol=1e-5)


def test_frames_are_repeated_or_blended():
    values = np.array([1.0, 2.0, 6.0], np.float32)[None, :, None, None, None] * np.ones((1, 1, 4, 4, 3), np.float32)
    repeated, blended = (make(values, [1, 3, 5], 7) for make in (base.repeat_frames, base.blend_frames))
    np.testing.assert_array_equal(repeated[0, :, 0, 0, 0], [1, 1, 1, 2, 2, 6, 6])
    np.testing.assert_allclose(blended[0, :, 0, 0, 0], [1, 1, 1.5, 2, 4, 6, 6])
    assert blended.dtype == np.float32


def test_luma_becomes_three_channels():
    luma = smooth_video()[..., :1]
    np.testing.assert_array_equal(base.gray_copy(luma), np.concatenate([luma] * 3, axis=-1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: base.bicubic_upsample(v, 0), "factor=0"),
        (lambda v: base.bicubic_upsample(v[0], 2), r"must be \[b f h w c\]"),
        (lambda v: base.fill_missing(v, np.zeros((5, 24, 32))), "no pixel is observed"),
        (lambda v: base.wiener_deconvolve(v, np.ones((2, 3)), 0.1), "odd sizes"),
        (lambda v: base.wiener_deconvolve(v, np.ones((3, 3)), 0.0), "noise_std=0.0"),
        (lambda v: base.repeat_frames(v, [0, 1, 1, 2, 3], 9), "ascending"),
        (lambda v: base.blend_frames(v, [0, 1], 9), "one per frame"),
        (base.gray_copy, r"luma must be \[b f h w 1\]"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(smooth_video())
