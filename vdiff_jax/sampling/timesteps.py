"""Denoisers of networks that are told a timestep, and know nothing of known tokens: those of public checkpoints."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vdiff_jax.diffusion.prediction import KINDS, to_x0
from vdiff_jax.diffusion.process import add_noise, scales
from vdiff_jax.types import Array, DenoiseFn, Known, Latents, Params, PredictFn

LEAST_SIGMA = 1e-6
"""Below it what is pinned has no noise to find again."""


def make_timestep_denoise_fn(predict_fn: PredictFn, params: Params, kind: str, schedule: Any) -> DenoiseFn:
    """The denoiser of a network with prediction kind "eps", "x0", "v" or "velocity" and timesteps of its own.

    predict_fn: reads the timestep in the place of the level, see `VideoUNet`. schedule: has `logsnr_to_timestep`.

    Such a network saw all tokens at one level, so known ones are shown at the level of their frame, with the noise
    they were pinned with (Lugmayr et al. 2022 draw it anew in each step; one noise is one path). That is the best a
    network without a mask can be given, and not exact: what is made next to them knows them only through the noise.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"prediction kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")

    def denoise_fn(z, logsnr, known, cond, *, next_logsnr, keys):
        is_known = known.mask > 0.5
        z = jnp.where(is_known, add_noise(known.latents, pinned_noise(z, known), logsnr), z)
        timestep = schedule.logsnr_to_timestep(logsnr)
        prediction = predict_fn(params, z, timestep, known.mask, known.logsnr, cond)
        return jnp.where(is_known, known.latents, to_x0(kind, prediction, z, logsnr))

    return denoise_fn


def pinned_noise(z: Latents, known: Known) -> Array:
    """The unit noise with which known tokens are pinned in `z`; of no meaning elsewhere."""
    alpha, sigma = scales(known.logsnr, z)
    return jnp.where(sigma > LEAST_SIGMA, (z - alpha * known.latents) / jnp.maximum(sigma, LEAST_SIGMA), 0.0)
