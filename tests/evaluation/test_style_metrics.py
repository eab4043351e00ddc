"""The style metric: what it must see, what it must not, and its features against plain loops."""

import numpy as np
import pytest

from vdiff_jax.evaluation.style_metrics import COLOUR_FEATURES, FILTERS, filter_bank, style_distance, style_features

SIZE = 16


def clips(batch=2, frames=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, frames, SIZE, SIZE, 3)).astype(np.float32)


def stripes(period, colour=(0.8, -0.2, 0.1), ground=-0.9):
    x = np.arange(SIZE)
    wave = ((x % period) < period / 2).astype(np.float32)[None, None, None, :, None]
    clip = ground + wave * (np.asarray(colour, np.float32) - ground)[None, None, None, None]
    return np.broadcast_to(clip, (1, 2, SIZE, SIZE, 3)).copy()


def test_a_clip_is_at_no_distance_from_itself_and_distance_is_symmetric():
    a, b = clips(seed=0), clips(seed=1)
    np.testing.assert_allclose(style_distance(a, a), 0.0, atol=1e-12)
    np.testing.assert_allclose(style_distance(a, b), style_distance(b, a), rtol=1e-12)
    assert (style_distance(a, b) > 0).all()


def test_colour_features_are_mean_and_deviation_wherever_the_pixels_are():
    a = clips(batch=1)
    shuffled = np.random.default_rng(5).permutation(a.reshape(-1, 3)).reshape(a.shape)
    before, after = style_features(a)[0], style_features(shuffled)[0]
    np.testing.assert_allclose(after[:COLOUR_FEATURES], before[:COLOUR_FEATURES], atol=1e-12)
    expected = np.concatenate([a.mean((1, 2, 3)), a.std((1, 2, 3))], axis=1)[0] / np.sqrt(3)
    np.testing.assert_allclose(before[:COLOUR_FEATURES], expected, atol=1e-6)
    smooth = stripes(8)
    texture = np.random.default_rng(5).permutation(smooth.reshape(-1, 3)).reshape(smooth.shape)
    assert style_distance(smooth, texture)[0] > 0.05  # the same colours, another texture


def test_texture_features_are_the_gram_matrix_of_rectified_answers():
    a = clips(batch=1, frames=1).astype(np.float64)
    bank, place = filter_bank(), range(SIZE - 4)
    answers = np.array([[(a[0, 0, y : y + 5, x : x + 5, :, None] * bank).sum((0, 1, 2)) for x in place] for y in place])
    answers = np.maximum(answers.reshape(-1, FILTERS), 0)
    pairs = [(i, j) for i in range(FILTERS) for j in range(i, FILTERS)]
    gram = np.array([np.sqrt((answers[:, i] * answers[:, j]).mean()) for i, j in pairs])
    found = style_features(a)[0, COLOUR_FEATURES : COLOUR_FEATURES + len(pairs)]
    np.testing.assert_allclose(found, gram / np.sqrt(2 * len(pairs)), atol=1e-10)


def test_filters_do_not_answer_to_flat_colours():
    bank = filter_bank()
    np.testing.assert_allclose(bank.sum((0, 1)), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.square(bank).sum((0, 1, 2)), 1.0, atol=1e-12)
    black, white = (np.full((1, 1, SIZE, SIZE, 3), value, np.float32) for value in (-1, 1))
    np.testing.assert_allclose(style_features(white)[:, 3:], 0.0, atol=1e-12)
    np.testing.assert_allclose(style_distance(black, white), 2.0, rtol=1e-12)


@pytest.mark.parametrize("change", ["colour", "texture", "contrast"])
def test_distance_grows_with_the_change(change):
    base, distances = stripes(8), []
    for amount in (0.0, 0.25, 0.5, 1.0):
        if change == "colour":
            other = base + amount * np.array([0.0, 0.4, -0.05], np.float32)[None, None, None, None]
        elif change == "contrast":
            other = base * (1 - 0.6 * amount)
        else:
            other = base + 0.5 * amount * np.random.default_rng(1).choice([-1.0, 1.0], base.shape)
        distances.append(style_distance(base, other)[0])
    assert distances[0] < 1e-12 and np.all(np.diff(distances) > 0.01), distances


def test_where_an_object_is_and_how_long_the_clip_matter_little():
    """A patch elsewhere, clear of the frame's edge, is nearer than one of another colour by a factor of a hundred."""

    def patch(row, column, colour, frames=2):
        clip = np.full((1, frames, 40, 40, 3), -0.8, np.float32)
        clip[:, :, row : row + 4, column : column + 4] = colour
        return clip

    red, blue = (0.9, -0.1, -0.1), (-0.1, -0.1, 0.9)
    moved = style_distance(patch(14, 14, red), patch(16, 20, red, frames=5))[0]
    recoloured = style_distance(patch(14, 14, red), patch(14, 14, blue))[0]
    assert moved < recoloured / 100, (moved, recoloured)


def test_u8_frames_are_read_as_video_and_wrong_shapes_are_refused():
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, SIZE, SIZE, 3)).astype(np.uint8)
    np.testing.assert_allclose(style_features(frames), style_features(frames / 127.5 - 1), atol=1e-12)
    with pytest.raises(ValueError, match="at least 10 x 10"):
        style_features(np.zeros((1, 1, 8, 16, 3)))
    with pytest.raises(ValueError, match="b f h w 3"):
        style_features(np.zeros((1, 16, 16, 3)))
