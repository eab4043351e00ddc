"""From a network to a denoiser, and guidance as a change of the clean estimate.

    classifier-free     x' = D(z, null) + w(logsnr) (D(z, cond) - D(z, null))          (Ho & Salimans 2021)
    gradient            x' = D(z) + sigma^2 / alpha * grad_z log p(c | z)              (Tweedie)
    Tweedie covariance  Cov[x | z] u = sigma^2 / alpha * (dD/dz)^T u

All act per token with the token's own level, so frames that are nearly clean are hardly moved, and known tokens never.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion.prediction import KINDS, to_x0
from vdiff_jax.diffusion.process import scales
from vdiff_jax.types import Array, DecodeFn, DenoiseFn, Known, Latents, LogSNR, Params, PredictFn, struct


def make_denoise_fn(predict_fn: PredictFn, params: Params, kind: str) -> DenoiseFn:
    """The denoiser of a network with prediction kind "eps", "x0", "v" or "velocity".

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"prediction kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")

    def denoise_fn(z, logsnr, known, cond, *, next_logsnr, keys):
        prediction = predict_fn(params, z, logsnr, known.mask, known.logsnr, cond)
        return jnp.where(known.mask > 0.5, known.latents, to_x0(kind, prediction, z, logsnr))

    return denoise_fn


def classifier_free(
    denoise_fn: DenoiseFn,
    uncond: Any,
    guidance_scale: float | Array,
    interval: tuple[float | Array, float | Array] | None = None,
    rescale: float | Array = 0.0,
) -> DenoiseFn:
    """Classifier-free guidance in one doubled batch, each clip's two rows side by side.

    Where a batch is split over devices both rows of a clip lie on one, and nothing is sent.

    Args:
        uncond: conditioning of the null (or negative) prompt, same structure and shapes as the job's.
        guidance_scale: scalar, `[b]` or `[b f]`; 1 is off and returns the conditional estimate exactly.
        interval: (low, high) log-SNR between which guidance acts; outside it is off (Kynkaanniemi et al. 2024).
        rescale: 0..1, how far the deviation of the estimate over a clip's unknown tokens is pulled back to the
            conditional one (Lin et al. 2024, there for v); tames saturation at large scales.
    """

    def guided(z, logsnr, known, cond, *, next_logsnr, keys):
        def twice(*trees: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), *trees)

        both = denoise_fn(
            twice(z, z),
            twice(logsnr, logsnr),
            twice(known, known),
            twice(cond, uncond),
            next_logsnr=twice(next_logsnr, next_logsnr),
            keys=twice(keys, keys),
        )
        both = both.reshape(-1, 2, *both.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        scale = jnp.asarray(guidance_scale, z.dtype)
        excess = jnp.broadcast_to((scale - 1)[:, None] if scale.ndim == 1 else scale - 1, logsnr.shape)
        if interval is not None:
            low, high = interval
            excess = jnp.where((logsnr >= low) & (logsnr <= high), excess, 0.0)
        x0_hat = conditional + excess[:, :, None, None, None] * (conditional - unconditional)
        unknown = known.mask < 0.5
        factor = _deviation(conditional, unknown) / jnp.maximum(_deviation(x0_hat, unknown), 1e-8)
        x0_hat = x0_hat * (1 + rescale * (factor - 1))
        return jnp.where(unknown, x0_hat, known.latents)

    return guided


@struct
class Guidance:
    """`classifier_free` as a `DenoiserWrapper`; arguments as there.

    uncond: conditioning of the null (or negative) prompt. guidance_scale: scalar, `[b]` or `[b f]`. low, high: log-SNR
    between which guidance acts. rescale: 0..1, or None to leave its arithmetic out.
    """

    uncond: Any
    guidance_scale: Any
    low: Any = -jnp.inf
    high: Any = jnp.inf
    rescale: Any = None

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        rescale = 0.0 if self.rescale is None else self.rescale
        return classifier_free(denoise_fn, self.uncond, self.guidance_scale, (self.low, self.high), rescale)


def _deviation(x: Latents, where: Array) -> Array:
    """Standard deviation of every sample over the tokens `where`, `[b 1 1 1 1]`."""
    axes = (1, 2, 3, 4)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.maximum(jnp.sum(where, axes, keepdims=True), 1)
    mean = jnp.sum(jnp.where(where, x, 0.0), axes, keepdims=True) / count
    return jnp.sqrt(jnp.sum(jnp.where(where, jnp.square(x - mean), 0.0), axes, keepdims=True) / count)


def gradient_guidance(
    denoise_fn: DenoiseFn, log_prob: Callable[[Latents, LogSNR], Array], scale: float | Array = 1.0
) -> DenoiseFn:
    """Guides by the gradient of a log-probability, differentiated through the denoiser.

    log_prob(x0_hat, logsnr) -> `[b]`: log p(c | z), as far as it is a function of the clean estimate and the level.
    Costs one forward and one backward pass of the denoiser.
    """

    def guided(z, logsnr, known, cond, *, next_logsnr, keys):
        def denoise(z: Latents) -> Latents:
            return denoise_fn(z, logsnr, known, cond, next_logsnr=next_logsnr, keys=keys)

        x0_hat, pull_back = jax.vjp(denoise, z)
        (gradient,) = pull_back(jax.grad(lambda x: jnp.sum(log_prob(x, logsnr)))(x0_hat))
        alpha, sigma = scales(logsnr, z)
        return jnp.where(known.mask > 0.5, known.latents, x0_hat + scale * sigma**2 / alpha * gradient)

    return guided


def tweedie_covariance(
    denoise_fn: DenoiseFn, z: Latents, logsnr: LogSNR, known: Known, cond: Any, *, next_logsnr: LogSNR, keys: Array
) -> tuple[Latents, Callable[[Latents], Latents]]:
    """The clean estimate at z, and the posterior covariance of x as a linear map `[b f h w c] -> [b f h w c]`.

    Exact for an exact denoiser. Known tokens have none. At pure noise (alpha exactly 0) z tells the denoiser nothing,
    and its derivative nothing of the covariance: 0 is returned.
    """

    def denoise(z: Latents) -> Latents:
        x0_hat = denoise_fn(z, logsnr, known, cond, next_logsnr=next_logsnr, keys=keys)
        return jnp.where(known.mask > 0.5, known.latents, x0_hat)

    x0_hat, pull_back = jax.vjp(denoise, z)
    alpha, sigma = scales(logsnr, z)
    factor = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)

    def covariance(direction: Latents) -> Latents:
        return jnp.where(known.mask > 0.5, 0.0, factor * pull_back(direction)[0])

    return x0_hat, covariance
