"""The noise estimate on clips with noise of known size."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from vdiff_jax.data.shapes import draw_records, make_world, render, split_rng
from vdiff_jax.editing.noise_estimate import estimate_noise

LEVELS = np.array([0.01, 0.03, 0.1, 0.3], np.float32)


def shapes_clips():
    world = make_world("small", size=32)
    records = draw_records(split_rng("train", 0), world, "train", 4)
    times = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    return np.asarray(jax.jit(render, static_argnames="world")(records, times, world=world))


def smooth_clips():
    rough = np.random.default_rng(0).standard_normal((4, 8, 40, 40, 3))
    smooth = ndimage.gaussian_filter(rough, (0, 1, 4, 4, 0))
    return (0.5 * smooth / smooth.std()).astype(np.float32)


@pytest.mark.parametrize("clips", [shapes_clips, smooth_clips])
def test_white_noise_is_found_within_ten_per_cent_in_every_clip(clips):
    video = clips()
    noise = np.random.default_rng(1).standard_normal(video.shape).astype(np.float32)
    found = estimate_noise(video + LEVELS[:, None, None, None, None] * noise)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, LEVELS, rtol=0.1)


def test_gradients_and_straight_edges_are_no_noise():
    y, x = np.mgrid[0:20, 0:20] / 20
    ramp = np.broadcast_to((0.5 * x + 0.3 * y - 0.4)[None, None, ..., None], (1, 2, 20, 20, 3))
    step = np.broadcast_to((x > 0.4)[None, None, ..., None], ramp.shape)
    np.testing.assert_allclose(estimate_noise(np.concatenate([ramp, step]).astype(np.float32)), 0, atol=1e-6)


def test_frames_too_small_are_named():
    with pytest.raises(ValueError, match="at least 3 x 3"):
        estimate_noise(np.zeros((1, 4, 2, 8, 3), np.float32))
