"""Anomaly scores where the right answer is known: Gaussian clips, whose conditional surprise has a closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo

from vdiff_jax.anomaly import AnomalyEdits, AnomalyScore
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing.anomaly import Normal, combine, lay_out, normal_errors, own_errors, window_errors
from vdiff_jax.sampling.job import CLEAN_LOGSNR

CONTEXT, AHEAD = 3, 2
LEVELS = np.array([-10.0, -1.0, 2.0], np.float32)
WINDOW = GaussianVideo((CONTEXT + AHEAD, 2, 2, 1))


@functools.partial(jax.jit, static_argnames="context")
def gaussian_errors(windows, levels, keys, context=CONTEXT):
    return window_errors(WINDOW.denoise_fn, windows, levels, jnp.zeros_like(windows), keys, context=context)


def draw(shape, count, seed):
    video = GaussianVideo(shape)
    values = np.random.default_rng(seed).multivariate_normal(np.zeros(video.size), video.covariance, count)
    return values.reshape(count, *shape).astype(np.float32)


def errors_of(windows, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(windows))
    return np.asarray(gaussian_errors(jnp.asarray(windows), jnp.asarray(LEVELS), keys))


def expected_errors(level):
    """Posterior variance of every token by its precision, `K^-1 + diag(e^logsnr)`; 0 in the context."""
    per_frame = WINDOW.size // WINDOW.shape[0]
    logsnr = np.repeat([CLEAN_LOGSNR] * CONTEXT + [level] * AHEAD, per_frame)
    variance = np.diag(np.linalg.inv(np.linalg.inv(WINDOW.covariance) + np.diag(np.exp(logsnr))))
    return np.where(np.arange(WINDOW.size) < CONTEXT * per_frame, 0.0, variance).reshape(WINDOW.shape[:3])


def windows_of(clips):
    """`[b f h w c]` -> all windows `[b n k h w c]`."""
    length = CONTEXT + AHEAD
    return np.stack([clips[:, start : start + length] for start in range(clips.shape[1] - length + 1)], axis=1)


def clip_results(clips, normal):
    windows = windows_of(clips)
    errors = errors_of(windows.reshape(-1, *windows.shape[2:]), seed=5)[:, :, CONTEXT:]
    errors = errors.reshape(len(LEVELS), *windows.shape[:2], *errors.shape[2:])
    by_clip = errors.swapaxes(0, 1)
    return [lay_out(combine(each, own_errors(each) if normal is None else normal), CONTEXT) for each in by_clip]


def test_the_error_of_normal_windows_is_the_posterior_variance():
    count = 4000
    errors = errors_of(draw(WINDOW.shape, count, 0))
    assert errors.shape == (3, count, *WINDOW.shape[:3])
    for level, found in zip(LEVELS, errors):
        expected = expected_errors(level)
        slack = 5 * np.sqrt(2 / count) * expected + 1e-6  # a squared normal deviates by sqrt 2 of its mean
        assert (np.abs(found.mean(axis=0) - expected) <= slack).all()


def test_a_displaced_frame_adds_its_squared_surprise():
    # At a level that hides the frame the estimate does not move with it: an offset d adds d^2 on average.
    clips = draw(WINDOW.shape, 2000, 1)
    moved = clips.copy()
    moved[:, -1] += 3.0
    gain = (errors_of(moved) - errors_of(clips))[0].mean(axis=0)
    assert np.allclose(gain[-1], 9.0, atol=0.6)
    assert np.abs(gain[:-1]).max() < 0.1


def test_calibrated_errors_of_fresh_normal_windows_are_about_0_by_1():
    normal = normal_errors(errors_of(draw(WINDOW.shape, 3000, 2))[:, :, CONTEXT:])
    mean = np.stack([expected_errors(level)[CONTEXT:].mean(axis=(1, 2)) for level in LEVELS])
    assert normal.mean == pytest.approx(mean, rel=0.1)
    fresh = errors_of(draw(WINDOW.shape, 3000, 3), seed=1)[:, :, CONTEXT:]
    for number in range(len(LEVELS)):
        one = combine(fresh[number : number + 1], Normal(*(value[number : number + 1] for value in normal)))
        frames = one.mean(axis=(-2, -1))
        assert np.abs(frames.mean(axis=0)).max() < 0.1
        assert frames.std(axis=0) == pytest.approx(np.ones(AHEAD), abs=0.15)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_planted_frame_scores_above_all_others(calibrated):
    normal = normal_errors(errors_of(draw(WINDOW.shape, 1000, 4))[:, :, CONTEXT:]) if calibrated else None
    clips = draw((9, *WINDOW.shape[1:]), 40, 5)
    usual = [score[CONTEXT:].max() for score, _ in clip_results(clips, normal)]
    clips[:, 6, 1, 0] += 8.0
    results = clip_results(clips, normal)
    assert all(score.argmax() == 6 for score, _ in results)
    assert all(np.unravel_index(heat.argmax(), heat.shape) == (6, 1, 0) for _, heat in results)
    assert min(score.max() for score, _ in results) > max(usual)
    assert all((score[:CONTEXT] == 0).all() and (heat[:CONTEXT] == 0).all() for score, heat in results)


def test_windows_are_laid_out_by_the_most_surprising_place():
    excess = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    score, heat = lay_out(excess, context=2)
    assert score.shape == (8,) and heat.shape == (8, 2, 2)
    for frame in range(2, 8):
        seen = [excess[n, k] for n in range(4) for k in range(3) if 2 + n + k == frame]
        best = max(seen, key=lambda cells: float(cells.mean()))
        assert score[frame] == pytest.approx(best.mean(), rel=1e-6)
        assert np.array_equal(heat[frame], best)


# A whole model, always with windows of one shape ----------------------------------------------------------------

OPTIONS = dict(context=3, ahead=1, batch_size=2)


def tiny_clip(num_frames=8, size=(16, 16), seed=0):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3))
    return Clip(frames.astype(np.uint8), 8.0)


def test_scores_of_a_model_have_the_clips_size_and_do_not_depend_on_batches(model):
    session = AnomalyEdits(model, tiny_clip(size=(24, 20)))
    result = session.anomaly(**OPTIONS)
    assert result.score.shape == (8,) and result.heat.shape == (8, 24, 20)
    assert result.score.dtype == result.heat.dtype == np.float32
    assert np.isfinite(result.score).all() and np.isfinite(result.heat).all()
    assert (result.score[:3] == 0).all() and (result.heat[:3] == 0).all()
    assert result.peak >= 3
    # Blur and enlargement keep a frame's mean, up to the border.
    off = np.abs(result.heat.mean(axis=(1, 2)) - result.score)
    assert off.max() < 0.1 * np.abs(result.heat).max()
    alone = session.anomaly(**(OPTIONS | dict(batch_size=1)))
    assert alone.score == pytest.approx(result.score, abs=1e-3)


def test_a_clip_is_usual_on_average_by_its_own_calibration(model):
    # One frame ahead: no choice among windows that would lift the mean. The same level twice keeps the deviation.
    session = AnomalyEdits(model, tiny_clip())
    options = dict(OPTIONS, levels=(-1.0, -1.0))
    normal = session.calibrate([session.clip], **options)
    result = session.anomaly(calibrate=normal, **options)
    assert result.score[3:].mean() == pytest.approx(0.0, abs=1e-3)
    assert result.score[3:].std(ddof=1) == pytest.approx(1.0, abs=1e-3)
    short = AnomalyEdits(model, tiny_clip(4)).anomaly(calibrate=normal, **(options | dict(ahead=4)))
    assert short.score.shape == (4,) and short.peak == 3  # what it is too short for is not asked of it
    other = session.anomaly(calibrate=[tiny_clip(seed=1), tiny_clip(10, seed=2)], **options)
    assert np.isfinite(other.score).all() and not np.allclose(other.score, result.score)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (3, dict(context=3), "longer clip"),
        (8, dict(context=0), "context=0"),
        (8, dict(levels=()), "levels"),
        (8, dict(calibrate=[]), "at least one clip"),
        (8, dict(calibrate=[tiny_clip(3)]), "shortest of 3"),
        (8, dict(calibrate=Normal(np.ones((2, 3)), np.ones((2, 3)))), "ahead=3"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(model, frames, options, message):
    with pytest.raises(ValueError, match=message):
        AnomalyEdits(model, tiny_clip(frames)).anomaly(**options)


def test_too_few_windows_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        normal_errors(np.ones((2, 1, 3, 2, 2)))
    with pytest.raises(ValueError, match="at least 3"):
        own_errors(np.ones((2, 2, 3, 2, 2)))


def test_the_sheet_reddens_what_is_hot_and_nothing_else():
    clip = tiny_clip(4)
    heat = np.zeros((4, 16, 16), np.float32)
    heat[2, 3, 5], heat[1] = 2.0, -1.0
    result = AnomalyScore(heat.mean(axis=(1, 2)), heat, 1)
    sheet = result.sheet(clip)
    changed = (sheet != clip.frames).any(axis=-1)
    assert sheet.dtype == np.uint8 and sheet.shape == clip.frames.shape
    assert np.argwhere(changed).tolist() == [[2, 3, 5]]
    expected = 0.2 * clip.frames[2, 3, 5] + 0.8 * np.array([255, 0, 0])
    assert np.abs(sheet[2, 3, 5] - expected).max() <= 0.5
    half = 0.6 * clip.frames[2, 3, 5] + 0.4 * np.array([255, 0, 0])
    assert np.abs(result.sheet(clip, full=4.0)[2, 3, 5] - half).max() <= 0.5
    assert result.peak == 2 and result.onset(0.001) == 2 and result.onset(5.0) is None
    with pytest.raises(ValueError, match="must agree"):
        result.sheet(tiny_clip(3))
    with pytest.raises(ValueError, match="full=0"):
        result.sheet(clip, full=0)


def test_a_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AnomalyScore(np.zeros(2), np.zeros((2, 1, 1)), 1).score = np.ones(2)
