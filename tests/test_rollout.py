"""Clips of any length: what every window is told, and the law of long clips where the exact denoiser is known."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.rollout import LONGEST_ANCHOR, RollOut, generate_long, prompt_at, prompt_changes, roll_out
from vdiff_jax.sampling.job import CLEAN_LOGSNR, START_STREAM, stream, uniform_plan
from vdiff_jax.sampling.samplers import SAMPLERS, sample
from vdiff_jax.sampling.windows import CONTEXT_LOGSNR
from vdiff_jax.types import Job

QUICK = dict(steps=2, guidance_scale=1.0)
IDENTITY = 0.5
"""Share of the variance that never changes along a stream: who it is. The rest forgets by 0.7 a frame."""


@dataclasses.dataclass(frozen=True)
class Stream(GaussianVideo):
    """Frames of one number each at any `times [f]`, covariance IDENTITY + (1 - IDENTITY) 0.7^|t - t'|."""

    times: jax.Array | None = None

    @property
    def covariance(self):
        apart = jnp.abs(self.times[:, None] - self.times[None])
        return IDENTITY + (1 - IDENTITY) * 0.7**apart


@functools.partial(jax.jit, static_argnames="steps")
def draw(known, times, keys, steps=25):
    """Exact conditional clips of the stream, by the one sampler."""
    shape = known.latents.shape
    plan = uniform_plan(LinearLogSNR(-12.0, 10.0), steps, *shape[:2])
    start = draw_noise(stream(keys, START_STREAM), shape[1:])
    denoise_fn = Stream(shape[1:], times).denoise_fn
    return sample(denoise_fn, Job(start, plan, known, jnp.zeros(shape)), SAMPLERS["dpmpp_2m"], keys)


class StreamModel:
    """The stream as a model that completes clips; keeps what it was told of every window."""

    def __init__(self):
        self.windows = []

    def complete(self, known, prompts, *, keys, times):
        self.windows.append((known, prompts, np.asarray(times)))
        return draw(known, times, keys)


def keys_at(number, batch=1):
    return jax.random.split(jax.random.fold_in(jax.random.key(5), number), batch)


def told(first, num_frames, options, **arguments):
    """The windows that a roll-out asks for, and the frames it yields."""
    model, asked = StreamModel(), []

    def prompts_at(done):
        asked.append(done)
        return None

    parts = list(roll_out(model, first, num_frames, prompts_at, options, keys_at=keys_at, **arguments))
    return model.windows, asked, parts


FIRST = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 1, 1)), jnp.float32)
OPTIONS = RollOut(window=6, context=3)


@pytest.mark.parametrize("given", [True, False])
def test_every_window_knows_the_anchor_and_the_last_frames_at_their_levels_and_times(given):
    windows, asked, parts = told(FIRST, 7, dataclasses.replace(OPTIONS, statistics=0.0), given=given, spacing=2.0)
    assert asked == [4, 6, 8, 10] and [part.shape[1] for part in parts] == [2, 2, 2, 1]
    clip = np.concatenate([FIRST, *parts], axis=1)
    # Frames that were given are shown clean, as long as they are context; what was made, under noise.
    real = 4 if given else 0
    for done, (known, _, times) in zip(asked, windows):
        shown = [0, done - 3, done - 2, done - 1]
        np.testing.assert_array_equal(known.mask[0, :, 0, 0, 0], [1, 1, 1, 1, 0, 0])  # one shape for all windows
        np.testing.assert_array_equal(known.latents[:, :4], clip[:, shown])
        levels = [CLEAN_LOGSNR if frame < real else CONTEXT_LOGSNR for frame in shown]
        np.testing.assert_array_equal(known.logsnr[0, :4], levels)
        np.testing.assert_allclose(times, [-2.0 * (done - 3), 0, 2, 4, 6, 8])


def test_an_anchor_from_long_ago_is_shown_at_the_longest_time_of_the_training():
    windows, *_ = told(FIRST, 7, OPTIONS, spacing=10.0)
    assert [times[0] for *_, times in windows] == [-10, -30, -50, -LONGEST_ANCHOR]


def test_without_an_anchor_there_is_more_room_for_new_frames():
    options = RollOut(window=6, context=2, anchor=False)
    windows, asked, parts = told(FIRST, 8, options, given=True)
    assert asked == [4, 8] and [part.shape[1] for part in parts] == [4, 4] and options.new_frames == 4
    np.testing.assert_allclose(windows[0][2], np.arange(6))
    np.testing.assert_array_equal(windows[1][0].logsnr[0, :2], [CONTEXT_LOGSNR] * 2)


def test_a_window_begins_where_another_prompt_comes_into_force():
    options = dataclasses.replace(OPTIONS, statistics=0.0)
    windows, asked, parts = told(FIRST, 7, options, given=True, changes=[2, 7])
    assert asked == [4, 6, 7, 9] and [part.shape[1] for part in parts] == [2, 1, 2, 2]
    assert {known.latents.shape for known, *_ in windows} == {(1, 6, 1, 1, 1)}
    clip = np.concatenate([FIRST, *parts], axis=1)
    np.testing.assert_array_equal(windows[2][0].latents[:, 1:4], clip[:, 4:7])
    np.testing.assert_array_equal(windows[1][0].logsnr[0, :4], [CLEAN_LOGSNR, CLEAN_LOGSNR, *[CONTEXT_LOGSNR] * 2])
    np.testing.assert_array_equal(windows[2][0].logsnr[0, :4], [CLEAN_LOGSNR, *[CONTEXT_LOGSNR] * 3])


def test_statistics_are_pulled_to_those_of_the_first_frames():
    first = jnp.asarray(5 + 0.1 * np.random.default_rng(1).standard_normal((1, 4, 1, 1, 1)), jnp.float32)
    (part,) = told(first, 2, dataclasses.replace(OPTIONS, statistics=1.0))[2]
    np.testing.assert_allclose([part.mean(), part.std()], [first.mean(), first.std()], atol=1e-4)


# The law of long clips -------------------------------------------------------------------------------------------

BATCH, LENGTH = 2000, 28


@functools.cache
def stream_covariance(anchor):
    """Of clips that start as the stream does and go on window by window."""
    times = np.arange(4.0)
    root = np.linalg.cholesky(np.asarray(Stream((4, 1, 1, 1), jnp.asarray(times)).covariance, np.float64))
    first = np.random.default_rng(2).standard_normal((BATCH, 4)) @ root.T
    options = RollOut(window=8, context=2, anchor=anchor, statistics=0.0)
    first = jnp.asarray(first.reshape(BATCH, 4, 1, 1, 1), jnp.float32)
    keys = functools.partial(keys_at, batch=BATCH)
    parts = roll_out(StreamModel(), first, LENGTH - 4, lambda done: None, options, keys_at=keys, given=True)
    clips = np.concatenate([first, *parts], axis=1).reshape(BATCH, LENGTH)
    return clips.T @ clips / BATCH


@pytest.mark.parametrize("anchor", [True, False])
def test_a_long_clip_moves_as_the_short_ones_do(anchor):
    # Two thousand draws know a covariance to 0.03; the noise on the context adds less than that.
    covariance = stream_covariance(anchor)
    np.testing.assert_allclose(np.diag(covariance), 1.0, atol=0.12)
    np.testing.assert_allclose(np.diag(covariance, 1), IDENTITY + (1 - IDENTITY) * 0.7, atol=0.12)
    np.testing.assert_allclose(np.diag(covariance, 1).mean(), IDENTITY + (1 - IDENTITY) * 0.7, atol=0.03)


def test_the_anchor_keeps_who_it_is():
    # From frame to frame the truth is remembered by half after any time; a window without anchor sees two frames of it.
    kept, forgotten = (stream_covariance(anchor)[0, -4:].mean() for anchor in (True, False))
    assert abs(kept - IDENTITY) < 0.08 and forgotten < IDENTITY - 0.1, (kept, forgotten)


# Prompts over time, and settings ---------------------------------------------------------------------------------


def test_the_prompt_in_force_is_the_last_that_has_begun():
    prompts = {8: "b", 2: "a", 12: "c"}
    assert [prompt_at(prompts, frame) for frame in (0, 2, 7, 8, 11, 12, 99)] == ["a", "a", "a", "b", "b", "c", "c"]
    assert prompt_changes(prompts) == [8, 12] and prompt_changes("a") == []
    assert prompt_at("one for all", 5) == "one for all"
    with pytest.raises(ValueError, match="empty mapping"):
        prompt_at({}, 0)


def test_settings_fit_the_window_and_the_clip():
    assert RollOut.fitting(16) == RollOut(window=16) and RollOut.fitting(16, have=2).context == 2
    assert RollOut.fitting(3).context == 1 and RollOut.fitting(4).new_frames == 1
    assert RollOut.fitting(16, {0: "a", 9: "b"}).statistics == 0 and RollOut.fitting(16, {0: "a"}).statistics > 0
    for window, context in ((4, 3), (4, 0), (2, 1)):
        with pytest.raises(ValueError, match=f"context={context} of a window of {window} frames"):
            RollOut(window=window, context=context)
    with pytest.raises(ValueError, match=r"the clip has 4 frame\(s\), a context of 5 is asked"):
        told(FIRST, 2, RollOut(window=8, context=5))


# A network -------------------------------------------------------------------------------------------------------


def test_all_windows_of_a_network_are_one_compiled_program(model):
    first = model.generate_latents(["a red circle"], keys=keys_at(0), **QUICK)
    compiled, options = model._run._cache_size(), RollOut(window=3, context=1)
    parts = roll_out(model, first, 4, lambda done: ["a red circle"], options, keys_at=keys_at, **QUICK)
    made = np.concatenate([np.asarray(part) for part in parts], axis=1)
    assert made.shape == (1, 4, 8, 8, 2) and np.isfinite(made).all()
    assert np.abs(np.diff(made, axis=1)).max(axis=(0, 2, 3, 4)).min() > 1e-3  # every frame is another
    assert model._run._cache_size() == compiled


def test_a_long_clip_of_changing_prompts(model):
    options, seen = RollOut(window=3, context=1, statistics=0.0), []
    arguments = dict(seed=2, options=options, **QUICK)
    both = generate_long(model, {0: "a red circle", 5: "a blue square"}, 7, **arguments)
    one = generate_long(model, "a red circle", 7, progress=lambda done, total: seen.append((done, total)), **arguments)
    assert both.frames.shape == (7, 16, 16, 3) and both.fps == 8.0
    np.testing.assert_array_equal(both.frames[:5], one.frames[:5])
    assert (both.frames[5] != one.frames[5]).any() and (both.frames[6] != one.frames[6]).any()
    assert seen == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]
    assert json.loads(json.dumps(both.metadata))["num_frames"] == 7
    short = generate_long(model, {0: "a red circle", 2: "a blue square"}, 2, **arguments)
    np.testing.assert_array_equal(short.frames, one.frames[:2])
    with pytest.raises(ValueError, match="num_frames=0"):
        generate_long(model, "", 0)
