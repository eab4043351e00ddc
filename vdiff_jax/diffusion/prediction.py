"""What a network may predict, and the way from each kind to every other.

With `alpha, sigma` of the variance-preserving process and `z = alpha x + sigma eps`:

    kind        target                    x0_hat                            eps_hat
    "x0"        x                         o                                 (z - alpha o) / sigma
    "eps"       eps                       (z - sigma o) / alpha             o
    "v"         alpha eps - sigma x       alpha z - sigma o                 sigma z + alpha o
    "velocity"  eps - x                   (z - sigma o) / (alpha + sigma)   (z + alpha o) / (alpha + sigma)

"v" is from Salimans & Ho 2022 (progressive distillation); "velocity" is the flow-matching target.

Only two entries divide by something that vanishes. `eps -> x0` at alpha = 0 has no answer: the network's output
does not contain the clean latent. Divisors are therefore floored at their value for |logsnr| = 20 (alpha = 4.5e-5):
results stay finite but carry no information there. `check_kind` refuses such a pairing up front.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from vdiff_jax.diffusion.process import scales
from vdiff_jax.types import Array

Kind: TypeAlias = Literal["eps", "x0", "v", "velocity"]
KINDS: tuple[str, ...] = get_args(Kind)

LARGEST_DIVISION_LOGSNR = 20.0
_DIVISOR_FLOOR = 4.5399e-5  # sqrt(sigmoid(-20))


def _unknown_kind(kind: str) -> ValueError:
    return ValueError(f"prediction kind {kind!r} is unknown; use one of {', '.join(KINDS)}.")


def check_kind(kind: str, logsnr_min: float) -> None:
    """Refuses a prediction kind that has no clean estimate at the noisiest level of a schedule.

    Raises:
        ValueError: unknown kind, or "eps" with a level below -20 (zero terminal SNR among them).
    """
    if kind not in KINDS:
        raise _unknown_kind(kind)
    if kind == "eps" and logsnr_min < -LARGEST_DIVISION_LOGSNR:
        raise ValueError(
            f"eps-prediction has no clean estimate at logsnr {logsnr_min} (alpha is 0): "
            "use a 'v', 'x0' or 'velocity' network, or a schedule without zero terminal SNR."
        )


def target(kind: str, x: Array, eps: Array, logsnr: Array | float) -> Array:
    """What a network of this kind should output for clean `x` and noise `eps`, both `[b f h w c]`."""
    if kind == "x0":
        return x
    if kind == "eps":
        return eps
    if kind == "velocity":
        return eps - x
    if kind == "v":
        alpha, sigma = scales(logsnr, x)
        return alpha * eps - sigma * x
    raise _unknown_kind(kind)


def to_x0(kind: str, prediction: Array, z: Array, logsnr: Array | float) -> Array:
    """The clean estimate in a network's output; `z` in VP scale, all `[b f h w c]`."""
    alpha, sigma = scales(logsnr, z)
    if kind == "x0":
        return prediction
    if kind == "eps":
        return (z - sigma * prediction) / jnp.maximum(alpha, _DIVISOR_FLOOR)
    if kind == "v":
        return alpha * z - sigma * prediction
    if kind == "velocity":
        return (z - sigma * prediction) / (alpha + sigma)
    raise _unknown_kind(kind)


def to_eps(kind: str, prediction: Array, z: Array, logsnr: Array | float) -> Array:
    """The noise estimate in a network's output; `z` in VP scale, all `[b f h w c]`."""
    alpha, sigma = scales(logsnr, z)
    if kind == "x0":
        return (z - alpha * prediction) / jnp.maximum(sigma, _DIVISOR_FLOOR)
    if kind == "eps":
        return prediction
    if kind == "v":
        return sigma * z + alpha * prediction
    if kind == "velocity":
        return (z + alpha * prediction) / (alpha + sigma)
    raise _unknown_kind(kind)


def convert(prediction: Array, source: str, to: str, z: Array, logsnr: Array | float) -> Array:
    """The same belief about `x`, said in another prediction kind."""
    if source == to:
        return prediction
    return target(to, to_x0(source, prediction, z, logsnr), to_eps(source, prediction, z, logsnr), logsnr)


def x0_to_eps(x0_hat: Array, z: Array, logsnr: Array | float) -> Array:
    """The noise that a clean estimate implies: `(z - alpha x0_hat) / sigma`."""
    return to_eps("x0", x0_hat, z, logsnr)


def x0_to_score(x0_hat: Array, z: Array, logsnr: Array | float) -> Array:
    """`grad_z log p(z) = -(z - alpha x0_hat) / sigma^2` (Tweedie)."""
    _, sigma = scales(logsnr, z)
    return -x0_to_eps(x0_hat, z, logsnr) / jnp.maximum(sigma, _DIVISOR_FLOOR)
