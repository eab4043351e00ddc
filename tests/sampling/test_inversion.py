"""The tape of a clip of which a part is known: it says nothing of that part and still leads back exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from gaussian_video import GaussianVideo

from vdiff_jax.diffusion.process import alpha_sigma
from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.editing.text_edit import TAPE_SAMPLER, tape_job
from vdiff_jax.sampling.inversion import ddpm_inversion
from vdiff_jax.sampling.job import nothing_known, uniform_plan
from vdiff_jax.sampling.samplers import sample
from vdiff_jax.types import Known

G, BATCH, STEPS = GaussianVideo(), 3, 6
RNG = np.random.default_rng(0)
SOURCE, MEAN = (jnp.asarray(RNG.standard_normal((BATCH, *G.shape)), jnp.float32) for _ in range(2))
PLAN = uniform_plan(LinearLogSNR(-12.0, 10.0), STEPS, BATCH, G.shape[0], start=0.7)
KEYS = jax.random.split(jax.random.key(0), BATCH)
NOTHING = nothing_known(SOURCE.shape)
MASK = jnp.asarray(np.broadcast_to(RNG.random((1, *G.shape[:3], 1)) < 0.4, (BATCH, *G.shape[:3], 1)), jnp.float32)
PART = Known(SOURCE, MASK, jnp.full(SOURCE.shape[:2], 3.0))


@jax.jit
def inverted(known, keys):
    return ddpm_inversion(G.denoise_fn, SOURCE, PLAN, known, jnp.zeros_like(SOURCE), keys)


@functools.partial(jax.jit, static_argnames="finish")
def walked(tape, known, cond, finish=True):
    return sample(G.denoise_fn, tape_job(tape, PLAN, known, cond), TAPE_SAMPLER, KEYS, finish=finish)


def test_known_tokens_have_no_noise_on_the_tape_and_nothing_left_over():
    tape = inverted(PART, KEYS)
    given = np.broadcast_to(np.asarray(MASK) > 0.5, SOURCE.shape)
    assert 0.2 < given.mean() < 0.7 and tape.noise.shape == (STEPS, *SOURCE.shape)
    assert not np.asarray(tape.noise)[:, given].any() and not np.asarray(tape.residual)[given].any()
    assert np.abs(np.asarray(tape.noise)[:, ~given]).min(axis=0).max() > 0
    # They stand at the level they are shown at, under the noise that the walk will show them in.
    pinned = np.asarray(walked(tape, PART, MEAN, finish=False))
    np.testing.assert_allclose(np.asarray(tape.z)[given], pinned[given], atol=1e-6)
    alpha, sigma = (float(value) for value in alpha_sigma(jnp.float32(3.0)))
    noise = (np.asarray(tape.z) - alpha * np.asarray(SOURCE))[given] / sigma
    assert 0.5 < noise.std() < 1.5


def test_the_tape_leads_back_whatever_is_known():
    for known in (NOTHING, PART):
        tape = inverted(known, KEYS)
        back = walked(tape, known, jnp.zeros_like(SOURCE)) + tape.residual
        np.testing.assert_allclose(back, SOURCE, atol=1e-5)
        # With another prompt everything that is not known follows, and nothing else.
        other = walked(tape, known, MEAN) + tape.residual
        given = np.broadcast_to(np.asarray(known.mask) > 0.5, SOURCE.shape)
        moved = np.abs(np.asarray(other - SOURCE))
        assert moved[~given].mean() > 0.1 and (not given.any() or moved[given].max() == 0)


def test_a_tape_depends_on_its_own_key_only():
    tape = inverted(NOTHING, KEYS)
    other = inverted(NOTHING, KEYS.at[1].set(jax.random.key(9)))
    for one, two in zip(tape, other):
        same = np.abs(np.asarray(one - two)).reshape(-1, BATCH, *G.shape).max(axis=(0, 2, 3, 4, 5))
        assert same[0] == same[2] == 0 and same[1] > 0
