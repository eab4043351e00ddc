"""Degradations against independent computations, and as linear maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vdiff_jax.editing import degradations as d

SHAPE = (2, 4, 12, 16, 3)
VIDEO = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
MASK = np.random.default_rng(1).random((4, 12, 16)) < 0.6

LINEAR = {
    "identity": d.identity(),
    "area": d.downsample(4),
    "bicubic": d.downsample(2, "bicubic"),
    "gaussian": d.gaussian_blur(1.3),
    "motion": d.motion_blur(7, 30),
    "mask": d.mask_pixels(MASK),
    "blocks": d.block_mask(SHAPE[1:4], 4, 0.5),
    "mosaic": d.mosaic(5),
    "grayscale": d.grayscale(),
    "frames": d.keep_frames([0, -1]),
    "composed": d.compose(d.gaussian_blur(0.8), d.downsample(2)),
    "own": d.from_function(lambda video, gain: gain * video[:, :, ::2], jnp.float32(0.5)),
}


def run(degradation, video=VIDEO):
    return np.asarray(degradation(jnp.asarray(video)))


@pytest.mark.parametrize("name", LINEAR)
def test_the_derivative_is_the_map_and_its_transpose(name):
    degradation, rng = LINEAR[name], np.random.default_rng(2)
    other = rng.standard_normal(SHAPE).astype(np.float32)
    y, pull = jax.vjp(degradation, jnp.asarray(VIDEO))
    _, tangent = jax.jvp(degradation, (jnp.asarray(VIDEO),), (jnp.asarray(other),))
    np.testing.assert_allclose(tangent, run(degradation, other), atol=1e-5)
    np.testing.assert_allclose(run(degradation, VIDEO + 2 * other), y + 2 * tangent, atol=1e-5)
    u = rng.standard_normal(y.shape).astype(np.float32)
    (back,) = pull(jnp.asarray(u))
    forth = np.sum(run(degradation, other).astype(np.float64) * u)
    assert forth == pytest.approx(np.sum(other.astype(np.float64) * np.asarray(back)), abs=1e-3)
    assert abs(forth) > 0.1


@pytest.mark.parametrize("name", sorted(set(LINEAR) - {"mask", "blocks", "own"}))
def test_a_flat_picture_stays_flat(name):
    np.testing.assert_allclose(run(LINEAR[name], np.full(SHAPE, 0.37, np.float32)), 0.37, atol=1e-6)


def test_area_downsampling_and_mosaic_are_means_of_blocks():
    small, tiles = run(LINEAR["area"]), run(LINEAR["mosaic"])
    assert small.shape == (2, 4, 3, 4, 3)
    np.testing.assert_allclose(small[1, 2, 1, 3], VIDEO[1, 2, 4:8, 12:16].mean((0, 1)), atol=1e-6)
    assert tiles.shape == SHAPE
    for rows, columns in ((slice(0, 5), slice(5, 10)), (slice(10, 12), slice(15, 16))):
        block = np.broadcast_to(VIDEO[1, 2, rows, columns].mean((0, 1)), VIDEO[1, 2, rows, columns].shape)
        np.testing.assert_allclose(tiles[1, 2, rows, columns], block, atol=1e-6)
    np.testing.assert_allclose(run(LINEAR["mosaic"], tiles), tiles, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_bicubic_downsampling_is_pillow_s(factor):
    small = run(d.downsample(factor, "bicubic"))
    size = (16 // factor, 12 // factor)
    for frame in (0, 3):
        for channel in range(3):
            image = Image.fromarray(VIDEO[1, frame, :, :, channel])
            expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
            np.testing.assert_allclose(small[1, frame, :, :, channel], expected, atol=1e-5)


@pytest.mark.parametrize("std_px", [0.5, 1.3, 6.0])  # the last reaches over more than one mirror
def test_gaussian_blur_is_scipy_s_with_reflected_borders(std_px):
    expected = ndimage.gaussian_filter(VIDEO, (0, 0, std_px, std_px, 0), mode="reflect", truncate=4.0)
    np.testing.assert_allclose(run(d.gaussian_blur(std_px)), expected, atol=1e-5)


@pytest.mark.parametrize(("length", "angle"), [(7, 30), (4, 90), (5.5, -70)])
def test_motion_blur_is_scipy_s_convolution_with_its_kernel(length, angle):
    kernel = d.motion_kernel(length, angle)
    expected = ndimage.convolve(VIDEO, kernel[None, None, :, :, None], mode="reflect")
    np.testing.assert_allclose(run(d.motion_blur(length, angle)), expected, atol=1e-5)


def test_a_motion_kernel_is_a_line_of_its_length_at_its_angle():
    np.testing.assert_allclose(d.motion_kernel(1, 40), [[1.0]])
    horizontal, vertical = d.motion_kernel(5, 0), d.motion_kernel(5, 90)
    assert (horizontal[2] > 0).all() and horizontal.sum() == pytest.approx(horizontal[2].sum())
    np.testing.assert_allclose(vertical, horizontal.T, atol=1e-6)
    kernel = d.motion_kernel(21, 30).astype(np.float64)
    y, x = np.mgrid[-10:11, -10:11]
    moments = np.array([[(kernel * a * b).sum() for a in (x, -y)] for b in (x, -y)])
    values, vectors = np.linalg.eigh(moments)
    assert np.rad2deg(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180 == pytest.approx(30, abs=1)
    assert values[1] == pytest.approx(20**2 / 12, rel=0.05)  # the variance of a line of 20 pixels from end to end
    assert values[0] < 0.3  # and hardly any across


def test_masks_keep_what_is_observed():
    np.testing.assert_array_equal(run(d.mask_pixels(MASK)), VIDEO * MASK[None, ..., None])
    each = np.stack([MASK, ~MASK])[..., None]
    np.testing.assert_array_equal(run(d.mask_pixels(each)), VIDEO * each)


def test_a_block_mask_loses_whole_blocks_in_the_asked_number_anew_in_every_frame():
    degradation = d.block_mask((6, 20, 24), 8, 0.5, seed=3)
    mask = run(degradation, np.ones((1, 6, 20, 24, 3), np.float32))[0, ..., 0]
    blocks = mask[:, ::8, ::8]
    np.testing.assert_array_equal(mask, blocks.repeat(8, 1).repeat(8, 2)[:, :20, :24])
    assert (blocks == 0).sum(axis=(1, 2)).tolist() == [4] * 6  # of 3 x 3 blocks, halves to even
    assert len({frame.tobytes() for frame in blocks}) > 1
    again, other = (run(d.block_mask((6, 20, 24), 8, 0.5, seed), np.ones((1, 6, 20, 24, 3))) for seed in (3, 4))
    np.testing.assert_array_equal(again[0, ..., 0], mask)
    assert np.abs(other - again).max() == 1


def test_grayscale_weighs_the_primaries_as_bt_709():
    primaries = np.eye(3, dtype=np.float32).reshape(1, 3, 1, 1, 3)
    np.testing.assert_allclose(run(d.grayscale(), primaries).ravel(), [0.2126, 0.7152, 0.0722], atol=1e-6)
    gray = VIDEO[..., :1].repeat(3, axis=-1)
    np.testing.assert_allclose(run(d.grayscale(), gray), gray[..., :1], atol=1e-6)


def test_kept_frames_by_index_and_by_bool():
    np.testing.assert_array_equal(run(d.keep_frames([0, 2])), VIDEO[:, [0, 2]])
    np.testing.assert_array_equal(run(d.keep_frames(np.array([True, False, True, False]))), VIDEO[:, [0, 2]])
    np.testing.assert_array_equal(run(d.keep_frames([0, -1])), VIDEO[:, [0, 3]])


def test_quantizing_rounds_and_lets_derivatives_through():
    np.testing.assert_allclose(run(d.quantize(256)), np.rint((VIDEO + 1) * 127.5) / 127.5 - 1, atol=1e-6)
    five = run(d.quantize(5), 1.2 * VIDEO)
    np.testing.assert_allclose(np.unique(five), [-1, -0.5, 0, 0.5, 1], atol=1e-6)
    assert np.abs(five - np.clip(1.2 * VIDEO, -1, 1)).max() <= 0.25 + 1e-6
    _, tangent = jax.jvp(d.quantize(5), (jnp.asarray(VIDEO),), (jnp.asarray(2 * VIDEO),))
    np.testing.assert_array_equal(tangent, 2 * VIDEO)


def test_composition_is_one_after_the_other():
    expected = run(d.downsample(2), run(d.gaussian_blur(0.8)))
    np.testing.assert_allclose(run(LINEAR["composed"]), expected, atol=1e-6)
    assert LINEAR["composed"].name == "gaussian blur 0.8, downsample x2 area"


@pytest.mark.parametrize("name", [*sorted(set(LINEAR) - {"own"}), "quantized"])
def test_a_first_guess_is_a_video_that_explains_what_is_seen(name):
    degradation = d.quantize(9) if name == "quantized" else LINEAR[name]
    video = np.asarray(ndimage.gaussian_filter(VIDEO, (0, 2, 3, 3, 0), mode="nearest")) * 4 + 0.3
    y = run(degradation, video)
    guesses = degradation.first_guesses(y, 0.01, SHAPE[1])
    assert len(guesses) == (d.HUES if name == "grayscale" else 1)
    for guess in guesses:
        assert guess.shape == SHAPE and guess.dtype == np.float32
        assert np.abs(run(degradation, guess) - y).mean() < 0.15 * np.abs(y).mean()


def test_a_first_guess_fills_what_is_not_observed_and_smooths_what_is_noisy():
    video = np.full(SHAPE, 0.4, np.float32)
    unseen = np.where(MASK[None, ..., None], 0.01, np.inf) * np.ones(SHAPE)
    (guess,) = d.identity().first_guesses(np.where(np.isinf(unseen), -1.0, video), unseen, SHAPE[1])
    np.testing.assert_array_equal(guess, video)
    noisy = video + 0.2 * np.random.default_rng(3).standard_normal(SHAPE)
    (guess,) = d.identity().first_guesses(noisy, 0.2, SHAPE[1])
    assert np.abs(guess - video).mean() < 0.5 * np.abs(noisy - video).mean()


def test_functions_of_one_s_own_have_the_guess_they_are_given():
    assert LINEAR["own"].first_guesses(run(LINEAR["own"]), 0.01, 4) == []
    assert d.compose(LINEAR["own"], d.downsample(2)).guess is None
    doubled = d.from_function(lambda video: 2 * video, guess=lambda y, noise_std, num_frames: [y / 2])
    (guess,) = d.compose(doubled, d.gaussian_blur(0.5)).first_guesses(np.ones(SHAPE, np.float32), 0.01, 4)
    np.testing.assert_allclose(guess, 0.5, atol=1e-5)


def test_a_degradation_is_data_of_a_compiled_function():
    traces = []

    @jax.jit
    def apply(degradation, video):
        traces.append(degradation.name)
        return degradation(video)

    first, second = (d.mask_pixels(mask) for mask in (MASK, ~MASK))
    np.testing.assert_array_equal(apply(first, VIDEO) + apply(second, VIDEO), VIDEO)
    np.testing.assert_allclose(apply(LINEAR["composed"], VIDEO), run(LINEAR["composed"]), atol=1e-6)
    apply(d.compose(d.gaussian_blur(0.8), d.downsample(2)), VIDEO)  # made anew, yet the same
    apply(d.keep_frames([0, 2]), VIDEO)
    apply(d.keep_frames([0, 2]), VIDEO)
    assert traces == ["mask", "gaussian blur 0.8, downsample x2 area", "some frames"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.downsample(0), "factor=0 must be at least 1"),
        (lambda: d.downsample(2, "lanczos"), "kind 'lanczos' is unknown; use one of area, bicubic"),
        (lambda: run(d.downsample(5)), "video of 12 x 16 cannot be downsampled by 5"),
        (lambda: d.mosaic(0), "block=0"),
        (lambda: d.gaussian_blur(0.0), "std_px=0.0"),
        (lambda: d.motion_blur(0.5, 0), "length=0.5"),
        (lambda: d.mask_pixels(MASK[0]), r"mask of shape \(12, 16\)"),
        (lambda: d.block_mask((4, 12, 16), 4, 50), "missing=50 is a share"),
        (lambda: d.keep_frames([]), "at least one frame"),
        (lambda: run(d.keep_frames([0, 4])), "lie outside a clip of 4 frames"),
        (lambda: run(d.keep_frames([True, False])), "2 entries; the clip has 4"),
        (lambda: d.quantize(1), "levels=1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
