"""The one step and the one scan.

With half-log-SNR steps h = (logsnr_1 - logsnr_0) / 2 and any scale family (alpha, sigma), a step from level 0 to 1 is

    D   = x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)        order 2 (DPM-Solver++ 2M), else D = x0_hat
    sd  = eta sigma_1 sqrt(1 - e^(logsnr_0 - logsnr_1))
    A   = sqrt(sigma_1^2 - sd^2) / sigma_0
    z_1 = A z_0 + (alpha_1 - alpha_0 A) D + sd w

which is exact for constant D. eta = 0 is DDIM, and the Euler step of the flow and EDM equations; eta = 1 is ancestral
sampling (DDPM). All quantities are per frame, with per-frame history, so any plan of levels is walked at full order.

The corrector (UniPC, Zhao et al. 2023, with data prediction) repeats the previous step once the estimate at its end
is known, integrating the quadratic through the last three estimates exactly against e^-(h - tau). It costs no extra
network call and gives order 3.

Known tokens are shown to the denoiser at their own level with one fixed noise, and are never part of what is solved
for: this is exact conditioning, unlike re-noising them along the plan.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion.noise import NOISE_KINDS, draw_noise
from vdiff_jax.diffusion.process import EXTREME_LOGSNR, add_noise, alpha_sigma, expand, from_vp, to_vp
from vdiff_jax.sampling.job import CONTEXT_STREAM, STEP_STREAM, stream
from vdiff_jax.types import Array, DenoiseFn, Job, Known, Latents, LogSNR


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to walk a plan. Only `eta` is traced; the others choose what is compiled.

    eta: 0 deterministic .. 1 ancestral noise.
    order: 1 or 2, of the extrapolation.
    process: "vp", "flow" or "edm", the scale in which the step is written. Results are equal to rounding.
    corrector: repeat each step with the estimate at its end (deterministic sampling only; ignored where eta > 0).
    trace: also return every clean estimate.
    noise_kind: law of the context noise and of each step's noise, see `diffusion.noise`: the one the network was
        trained on. The two are drawn apart from each other and from the noise the plan starts in; what "correlated"
        and "offset" noise share over frames, they share within each draw only.
    """

    eta: float | Array = 0.0
    order: int = 2
    process: str = "vp"
    corrector: bool = False
    trace: bool = False
    noise_kind: str = "gaussian"

    def __post_init__(self):
        if self.order not in (1, 2):
            raise ValueError(f"sampler order {self.order} must be 1 or 2; order 3 is order 2 with the corrector.")
        if self.noise_kind not in NOISE_KINDS:
            raise ValueError(f"noise kind {self.noise_kind!r} is unknown; use one of {', '.join(NOISE_KINDS)}.")


jax.tree_util.register_dataclass(
    Sampler, data_fields=["eta"], meta_fields=["order", "process", "corrector", "trace", "noise_kind"]
)

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(order=1),
    "ddpm": Sampler(eta=1.0, order=1),
    "dpmpp_2m": Sampler(order=2),
    "dpmpp_2m_sde": Sampler(eta=1.0, order=2),
    "euler": Sampler(order=1, process="flow"),
    "euler_ancestral": Sampler(eta=1.0, order=1, process="edm"),
    "euler_edm": Sampler(order=1, process="edm"),
    "unipc": Sampler(order=2, corrector=True),
}


def make_sampler(
    name: str, eta: float | Array | None = None, trace: bool = False, noise_kind: str = "gaussian"
) -> Sampler:
    """A sampler by name, its eta replaced if given.

    Raises:
        ValueError: unknown name.
    """
    if name not in SAMPLERS:
        close = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(SAMPLERS)}."
        raise ValueError(f"sampler {name!r} is unknown; {hint}")
    sampler = SAMPLERS[name]
    eta = sampler.eta if eta is None else eta
    return dataclasses.replace(sampler, eta=eta, trace=trace, noise_kind=noise_kind)


class History(NamedTuple):
    """What the step remembers of the last live step of every frame.

    x, h: clean estimate `[b f h w c]` and half-log-SNR step `[b f]`; h = 0 where there was none.
    older_x, older_h: the same of the step before (corrector only).
    used, gain: the data prediction D that the last step used, and its factor `alpha_1 - alpha_0 A` (corrector only).
    """

    x: Latents
    h: LogSNR
    older_x: Latents | None = None
    older_h: LogSNR | None = None
    used: Latents | None = None
    gain: LogSNR | None = None


def empty_history(z: Latents, corrector: bool) -> History:
    """The history before the first step."""
    nothing, never = jnp.zeros_like(z), jnp.zeros(z.shape[:2], z.dtype)
    return History(nothing, never, nothing, never, nothing, never) if corrector else History(nothing, never)


def step(
    z: Latents,
    x0_hat: Latents,
    history: History,
    logsnr: LogSNR,
    next_logsnr: LogSNR,
    noise: Latents,
    sampler: Sampler,
    last: Array | None = None,
) -> tuple[Latents, History]:
    """One step of every frame from `logsnr` to `next_logsnr`, both `[b f]`; frozen where they are equal.

    Args:
        z: `[b f h w c]` in the scale of `sampler.process`.
        x0_hat: clean estimate at z.
        noise: unit noise, read where eta > 0.
        last: `[b f]` bool, steps onto the final level, taken without extrapolation: such a step is long in
            log-SNR, and the answer is the clean estimate, not what lies after it.
    Returns:
        z and history after the step.
    """
    level_0, level_1 = (jnp.clip(level, -EXTREME_LOGSNR, EXTREME_LOGSNR) for level in (logsnr, next_logsnr))
    h = (level_1 - level_0) / 2
    _, sigma_0 = alpha_sigma(logsnr, sampler.process)
    alpha_1, sigma_1 = alpha_sigma(next_logsnr, sampler.process)
    live = h != 0

    share = _noise_share(h)
    log_rest = 0.5 * jnp.log1p(-jnp.minimum(jnp.square(sampler.eta) * share, 1.0))
    ratio = jnp.exp(log_rest) * sigma_1 / jnp.maximum(sigma_0, jnp.finfo(z.dtype).tiny)
    gain = -alpha_1 * jnp.expm1(log_rest - h)  # alpha_1 - alpha_0 * ratio, without cancellation
    spread = sampler.eta * sigma_1 * jnp.sqrt(share)

    if sampler.corrector:
        z = z + _correction(x0_hat, history, jnp.where(live & (jnp.asarray(sampler.eta) == 0), h, 0.0))
    used = x0_hat
    if sampler.order == 2:
        extrapolate = (h * history.h > 0) if last is None else (h * history.h > 0) & ~last
        slope = jnp.where(extrapolate, h / (2 * jnp.where(extrapolate, history.h, 1.0)), 0.0)
        used = x0_hat + expand(slope, z) * (x0_hat - history.x)
    z_next = expand(ratio, z) * z + expand(gain, z) * used + expand(spread, z) * noise

    alive = expand(live, z)
    new = History(x0_hat, h)
    if sampler.corrector:
        new = History(x0_hat, h, history.x, history.h, used, gain)
    history = jax.tree.map(lambda now, before: jnp.where(live if now.ndim == 2 else alive, now, before), new, history)
    return jnp.where(alive, z_next, z), history


def step_noise_std(logsnr: LogSNR, next_logsnr: LogSNR, eta: float | Array = 1.0, process: str = "vp") -> Array:
    """Standard deviation of the noise that a step adds, `eta sigma_1 sqrt(1 - e^(logsnr_0 - logsnr_1))`."""
    level_0, level_1 = (jnp.clip(level, -EXTREME_LOGSNR, EXTREME_LOGSNR) for level in (logsnr, next_logsnr))
    return eta * alpha_sigma(next_logsnr, process)[1] * jnp.sqrt(_noise_share((level_1 - level_0) / 2))


def _noise_share(h: Array) -> Array:
    """Variance of an ancestral step's noise over `sigma_1^2`, for a half-log-SNR step h; 0 for a step backwards."""
    return -jnp.expm1(jnp.minimum(-2 * h, 0.0))


def _correction(x0_hat: Latents, history: History, h_now: LogSNR) -> Latents:
    """What to add to z so that the last step becomes the one with the estimate at its end; 0 where h_now is 0."""
    assert history.older_x is not None and history.older_h is not None
    assert history.used is not None and history.gain is not None
    active = h_now * history.h > 0
    quadratic = active & (history.h * history.older_h > 0)
    h = jnp.where(active, history.h, 1.0)
    older = jnp.where(quadratic, history.older_h, 1.0)
    first, second = kernel_moments(h)
    # Lagrange weights of the estimates at -older, 0 and h, integrated against the kernel.
    # With two estimates only (the first correction), evenly: of the same order, and what public UniPC samplers do.
    weight_new = jnp.where(quadratic, (second + older * first) / (h * (older + h)), 0.5)
    weight_older = jnp.where(quadratic, (second - h * first) / (older * (older + h)), 0.0)
    weight_last = 1 - weight_new - weight_older
    better = expand(weight_new, x0_hat) * x0_hat + expand(weight_last, x0_hat) * history.x
    better = better + expand(weight_older, x0_hat) * history.older_x
    return expand(jnp.where(active, history.gain, 0.0), x0_hat) * (better - history.used)


def kernel_moments(h: Array) -> tuple[Array, Array]:
    """First and second moment of tau under the normalised kernel e^-(h - tau) on [0, h]; h may be negative.

    m1 = (h - 1 + e^-h) / E,  m2 = (h^2 - 2 h + 2 - 2 e^-h) / E,  E = 1 - e^-h.
    Below |h| = 1 both numerators cancel in fp32, so their power series are used.
    """
    small = jnp.abs(h) < 1
    near, far = jnp.where(small, h, 0.5), jnp.where(small, 2.0, h)
    term_0, term_1, term_2 = jnp.ones_like(h), jnp.full_like(h, 1 / 2), jnp.full_like(h, 1 / 6)
    sum_0, sum_1, sum_2 = term_0, term_1, term_2
    for k in range(1, 16):
        term_0, term_1, term_2 = -term_0 * near / (k + 1), -term_1 * near / (k + 2), -term_2 * near / (k + 3)
        sum_0, sum_1, sum_2 = sum_0 + term_0, sum_1 + term_1, sum_2 + term_2
    decay = jnp.exp(-far)
    total = -jnp.expm1(-far)
    first = jnp.where(small, near * sum_1 / sum_0, (far - 1 + decay) / total)
    second = jnp.where(small, 2 * near**2 * sum_2 / sum_0, (far**2 - 2 * far + 2 - 2 * decay) / total)
    return first, second


def context_noise(keys: Array, known: Known, noise_kind: str = "gaussian") -> Latents:
    """The fixed unit noise of known tokens, `[b f h w c]`, from the samples' keys."""
    noise = draw_noise(stream(keys, CONTEXT_STREAM), known.latents.shape[1:], noise_kind)
    return noise.astype(known.latents.dtype)


def sample(denoise_fn: DenoiseFn, job: Job, sampler: Sampler, keys: Array, *, finish: bool = True) -> Any:
    """Walks the plan of a job.

    Args:
        denoise_fn: sees VP scale whatever the sampler's process; guidance and restoration wrap it.
        job: see `types.Job`. All of it is data: other values of the same shapes do not compile again.
        sampler: see `Sampler`.
        keys: `[b]`, one per sample, for context noise, step noise and denoisers that draw.
        finish: True returns the last clean estimate of every frame; False the noisy latents at the end of the plan,
            VP scale (an inversion, or a plan that stops half-way).
    Returns:
        latents `[b f h w c]`, known tokens exactly as given; with `sampler.trace` a pair (latents, x0_hats
        `[s b f h w c]`).
    """
    _check_shapes(job, keys)
    known = job.known
    pinned = add_noise(known.latents, context_noise(keys, known, sampler.noise_kind), known.logsnr)
    is_known = known.mask > 0.5
    step_keys = stream(keys, STEP_STREAM)
    final = jnp.max(job.plan, axis=0)
    shape = job.z.shape

    def unit_noise(keys: Array) -> Latents:
        return draw_noise(keys, shape[1:], sampler.noise_kind).astype(job.z.dtype)

    def body(carry, inputs):
        z, history = carry
        number, logsnr, next_logsnr, tape = inputs
        keys_now = stream(step_keys, number)
        if tape is None:
            needed = jnp.asarray(sampler.eta) > 0
            tape = jax.lax.cond(needed, unit_noise, lambda keys: jnp.zeros(shape, job.z.dtype), keys_now)
        shown = jnp.where(is_known, pinned, to_vp(z, logsnr, sampler.process))
        # Denoisers that draw noise get keys of their own: never the noise of this step.
        x0_hat = denoise_fn(shown, logsnr, known, job.cond, next_logsnr=next_logsnr, keys=stream(keys_now, 1))
        x0_hat = jnp.where(is_known, known.latents, x0_hat).astype(z.dtype)
        last = next_logsnr >= final
        z, history = step(z, x0_hat, history, logsnr, next_logsnr, tape, sampler, last)
        return (z, history), (x0_hat if sampler.trace else None)

    steps = job.plan.shape[0] - 1
    start = from_vp(job.z, job.plan[0], sampler.process)
    inputs = (jnp.arange(steps), job.plan[:-1], job.plan[1:], job.noise)
    (z, history), x0_hats = jax.lax.scan(body, (start, empty_history(start, sampler.corrector)), inputs)

    z = to_vp(z, job.plan[-1], sampler.process)
    if finish:  # a frame that no step moved has no estimate and is returned as it is
        latents = jnp.where(is_known, known.latents, jnp.where(expand(history.h, z) != 0, history.x, z))
    else:
        latents = jnp.where(is_known, pinned, z)
    return (latents, x0_hats) if sampler.trace else latents


def _check_shapes(job: Job, keys: Array) -> None:
    shape = job.z.shape
    if len(shape) != 5 or job.plan.ndim != 3 or job.plan.shape[1:] != shape[:2] or job.plan.shape[0] < 2:
        raise ValueError(f"plan of shape {job.plan.shape} must be [steps+1 b f] for latents [b f h w c] {shape}.")
    if job.known.latents.shape != shape or job.known.mask.shape != (*shape[:4], 1):
        raise ValueError(f"known latents {job.known.latents.shape} and mask {job.known.mask.shape} must fit {shape}.")
    if job.noise is not None and job.noise.shape != (job.plan.shape[0] - 1, *shape):
        raise ValueError(f"noise tape of shape {job.noise.shape} must be [steps b f h w c], one entry per step.")
    if keys.shape[:1] != shape[:1]:
        raise ValueError(f"{keys.shape[0]} keys were given for {shape[0]} samples; give one key per sample.")
