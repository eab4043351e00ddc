"""From a clip to the noise that makes it.

Two ways. A plan walked backwards by the deterministic sampler (`job.reverse`) needs no code of its own. The
edit-friendly inversion of DDPM (Huberman-Spiegelglas et al. 2024) is here: it draws noisy versions of the clip at every
level of the plan, each with noise of its own, and records the step noise that leads from one to the next,

    z_i = alpha_i x + sigma_i n_i,      tape_i = (z_{i+1} - mu(z_i)) / sd_i,

where mu and sd are those of the ancestral step. Sampling with this tape returns to the clip whatever the denoiser; with
another prompt it returns to a clip that keeps what the tape says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise, expand
from vdiff_jax.sampling.job import CONTEXT_STREAM, START_STREAM, stream
from vdiff_jax.sampling.samplers import Sampler, empty_history, step, step_noise_std
from vdiff_jax.types import Array, DenoiseFn, Known, Latents

ANCESTRAL = Sampler(eta=1.0, order=1)


class NoiseTape(NamedTuple):
    """What leads back to a clip.

    z: `[b f h w c]`, the clip at the first level of the plan. noise: `[s b f h w c]`, the noise of every step.
    residual: `[b f h w c]`, the clip minus the last clean estimate: what to add so that the way back is exact.
    """

    z: Latents
    noise: Latents
    residual: Latents


def ddpm_inversion(
    denoise_fn: DenoiseFn,
    source: Latents,
    plan: Array,
    known: Known,
    cond: Any,
    keys: Array,
    *,
    noise_kind: str = "gaussian",
) -> NoiseTape:
    """The step noise with which the ancestral sampler comes back to `source` along `plan` `[s+1 b f]`.

    cond: what the denoiser is told of the source. known: as in the job that will use the tape, with source values.
    keys: `[b]`, the same as that job's. Levels must rise in every step.
    """
    shape = source.shape
    context = draw_noise(stream(keys, CONTEXT_STREAM), shape[1:], noise_kind)
    pinned = add_noise(known.latents, context, known.logsnr)
    is_known = known.mask > 0.5
    level_keys = stream(keys, START_STREAM)
    steps = plan.shape[0] - 1

    def noisy(index: Array) -> Latents:
        """The source at level `index`, each level with noise of its own."""
        noise = draw_noise(stream(level_keys, index), shape[1:], noise_kind).astype(source.dtype)
        return jnp.where(is_known, pinned, add_noise(source, noise, plan[index]))

    def body(z: Latents, index: Array):
        level, next_level = plan[index], plan[index + 1]
        draws = stream(stream(level_keys, index), 1)
        x0_hat = denoise_fn(z, level, known, cond, next_logsnr=next_level, keys=draws)
        mean, _ = step(z, x0_hat, empty_history(z, False), level, next_level, jnp.zeros_like(z), ANCESTRAL)
        following = noisy(index + 1)
        spread = expand(step_noise_std(level, next_level), z)
        # A step onto sigma = 0 adds no noise: what is missing there is the residual.
        noise = jnp.where(spread > 0, (following - mean) / jnp.maximum(spread, jnp.finfo(z.dtype).tiny), 0.0)
        return following, (noise, x0_hat)

    start = noisy(jnp.zeros((), jnp.int32))
    _, (tape, estimates) = jax.lax.scan(body, start, jnp.arange(steps))
    tape = jnp.where(is_known, 0.0, tape)
    return NoiseTape(start, tape, jnp.where(is_known, 0.0, source - estimates[-1]))
