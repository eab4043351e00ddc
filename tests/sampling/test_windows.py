"""Windows over long clips: what every list of them must fulfil, and what one hands to the next."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.sampling.job import nothing_known
from vdiff_jax.sampling.windows import CONTEXT_LOGSNR, Window, pull_statistics, window_slices, with_context
from vdiff_jax.types import Known

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (3, 0), (3, 2), (8, 3), (16, 3), (5, 4)])
def test_windows_cover_every_clip_once_and_share_their_context(length, overlap):
    for num_frames in range(1, 60):
        windows = window_slices(num_frames, length, overlap)
        done = 0
        for number, window in enumerate(windows):
            assert 0 <= window.start < window.stop <= num_frames
            assert window.stop - window.start == min(length, num_frames)  # one shape for all
            # The context is exactly what is made already: no gap, and nothing made twice.
            assert window.start + window.context == done
            assert window.context >= (overlap if number else 0)
            assert window.context == 0 or number
            assert window.stop > done
            done = window.stop
        assert done == num_frames
        # No fewer windows would do: each after the first can add at most length - overlap frames.
        assert len(windows) == 1 + max(0, -(-(num_frames - length) // (length - overlap)))


def test_the_last_window_reaches_back_to_be_as_long_as_the_others():
    assert window_slices(10, 4, 1) == [Window(0, 4, 0), Window(3, 7, 1), Window(6, 10, 1)]
    assert window_slices(9, 4, 1) == [Window(0, 4, 0), Window(3, 7, 1), Window(5, 9, 2)]


@pytest.mark.parametrize(("length", "overlap"), [(4, 4), (4, -1), (0, 0)])
def test_windows_that_lead_nowhere_are_refused(length, overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap} of windows of {length} frames"):
        window_slices(10, length, overlap)


def test_what_is_made_becomes_context_as_a_whole_and_the_rest_stays():
    shape = (2, 4, 3, 2, 1)
    latents = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    mask = jnp.asarray(RNG.random((*shape[:4], 1)) < 0.5, jnp.float32)
    known = Known(latents, mask, jnp.full(shape[:2], 9.0))
    made = jnp.asarray(RNG.standard_normal((2, 2, 3, 2, 1)), jnp.float32)
    shown = with_context(known, made)
    np.testing.assert_array_equal(shown.latents, np.concatenate([made, latents[:, 2:]], axis=1))
    np.testing.assert_array_equal(shown.mask, np.concatenate([np.ones((2, 2, 3, 2, 1)), mask[:, 2:]], axis=1))
    np.testing.assert_array_equal(shown.logsnr, [[CONTEXT_LOGSNR, CONTEXT_LOGSNR, 9.0, 9.0]] * 2)
    np.testing.assert_array_equal(with_context(known, made, 3.0).logsnr, [[3.0, 3.0, 9.0, 9.0]] * 2)
    untouched = nothing_known(shape)
    assert with_context(untouched, made[:, :0]) is untouched


def test_the_pull_moves_mean_and_deviation_by_its_weight():
    latents = jnp.asarray(3 + 2 * RNG.standard_normal((2, 4, 6, 5, 3)), jnp.float32)
    anchor = jnp.asarray(-1 + 0.5 * RNG.standard_normal((2, 7, 6, 5, 3)), jnp.float32)

    def moments(values):
        values = np.asarray(values, np.float64)
        return np.stack([values.mean((1, 2, 3)), values.std((1, 2, 3))])

    np.testing.assert_allclose(moments(pull_statistics(latents, anchor, 1.0)), moments(anchor), atol=1e-5)
    # A mixture of a value and a line of it is a line of it: both moments go the same way.
    pulled = pull_statistics(latents, anchor, jnp.float32(0.3))
    np.testing.assert_allclose(moments(pulled), 0.7 * moments(latents) + 0.3 * moments(anchor), atol=1e-5)
    np.testing.assert_array_equal(pull_statistics(latents, anchor, 0.0), latents)
    np.testing.assert_allclose(pull_statistics(latents, latents, 1.0), latents, atol=1e-5)
    flat = pull_statistics(jnp.zeros_like(latents), anchor, 1.0)  # no deviation to scale: the mean only
    np.testing.assert_allclose(moments(flat)[0], moments(anchor)[0], atol=1e-5)
    assert np.isfinite(np.asarray(flat)).all()
