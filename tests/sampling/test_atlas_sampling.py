"""Sampling with a perfect, multi-modal, captioned denoiser lands where captions and context say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from atlas import COLOURS, DIRECTIONS, SHAPES, atlas

from vdiff_jax.diffusion.schedule import Cosine
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.guidance import classifier_free
from vdiff_jax.sampling.samplers import SAMPLERS, sample
from vdiff_jax.types import Job, Known

A, B, STEPS = atlas(), 48, 24
SHAPE = (B, *A.atoms.shape[1:])
KEYS = jax.random.split(jax.random.key(0), B)


@functools.partial(jax.jit, static_argnames="guided")
def run(job, guidance_scale=1.0, guided=False):
    denoise_fn = classifier_free(A.denoise_fn, A.cond(B), guidance_scale) if guided else A.denoise_fn
    return sample(denoise_fn, job, SAMPLERS["unipc"], KEYS)


def make_job(*words, known=None):
    job = jobs.text_to_video_job(KEYS, SHAPE, Cosine(), STEPS, A.cond(B, *words))
    return job if known is None else Job(job.z, job.plan, known, job.cond)


def names_of(latents):
    """The caption words of each sample, all of which must be clips of the world."""
    index, distance = A.nearest(latents)
    assert distance.max() < 0.02
    return [A.names[i] for i in index], index


def test_text_to_video_lands_on_clips_of_the_caption():
    names, index = names_of(run(make_job("blue", "square", "left")))
    assert set(names) == {("blue", "square", "left")}
    assert len(set(index)) > 12  # 25 places are equally likely: 48 samples see about 21 of them


def test_without_caption_every_attribute_value_is_met():
    names, _ = names_of(run(make_job()))
    for axis, values in enumerate((COLOURS, SHAPES, DIRECTIONS)):
        counts = [sum(name[axis] == value for name in names) for value in values]
        assert min(counts) > 0.35 * B / len(values), counts


def test_guidance_keeps_the_caption():
    names, _ = names_of(run(make_job("green", "up"), guidance_scale=3.0, guided=True))
    assert {(colour, direction) for colour, _, direction in names} == {("green", "up")}


def some_clips():
    return A.atoms[np.random.default_rng(0).integers(0, len(A.names), B)]


def test_two_known_frames_decide_the_future():
    clips = some_clips()
    latents = run(make_job(known=jobs.known_frames(jnp.asarray(clips), [0, 1])))
    np.testing.assert_array_equal(latents[:, :2], clips[:, :2])
    np.testing.assert_allclose(latents, clips, atol=0.05)


def test_one_known_frame_decides_all_but_the_direction():
    # The object starts in the middle of the grid of places, from where all four directions are clips of the world.
    start = ("red", "circle", "right"), (5.5, 7.0)
    atom = next(i for i, (name, centre) in enumerate(zip(A.names, A.centres)) if (name, tuple(centre)) == start)
    agreeing = np.abs(A.atoms[:, 0] - A.atoms[atom, 0]).max(axis=(1, 2, 3)) < 1e-3
    clips = jnp.broadcast_to(A.atoms[atom], SHAPE)
    names, index = names_of(run(make_job(known=jobs.known_frames(clips, [0]))))
    assert set(index) == set(np.flatnonzero(agreeing))
    counts = [sum(name[2] == direction for name in names) for direction in DIRECTIONS]
    assert min(counts) > 0.35 * B / 4, counts


def test_a_hole_is_filled_by_what_is_around_it():
    clips = some_clips()
    mask = np.ones((*SHAPE[:4], 1), np.float32)
    mask[:, :, 4:8, 4:8] = 0
    known = Known(jnp.asarray(clips), jnp.asarray(mask), jnp.full(SHAPE[:2], jobs.CLEAN_LOGSNR))
    latents = run(make_job(known=known))
    outside = np.broadcast_to(mask == 1, SHAPE)
    np.testing.assert_array_equal(np.asarray(latents)[outside], clips[outside])
    names_of(latents)
    np.testing.assert_allclose(latents, clips, atol=0.05)
