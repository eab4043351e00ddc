"""At which levels networks that are told timesteps are trained, and what they are told there."""

from __future__ import annotations

import jax.numpy as jnp

from vdiff_jax.diffusion.continuous import EDMRho, Schedule
from vdiff_jax.diffusion.discrete import DiscreteTable, FlowTable
from vdiff_jax.types import Array

SVD_SIGMAS = {"mean": 0.7, "std": 1.6}
"""Mean and deviation of ln(sigma) with which Stable Video Diffusion is tuned (Blattmann et al. 2023, high noise)."""


def told_levels(own: Schedule, drawn: Schedule, u: Array) -> tuple[Array, Array]:
    """(log-SNR, timestep told at it), of the shape of `u`, for coordinates in [0, 1).

    own: the checkpoint's schedule, which has timesteps. drawn: where levels are drawn from, often the same. A table is
    drawn at its whole timesteps, each as often as any other, and nowhere between them.
    Raises ValueError for a schedule that knows no timesteps.
    """
    if not isinstance(own, (DiscreteTable, EDMRho, FlowTable)):
        raise ValueError(f"schedule {type(own).__name__} knows no timesteps that a public network could be told")
    if isinstance(own, DiscreteTable):
        timestep = jnp.minimum(jnp.floor(u * own.num_train_steps), own.num_train_steps - 1).astype(jnp.int32)
        return own.timestep_to_logsnr(timestep), timestep.astype(jnp.float32)
    logsnr = drawn.logsnr(u)
    return logsnr, own.logsnr_to_timestep(logsnr)
