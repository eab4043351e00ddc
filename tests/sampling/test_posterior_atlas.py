"""Restoration with a perfect, multi-modal denoiser finds the clip that the measurement came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from atlas import atlas

from vdiff_jax.diffusion.schedule import Cosine
from vdiff_jax.editing.degradations import block_mask, downsample
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.posterior import PosteriorSampling, chi_square
from vdiff_jax.sampling.samplers import SAMPLERS, sample

A, B, NOISE = atlas(), 24, 0.05
SHAPE = (B, *A.atoms.shape[1:])
KEYS = jax.random.split(jax.random.key(0), B)


@jax.jit
def run(job, wrapper):
    return sample(wrapper.wrap(A.denoise_fn, lambda latents: latents), job, SAMPLERS["dpmpp_2m"], KEYS)


def restore(degradation, iterations):
    """Share of samples that end in the true clip, and their chi^2; the measurement leaves no other clip possible."""
    truth = np.random.default_rng(0).integers(0, len(A.names), B)
    y = degradation(jnp.asarray(A.atoms[truth]))
    y = y + NOISE * jax.random.normal(jax.random.key(1), y.shape)
    all_y = np.asarray(degradation(jnp.asarray(A.atoms)))
    log_p = np.stack([-0.5 * np.sum((all_y - one) ** 2, axis=(1, 2, 3, 4)) / NOISE**2 for one in np.asarray(y)])
    posterior = np.exp(log_p - log_p.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    assert posterior[np.arange(B), truth].min() > 0.99

    job = jobs.text_to_video_job(KEYS, SHAPE, Cosine(), 25, A.cond(B))
    out = run(job, PosteriorSampling(y, degradation, jnp.float32(NOISE), iterations))
    index, distance = A.nearest(out)
    return (index == truth) & (distance < 0.1), np.asarray(chi_square(y, degradation(out), NOISE))


@pytest.mark.parametrize(
    ("degradation", "share"),
    [(downsample(4), 0.7), (block_mask(SHAPE[1:4], 4, 0.5), 0.9)],
    ids=["four_times_fewer_pixels", "half_of_the_blocks"],
)
def test_the_right_clip_is_found(degradation, share):
    hit, chi = restore(degradation, 8)
    assert hit.mean() >= share
    # chi^2 tells the samples that found it from those that came to rest elsewhere.
    assert chi[hit].max() < min(chi[~hit], default=np.inf)
