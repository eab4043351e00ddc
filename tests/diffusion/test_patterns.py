"""The training mixture: frequencies of its rows, and what each pattern promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.patterns import ROWS, Mixture, draw_batch
from vdiff_jax.diffusion.schedule import Cosine

DRAWS, F, H, W = 6000, 8, 6, 5
SCHEDULE = Cosine()


@pytest.fixture(scope="module")
def drawn():
    """Anchors, delivered at the mixture's rate as a loader would, and patterns of many clips, as numpy."""
    anchor = np.random.default_rng(0).random(DRAWS) < Mixture().anchor_probability()
    draw = jax.jit(lambda key, anchor: draw_batch(key, Mixture(), SCHEDULE, DRAWS, F, H, W, anchor))
    return anchor, jax.tree.map(np.asarray, draw(jax.random.key(0), anchor))


def whole_frames(pattern):
    return pattern.mask[..., 0].all(axis=(2, 3))


def close_to(share, probability, draws=DRAWS):
    """Within four deviations of a binomial share."""
    return abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / draws)


def test_rows_have_their_probabilities_with_anchors_in_use(drawn):
    anchor, pattern = drawn
    mixture = Mixture()
    for number, row in enumerate(ROWS):
        assert close_to((pattern.row == number).mean(), getattr(mixture, row)), row
    assert close_to(anchor.mean(), 0.06)


def test_rows_have_their_probabilities_without_anchors():
    pattern = jax.jit(lambda key: draw_batch(key, Mixture(), SCHEDULE, DRAWS, F, 2, 2))(jax.random.key(1))
    for number, row in enumerate(ROWS):
        assert close_to((np.asarray(pattern.row) == number).mean(), getattr(Mixture(), row)), row


def test_something_is_always_unknown_and_masks_are_binary(drawn):
    _, pattern = drawn
    assert set(np.unique(pattern.mask)) == {0.0, 1.0}
    assert (pattern.mask == 0).any(axis=(1, 2, 3, 4)).all()


def test_text_to_video_and_independent_rows_know_nothing(drawn):
    _, pattern = drawn
    for row in ("text_to_video", "independent"):
        assert pattern.mask[pattern.row == ROWS.index(row)].max() == 0


def test_known_frames_are_whole_and_of_every_kind(drawn):
    anchor, pattern = drawn
    chosen = (pattern.row == ROWS.index("known_frames")) & ~anchor
    frames = whole_frames(pattern)[chosen]
    np.testing.assert_array_equal(pattern.mask[chosen].mean(axis=(2, 3, 4)), frames)
    assert frames.any(axis=1).mean() > 0.97  # random frames may all be unknown
    patterns, counts = np.unique(frames, axis=0, return_counts=True)
    shares = {"".join("k" if known else "." for known in row): n / len(frames) for row, n in zip(patterns, counts)}
    for expected in ("kk......", "kkkkkk..", "k......k", "kk.....k", "kk....kk", "k.k.k.k.", "k...k...", ".......k"):
        assert expected in shares, expected
    assert "kkkkkkk." not in {name for name, share in shares.items() if share > 0.005}  # prefixes end before that
    # A prefix of one frame: .2 / .8 of the prefixes (half of them have anchors), and the row "first only".
    expected = (0.4 * 0.5 / 6 + 0.10) / 0.8
    assert close_to(shares["k......."], expected, draws=len(frames) // 2)


def test_anchored_clips_know_the_anchor_and_a_prefix_behind_it(drawn):
    anchor, pattern = drawn
    frames = whole_frames(pattern)[anchor]
    assert (pattern.row[anchor] == ROWS.index("known_frames")).all()
    assert frames[:, :2].all()  # the anchor and at least one frame
    assert (np.diff(frames.astype(int), axis=1) <= 0).all() and not frames[:, -1].any()


def test_unknown_frames_share_one_level_but_for_ramps_and_independent_rows(drawn):
    _, pattern = drawn
    shared = np.isin(pattern.row, [0, 1, 2])
    assert np.ptp(pattern.logsnr[shared], axis=1).max() == 0
    assert (np.ptp(pattern.logsnr[pattern.row == ROWS.index("independent")], axis=1) > 1).mean() > 0.99
    assert pattern.logsnr.min() >= -10 and pattern.logsnr.max() <= 10


def test_levels_are_those_of_the_schedule(drawn):
    _, pattern = drawn
    quantiles = np.linspace(0.05, 0.95, 19)
    for row in ("text_to_video", "independent"):
        u = np.asarray(SCHEDULE.u(jnp.asarray(pattern.logsnr[pattern.row == ROWS.index(row)])))
        np.testing.assert_allclose(np.quantile(u, quantiles), quantiles, atol=0.05)


def test_ramps_are_linear_between_the_ends_of_the_range(drawn):
    _, pattern = drawn
    ramps = pattern.row == ROWS.index("ramp")
    levels = pattern.logsnr[ramps]
    slopes = np.diff(levels, axis=1)
    inside = (np.abs(levels[:, :-1]) < 9.999) & (np.abs(levels[:, 1:]) < 9.999)
    steep = np.where(inside, slopes, np.nan)
    spread = np.nanmax(steep, axis=1, initial=-99, where=inside) - np.nanmin(steep, axis=1, initial=99, where=inside)
    assert spread[inside.sum(1) > 1].max() < 1e-4
    k = np.abs(steep[inside])
    assert k.min() >= 20 / F - 1e-4 and k.max() <= 10 + 1e-4
    falls = (slopes <= 0).all(axis=1) & (slopes < 0).any(axis=1)
    rises = (slopes >= 0).all(axis=1) & (slopes > 0).any(axis=1)
    assert close_to(falls.sum() / (falls | rises).sum(), 0.8, draws=(falls | rises).sum())
    heads = whole_frames(pattern)[ramps]
    np.testing.assert_array_equal(np.unique(heads.sum(1)), [0, 1, 2])
    assert (np.diff(heads.astype(int), axis=1) <= 0).all()


def test_holes_leave_most_known_and_a_third_have_known_ends(drawn):
    _, pattern = drawn
    holes = pattern.mask[pattern.row == ROWS.index("hole")][..., 0]
    unknown = (holes == 0).sum(axis=(2, 3))
    ends_known = (unknown[:, 0] == 0) & (unknown[:, -1] == 0)
    assert close_to(ends_known.mean(), 1 / 3, draws=len(holes))
    assert unknown[:, 1:-1].min() >= 1  # every other frame has a hole
    assert 0.1 < (holes == 0).mean() < 0.5
    still = (holes[:, 1:-1] == holes[:, 1:2]).all(axis=(1, 2, 3))
    assert 0.4 < still.mean() < 0.8  # tubes and half-planes stand still, boxes and brushes move


def test_context_is_clean_in_half_of_the_clips_and_noisy_in_range_else(drawn):
    _, pattern = drawn
    level = pattern.context_logsnr
    np.testing.assert_array_equal(level, np.broadcast_to(level[:, :1], level.shape))
    clean = level[:, 0] == 10
    assert close_to(clean.mean(), 0.5)
    noisy = level[~clean, 0]
    assert noisy.min() >= 3 and noisy.max() <= 10
    np.testing.assert_allclose(np.quantile(noisy, [0.25, 0.5, 0.75]), [4.75, 6.5, 8.25], atol=0.3)


@pytest.mark.parametrize(("frames", "size"), [(1, 3), (2, 1), (3, 2)])
def test_small_clips_keep_the_promises(frames, size):
    anchor = jnp.arange(300) % 4 == 0 if frames > 1 else None
    pattern = jax.jit(lambda key: draw_batch(key, Mixture(), SCHEDULE, 300, frames, size, size, anchor))(
        jax.random.key(2)
    )
    mask = np.asarray(pattern.mask)
    assert (mask == 0).any(axis=(1, 2, 3, 4)).all()
    assert np.isfinite(pattern.logsnr).all()
    if frames == 1:
        assert np.asarray(pattern.row).max() == 0 and mask.max() == 0
    else:
        assert mask[::4, 0].all()


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match=r"rows sum to 1\.1"):
        dataclasses.replace(Mixture(), hole=0.25)
