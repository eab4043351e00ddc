"""Clean estimates kept in a range, as checkpoints with `clip_sample` are sampled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vdiff_jax.types import DecodeFn, DenoiseFn, struct


@struct
class ClipEstimate:
    """Cuts the clean estimate of unknown tokens to -limit..limit, as a `DenoiserWrapper`; outermost, after guidance.

    limit: scalar. The noise that a step keeps is the one the cut estimate implies (as in DDPM, and in DDIM with
    `use_clipped_model_output`).
    """

    limit: Any

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        def clipped(z, logsnr, known, cond, *, next_logsnr, keys):
            x0_hat = denoise_fn(z, logsnr, known, cond, next_logsnr=next_logsnr, keys=keys)
            return jnp.where(known.mask > 0.5, known.latents, jnp.clip(x0_hat, -self.limit, self.limit))

        return clipped
