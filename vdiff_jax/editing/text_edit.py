"""Changing what a clip shows by another prompt.

| method      | what it does                                                                    | keeps            |
|-------------|---------------------------------------------------------------------------------|------------------|
| flow        | walks the difference of two estimates, one per prompt (FlowEdit, Kulikov 2024)   | what both share  |
| inversion   | the deterministic plan backwards with the old prompt, forwards with the new one | layout           |
| ddpm        | the step noise that leads to the clip, walked with the new prompt               | layout, exactly  |
| sdedit      | noise up to a level, then denoise (Meng et al. 2022)                             | coarse structure |

All start from level `u = strength` of the model's schedule: 1 is pure noise, small values change little. Each is a
`Job` for the one scan; FlowEdit is a wrapper of the denoiser, which makes it valid for every kind of prediction.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise, scales
from vdiff_jax.sampling.guidance import Guidance
from vdiff_jax.sampling.inversion import NoiseTape
from vdiff_jax.sampling.job import START_STREAM, reverse, stream
from vdiff_jax.sampling.samplers import Sampler
from vdiff_jax.types import Array, DecodeFn, DenoiseFn, DenoiserWrapper, Job, Known, Latents, static, struct

METHODS = ("flow", "inversion", "ddpm", "sdedit")

FLOW_SAMPLER = Sampler(order=1, process="edm")
"""FlowEdit's state is a clip, not a noisy one: the walk is in the scale in which alpha is 1."""
INVERSION_SAMPLER = Sampler(order=2)
TAPE_SAMPLER = Sampler(eta=1.0, order=1)


@struct
class FlowEdit:
    """The denoiser of the edit: `x + D(z_target, target) - D(z_source, source)` with one noise for both.

        z_source = alpha x + sigma n,      z_target = z_source + alpha (e - x)

    where x is the source and e the state of the walk, which starts at x. Its first-order step is FlowEdit (Kulikov et
    al. 2024). The job's `cond` is the target; known tokens of the job hold the target's context.

    source: `[b f h w c]`. source_cond: what the denoiser is told of it. guidance, source_guidance: of either branch
    (any wrapper in the target's). draws: noise draws averaged in every step; more is smoother and costs as many calls.
    """

    source: Latents
    source_cond: Any
    guidance: DenoiserWrapper | None = None
    source_guidance: Guidance | None = None
    draws: int = static(1)
    noise_kind: str = static("gaussian")

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        target_fn = denoise_fn if self.guidance is None else self.guidance.wrap(denoise_fn, decode_fn)
        source_fn = denoise_fn if self.source_guidance is None else self.source_guidance.wrap(denoise_fn, decode_fn)
        x = self.source

        def edited(z, logsnr, known, cond, *, next_logsnr, keys):
            alpha, sigma = scales(logsnr, z)
            is_known = known.mask > 0.5
            state = z / alpha
            # The source's context is the source's own, under the noise that the target's is shown in.
            context_alpha, _ = scales(known.logsnr, z)
            context = z + context_alpha * (x - known.latents)
            source_known = Known(x, known.mask, known.logsnr)
            change = jnp.zeros_like(z)
            for draw in range(self.draws):
                draw_keys = stream(keys, draw)
                noise = draw_noise(draw_keys, z.shape[1:], self.noise_kind).astype(z.dtype)
                z_source = alpha * x + sigma * noise
                z_target = z_source + alpha * (state - x)
                now: dict[str, Array] = dict(next_logsnr=next_logsnr, keys=draw_keys)
                there = target_fn(jnp.where(is_known, z, z_target), logsnr, known, cond, **now)
                here = source_fn(jnp.where(is_known, context, z_source), logsnr, source_known, self.source_cond, **now)
                change = change + (there - here) / self.draws
            return jnp.where(is_known, known.latents, x + change)

        return edited


def flow_job(source: Latents, plan: Array, known: Known, cond: Any) -> Job:
    """FlowEdit's job, to be run with `FLOW_SAMPLER` and the wrapper `FlowEdit`. plan: `[s+1 b f]`."""
    alpha, _ = scales(plan[0], source)
    return Job(z=alpha * source, plan=plan, known=known, cond=cond)


def sdedit_job(source: Latents, plan: Array, known: Known, cond: Any, keys: Array, noise_kind: str = "gaussian") -> Job:
    """The source under noise of the plan's first level, to be denoised with another prompt."""
    noise = draw_noise(stream(keys, START_STREAM), source.shape[1:], noise_kind).astype(source.dtype)
    return Job(z=add_noise(source, noise, plan[0]), plan=plan, known=known, cond=cond)


def inversion_job(source: Latents, plan: Array, known: Known, cond: Any) -> Job:
    """The plan backwards: run with `INVERSION_SAMPLER` and `finish=False` it returns the noise that makes the source.

    cond: what the denoiser is told of the source; without guidance (methods with it drift).
    """
    backwards = reverse(plan)
    alpha, _ = scales(backwards[0], source)
    return Job(z=alpha * source, plan=backwards, known=known, cond=cond)


def tape_job(tape: NoiseTape, plan: Array, known: Known, cond: Any) -> Job:
    """Walks a recorded tape, to be run with `TAPE_SAMPLER`; add `tape.residual` to what comes out."""
    return Job(z=tape.z, plan=plan, known=known, cond=cond, noise=tape.noise)
