"""Repairs through a model of toy size: which candidate is taken, what comes back, and what cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax import tasks
from vdiff_jax.data.transforms import resize_frames, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing import degradations
from vdiff_jax.editing.classical import bicubic_upsample
from vdiff_jax.editor import Editor
from vdiff_jax.restoration import ROUNDING_STD, impulses

RED = "a red circle moving right"


def make_clip(num_frames, height, width):
    """Smooth moving colours."""
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.float64)
    waves = [np.sin((x + 2 * t) / 5), np.cos((y - t) / 4), np.sin((x + y) / 9 + t / 3)]
    return Clip((127.5 + 110 * np.stack(waves, -1)).astype(np.uint8), 8.0)


@pytest.fixture(scope="module")
def editor(model):
    return Editor(model, make_clip(5, 20, 24))


def furthest(one, two):
    return int(np.abs(one.astype(int) - two).max())


def test_a_clip_with_next_to_no_noise_comes_back_as_the_autoencoder_makes_it(editor):
    clean = editor.restore("denoise", method="fast", noise_std=1e-6, steps=2)
    assert furthest(clean.frames, resize_frames(editor.reconstruction, 20, 24)) <= 2


def test_a_larger_clip_is_the_candidate_that_explains_the_small_one_best(model):
    small = make_clip(3, 8, 8)
    session = Editor(model, small)
    large = session.restore("superres", RED, factor=2, n_candidates=2, steps=2, iterations=1, seed=4)
    assert large.frames.shape == (3, 16, 16, 3) and large.fps == 8.0
    # The same draws, judged here: mean of 2 x 2 pixels against the small clip.
    observed = small.frames[None] / 127.5 - 1
    guess = jnp.repeat(model.encode(bicubic_upsample(observed, 2)), 2, axis=0)
    drawn = tasks.restore(
        model,
        jnp.asarray(observed, jnp.float32),
        degradations.downsample(2),
        ROUNDING_STD,
        (2, 3, 8, 8, 2),
        [RED, RED],
        keys=jax.random.split(session.keys(4)[0], 2),
        steps=2,
        iterations=1,
        first_guess=guess,
    )
    frames = model.decode(drawn)
    video = frames / 127.5 - 1
    error = np.square(video.reshape(2, 3, 8, 2, 8, 2, 3).mean(axis=(3, 5)) - observed).mean(axis=(1, 2, 3, 4))
    assert abs(error[0] - error[1]) > 1e-4
    assert furthest(large.frames, frames[np.argmin(error)]) <= 2 < furthest(large.frames, frames[np.argmax(error)])


def test_the_guess_that_explains_most_is_taken_for_each_clip(model):
    right = np.stack([make_clip(3, 16, 16).frames, make_clip(3, 16, 16).frames[:, ::-1]]) / 127.5 - 1
    guesses = [jnp.asarray(model.encode(clip.astype(np.float32))) for clip in (right[::-1], right, 0 * right)]
    options = {"keys": jax.random.split(jax.random.key(0), 2), "steps": 2, "logsnr": model.schedule.logsnr_max - 0.1}
    observed, gray = jnp.asarray(right[:1], jnp.float32), degradations.grayscale()
    latents, distances = tasks.likeliest_guess(model, guesses, gray(observed), gray, 0.1, **options)
    assert distances.shape == (3, 2)
    np.testing.assert_array_equal(np.argmin(distances, axis=0), [1, 0])  # both clips are told to show the first
    np.testing.assert_allclose(latents[0], guesses[1][0], atol=0.2)


@pytest.mark.parametrize("task", ["deblur", "unblock", "colorize"])
def test_a_posterior_begins_in_a_classical_answer_in_every_window(model, task, monkeypatch):
    started, compared = [], []
    restore, likeliest_guess = tasks.restore, tasks.likeliest_guess

    def begin(*args, first_guess, **options):
        started.append(np.asarray(first_guess))
        return restore(*args, first_guess=first_guess, **options)

    def choose(model, guesses, *args, **options):
        compared.append(np.stack(guesses))
        latents, distances = likeliest_guess(model, guesses, *args, **options)
        compared_windows = len(compared)
        distances[:] = 1.0  # the first window tells nothing apart, the second that number 12 is right
        if compared_windows > 1 and len(guesses) > 1:
            distances[12] = 0.1
        return latents, distances

    monkeypatch.setattr(tasks, "restore", begin)
    monkeypatch.setattr(tasks, "likeliest_guess", choose)
    clip = make_clip(7, 16, 16)
    session = Editor(model, clip, window=3, overlap=1)
    options = {"n_candidates": 2} if task == "colorize" else {}
    clean = session.restore(task, steps=1, iterations=1, **options)
    assert clean.frames.shape == clip.frames.shape and len(started) == 3
    video = to_video(clip.frames)[None]
    if task == "colorize":  # one hue for the rest of the clip
        assert [len(guesses) for guesses in compared] == [degradations.HUES, degradations.HUES, 1]
        gray = degradations.grayscale()
        tinted = gray.first_guesses(gray(jnp.asarray(video)), 0.01, 7)[12]
        np.testing.assert_allclose(compared[2][0][0], model.encode(tinted[:, 4:])[0], atol=1e-4)
    else:
        assert not compared
        degradation = degradations.mosaic(8) if task == "unblock" else degradations.gaussian_blur(1.5)
        (guess,) = degradation.first_guesses(video, ROUNDING_STD, 7)
        np.testing.assert_allclose(started[2], model.encode(guess[:, 4:]), atol=1e-4)


def test_impulses_are_pixels_at_an_end_of_the_range_that_stand_alone():
    video = np.zeros((1, 2, 8, 9, 3), np.float32)
    video[0, 0, 2, 3] = 1.0
    video[0, 1, 0, 0, 1] = -1.0  # in a corner, one channel
    video[0, 0, 5, 5] = 0.9  # far, but not at an end
    video[0, 1, :, 5:] = 1.0  # at an end, but not alone
    expected = np.zeros(video.shape, bool)
    expected[0, 0, 2, 3] = True
    expected[0, 1, 0, 0, 1] = True
    np.testing.assert_array_equal(impulses(video), expected)


MISTAKES = [
    ("restoration 'iron' is unknown", lambda e: e.restore("iron")),
    ("method='fast' of 'deblur'", lambda e: e.restore("deblur", method="fast")),
    ("it has one answer only", lambda e: e.restore("denoise", method="fast", n_candidates=2)),
    ("n_candidates=0", lambda e: e.restore("denoise", n_candidates=0)),
    ("needs mask=", lambda e: e.restore("fill")),
    ("nothing of the clip is left", lambda e: e.restore("fill", mask=np.ones((5, 20, 24)), n_candidates=2)),
    (
        "'downsample x2 area' gave leads back to a video of (1, 3, 32, 32, 3)",
        lambda e: e.restore(degradations.downsample(2), observed=np.zeros((5, 16, 16, 3))),
    ),
    ("needs observed=", lambda e: e.restore(degradations.identity())),
    ("factor=3 does not divide", lambda e: e.restore("superres", factor=3)),
]


@pytest.mark.parametrize(("said", "call"), MISTAKES, ids=[f"{i}: {said}" for i, (said, _) in enumerate(MISTAKES)])
def test_mistakes_are_told_in_one_sentence(editor, said, call):
    with pytest.raises(ValueError) as error:
        call(editor)
    text = str(error.value)
    assert said in text and "\n" not in text and len(text) < 250
