"""The noising process on one log-SNR axis.

    z = alpha * x + sigma * eps,        logsnr = 2 log(alpha / sigma)

Three families differ only by a factor on `z` that depends on the level:

    vp    alpha = sqrt(sigmoid(logsnr))   sigma = sqrt(sigmoid(-logsnr))    alpha^2 + sigma^2 = 1
    flow  alpha = sigmoid(logsnr / 2)     sigma = sigmoid(-logsnr / 2)      alpha + sigma = 1, flow time t = sigma
    edm   alpha = 1                       sigma = exp(-logsnr / 2)          variance exploding

so a sampler may walk in any of them while the network always sees the variance-preserving one.
A level of -inf is pure noise (alpha exactly 0 for vp and flow), +inf is clean (sigma exactly 0).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from vdiff_jax.types import Array

Process: TypeAlias = Literal["vp", "flow", "edm"]
PROCESSES: tuple[str, ...] = get_args(Process)

EXTREME_LOGSNR = 40.0
"""Where a finite stand-in for an infinite level is needed: sigma / alpha is e^20 or e^-20, both finite in fp32."""


def alpha_sigma(logsnr: Array, process: str = "vp") -> tuple[Array, Array]:
    """Signal and noise scales at a level.

    Args:
        logsnr: any shape; -inf and +inf are allowed.
        process: "vp", "flow" or "edm". For "edm" the level is clipped to +-40, where sigma is still finite.
    Returns:
        alpha, sigma of the shape of `logsnr`.
    Raises:
        ValueError: unknown process.
    """
    if process == "vp":
        return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))
    if process == "flow":
        return jax.nn.sigmoid(logsnr / 2), jax.nn.sigmoid(-logsnr / 2)
    if process == "edm":
        sigma = jnp.exp(-jnp.clip(logsnr, -EXTREME_LOGSNR, EXTREME_LOGSNR) / 2)
        return jnp.ones_like(sigma), sigma
    raise ValueError(f"process {process!r} is unknown; use one of {', '.join(PROCESSES)}.")


def expand(logsnr: Array | float, like: Array) -> Array:
    """Appends unit axes to a level until it broadcasts against `like` [b f h w c].

    A scalar, `[b]`, `[b f]` and a token map `[b f h w 1]` are all accepted.

    Raises:
        ValueError: the leading axes of the level do not match those of `like`.
    """
    level: Array = jnp.asarray(logsnr)
    shape = level.shape + (1,) * (like.ndim - level.ndim)
    if any(n not in (1, m) for n, m in zip(shape, like.shape)) or len(shape) > like.ndim:
        raise ValueError(f"logsnr of shape {level.shape} does not fit latents of shape {like.shape}; use [b] or [b f].")
    return level.reshape(shape)


def scales(logsnr: Array | float, like: Array, process: str = "vp") -> tuple[Array, Array]:
    """`alpha_sigma` of a level expanded to broadcast against `like`."""
    return alpha_sigma(expand(logsnr, like), process)


def add_noise(x: Array, eps: Array, logsnr: Array | float, process: str = "vp") -> Array:
    """`z = alpha x + sigma eps`; x, eps `[b f h w c]`, logsnr scalar, `[b]`, `[b f]` or `[b f h w 1]`."""
    alpha, sigma = scales(logsnr, x, process)
    return alpha * x + sigma * eps


def family_factor(logsnr: Array, process: str) -> Array:
    """`sqrt(alpha^2 + sigma^2)` of a family: its `z` divided by this is the VP one."""
    if process == "vp":
        return jnp.ones_like(logsnr)
    alpha, sigma = alpha_sigma(logsnr, process)
    return jnp.sqrt(alpha**2 + sigma**2)


def to_vp(z: Array, logsnr: Array | float, process: str) -> Array:
    """A family's `z` at a level, rescaled to variance-preserving scale."""
    return z if process == "vp" else z / family_factor(expand(logsnr, z), process)


def from_vp(z: Array, logsnr: Array | float, process: str) -> Array:
    """A variance-preserving `z` at a level, rescaled to a family."""
    return z if process == "vp" else z * family_factor(expand(logsnr, z), process)


def token_logsnr(logsnr: Array, mask: Array, context_logsnr: Array) -> Array:
    """The level of every token: the context's where it is known, the frame's elsewhere.

    logsnr, context_logsnr: `[b f]`; mask: `[b f h w 1]`, 1 = known. Returns `[b f h w 1]`.
    """
    return jnp.where(mask > 0.5, expand(context_logsnr, mask), expand(logsnr, mask))
