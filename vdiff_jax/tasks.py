"""The tasks of editing on batches of latents: prompts become conditioning, `editing` makes the job, the model runs it.

Every function takes a `VideoDiffusion`, final latents `[b f h w c]` and one key per clip, and returns final latents.
Clips, pixels, windows and sessions are the business of `editor.py`; this is the layer below, for batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import scales
from vdiff_jax.editing import text_edit
from vdiff_jax.editing.degradations import Degradation
from vdiff_jax.sampling.inversion import NoiseTape, ddpm_inversion
from vdiff_jax.sampling.job import (
    START_STREAM,
    even_plan,
    nothing_known,
    stream,
    text_to_video_job,
    uniform_plan,
)
from vdiff_jax.sampling.posterior import PosteriorSampling, chi_square
from vdiff_jax.sampling.samplers import sample
from vdiff_jax.types import Array, Conditioning, DenoiserWrapper, Job, Known, Latents

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion


@dataclasses.dataclass(frozen=True)
class EditOptions:
    """How to edit by prompt.

    method: "flow", "inversion", "ddpm" or "sdedit", see `editing.text_edit`.
    strength: 0..1, the schedule's coordinate of the level the walk starts from; higher changes more.
    steps, guidance_scale, negative_prompt: of the walk with the new prompt; None = the model's own, but at least
        `INVERSION_STEPS` for "inversion", which has to find its way back.
    source_guidance_scale: of the old prompt's estimate in "flow"; 1 = off.
    draws: noise draws averaged in every step of "flow".
    """

    method: str = "flow"
    strength: float = 0.7
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    source_guidance_scale: float = 1.0
    draws: int = 1

    def __post_init__(self):
        if self.method not in text_edit.METHODS:
            raise ValueError(f"edit method {self.method!r} is unknown: choose one of {', '.join(text_edit.METHODS)}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}: it must be above 0 and at most 1")
        if self.draws < 1:
            raise ValueError(f"draws={self.draws}: it must be at least 1")


INVERSION_STEPS = 50
GUESS_LOGSNR = -1.0
"""Where sampling begins in a first guess: noise of 1.6 times the latents' deviation, more than a guess is wrong."""
CHOSEN_LOGSNR = 0.5
"""The same for a guess that the model has made natural itself."""
CHOOSING_STEPS = 12
"""Denoising steps that make a guess natural."""


class Inverted(NamedTuple):
    """A clip as the noise that makes it: `z` at the plan's first level, or a whole tape (method "ddpm")."""

    z: Latents
    tape: NoiseTape | None = None


def edit_plan(model: VideoDiffusion, options: EditOptions, batch: int, num_frames: int) -> Array:
    """The levels `[s+1 b f]` an edit walks, from the one of its strength to clean."""
    steps = model.steps(options.steps)
    if options.method == "inversion" and options.steps is None:
        steps = max(steps, INVERSION_STEPS)
    return uniform_plan(model.schedule, steps, batch, num_frames, options.strength)


def invert(
    model: VideoDiffusion,
    source: Latents,
    source_prompts: Sequence[str] | None,
    options: EditOptions,
    *,
    keys: Array,
    known: Known | None = None,
    times: Array | None = None,
) -> Inverted:
    """The noise that makes `source`, for the methods "inversion" and "ddpm"; guidance is off on the way."""
    known = nothing_known(source.shape) if known is None else known
    cond = model.condition(source_prompts, times, source.shape)
    plan = edit_plan(model, options, *source.shape[:2])
    if options.method == "ddpm":
        tape = model.run(ddpm_inversion, source, plan, known, cond, keys, noise_kind=model.settings.noise)
        return Inverted(tape.z, tape)
    job = text_edit.inversion_job(source, plan, known, cond)
    return Inverted(model.run(sample, job, text_edit.INVERSION_SAMPLER, keys, finish=False))


def edit_by_prompt(
    model: VideoDiffusion,
    source: Latents,
    prompts: Sequence[str],
    source_prompts: Sequence[str] | None = None,
    options: EditOptions | None = None,
    *,
    keys: Array,
    known: Known | None = None,
    times: Array | None = None,
    inverted: Inverted | None = None,
    wrappers: tuple[DenoiserWrapper, ...] = (),
) -> Latents:
    """Change what clips show: from what `source_prompts` say (None = nothing is said) to what `prompts` say.

    known: what must stay, with its latents (see `Known`). times: time stamps. inverted: what `invert` returned for the
    same source, options and keys; made here where it is None. wrappers: further changes of the denoiser.
    """
    options = options or EditOptions()
    known = nothing_known(source.shape) if known is None else known
    cond = model.condition(prompts, times, source.shape)
    plan = edit_plan(model, options, *source.shape[:2])
    guidance = model.guidance(cond, options.negative_prompt, options.guidance_scale)
    if options.method == "flow":
        source_cond = model.condition(source_prompts, times, source.shape)
        flow = text_edit.FlowEdit(
            source,
            source_cond,
            guidance[0] if guidance else None,
            _source_guidance(model, source_cond, options),
            options.draws,
            model.settings.noise,
        )
        job = text_edit.flow_job(source, plan, known, cond)
        return model.run(sample, job, text_edit.FLOW_SAMPLER, keys, wrappers=(*wrappers, flow))
    if options.method == "sdedit":
        job = text_edit.sdedit_job(source, plan, known, cond, keys, model.settings.noise)
        return model.run(sample, job, model.sampler(), keys, wrappers=(*guidance, *wrappers))
    if inverted is None:
        inverted = invert(model, source, source_prompts, options, keys=keys, known=known, times=times)
    if inverted.tape is not None:
        job = text_edit.tape_job(inverted.tape, plan, known, cond)
        edited = model.run(sample, job, text_edit.TAPE_SAMPLER, keys, wrappers=(*guidance, *wrappers))
        return edited + inverted.tape.residual
    job = dataclasses.replace(text_edit.inversion_job(source, plan, known, cond), z=inverted.z, plan=plan)
    return model.run(sample, job, text_edit.INVERSION_SAMPLER, keys, wrappers=(*guidance, *wrappers))


def _source_guidance(model: VideoDiffusion, source_cond: Conditioning, options: EditOptions):
    found = model.guidance(source_cond, "", options.source_guidance_scale)
    return found[0] if found else None


def harmonise(
    model: VideoDiffusion,
    latents: Latents,
    prompts: Sequence[str] | None,
    strength: float = 0.3,
    *,
    keys: Array,
    steps: int | None = None,
    known: Known | None = None,
    times: Array | None = None,
) -> Latents:
    """Make latents that were changed by hand look natural: noise up to `strength`, then denoise, without guidance."""
    options = EditOptions("sdedit", strength, steps, guidance_scale=1.0)
    prompts = [""] * len(jnp.asarray(latents)) if prompts is None else prompts
    return edit_by_prompt(model, latents, prompts, None, options, keys=keys, known=known, times=times)


def restore(
    model: VideoDiffusion,
    observed: Any,
    degradation: Degradation,
    noise_std: Any,
    shape: tuple[int, ...],
    prompts: Sequence[str] | None = None,
    *,
    keys: Array,
    steps: int | None = None,
    iterations: int = 8,
    first_guess: Latents | None = None,
    guess_logsnr: float = GUESS_LOGSNR,
    known: Known | None = None,
    times: Array | None = None,
) -> Latents:
    """Latents of `shape` (b, f, h, w, c) drawn from the posterior given `observed = degradation(video) + noise`.

    noise_std: of the measurement in units of video (-1..1), see `PosteriorSampling`; the autoencoder's own error
    (`Settings.autoencoder_std`) is added to it, as no latents can explain the measurement better than that.
    iterations: of conjugate gradients in every step. prompts: one per clip or None. Guidance is off.
    first_guess: latents of a classical answer. Sampling then begins in it, under noise of the level `guess_logsnr`, and
    goes on in even steps of log-SNR. Without one it begins in pure noise, and needs a network whose derivative is a
    covariance at the noisiest levels too, as that of an exact denoiser is and that of a small network is not.
    """
    steps = model.steps(steps)
    noise_std = _with_autoencoder(model, noise_std)
    cond = model.condition(prompts, times, shape)
    if first_guess is None:
        job = text_to_video_job(keys, shape, model.schedule, steps, cond, model.settings.noise)
    else:
        job = _job_from_guess(model, first_guess, guess_logsnr, steps, keys, cond)
    job = job if known is None else dataclasses.replace(job, known=known)
    posterior = PosteriorSampling(observed, degradation, noise_std, iterations)
    return model.run(sample, job, model.sampler("dpmpp_2m"), keys, wrappers=(posterior,))


def restore_from(
    model: VideoDiffusion,
    guesses: Sequence[Latents],
    observed: Any,
    degradation: Degradation,
    noise_std: Any,
    prompts: Sequence[str] | None = None,
    *,
    keys: Array,
    choose: bool | None = None,
    steps: int | None = None,
    iterations: int = 8,
    known: Known | None = None,
    times: Array | None = None,
) -> tuple[Latents, np.ndarray | None]:
    """`restore` from the likeliest of several first guesses, each latents `[b f h w c]`; other arguments as there.

    choose: whether the guess is made natural and judged first (`likeliest_guess`); default: if there are several.

    Returns:
        latents `[b f h w c]`, and the `chi_square` of every guess, `[k b]`, or None if none was judged.
    """
    measured = (observed, degradation, noise_std)
    arguments: dict[str, Any] = dict(keys=keys, known=known, times=times)
    first_guess, level, distances = guesses[0], GUESS_LOGSNR, None
    if len(guesses) > 1 if choose is None else choose:
        few = min(CHOOSING_STEPS, model.steps(steps))
        first_guess, distances = likeliest_guess(model, guesses, *measured, prompts, steps=few, **arguments)
        level = CHOSEN_LOGSNR
    arguments |= dict(steps=steps, iterations=iterations, first_guess=first_guess, guess_logsnr=level)
    return restore(model, *measured, first_guess.shape, prompts, **arguments), distances


def likeliest_guess(
    model: VideoDiffusion,
    guesses: Sequence[Latents],
    observed: Any,
    degradation: Degradation,
    noise_std: Any,
    prompts: Sequence[str] | None = None,
    *,
    keys: Array,
    steps: int = CHOOSING_STEPS,
    logsnr: float = GUESS_LOGSNR,
    known: Known | None = None,
    times: Array | None = None,
) -> tuple[Latents, np.ndarray]:
    """For each sample the guess that explains what was observed best once the model has made it natural.

    Each of `guesses` (latents `[b f h w c]`) is put under noise of the level `logsnr` and denoised, one call per step.
    What the data does not hold, such as a colour no thing has at that brightness, moves away from the measurement by
    that. Other arguments as for `restore`.

    Returns:
        latents `[b f h w c]`, and the `chi_square` of every guess, `[k b]`.
    """
    cond = model.condition(prompts, times, guesses[0].shape)
    best, distances = guesses[0], []
    noise_std = _with_autoencoder(model, noise_std)
    for number, guess in enumerate(guesses):
        job = _job_from_guess(model, guess, logsnr, steps, keys, cond)
        job = job if known is None else dataclasses.replace(job, known=known)
        natural = model.run(sample, job, model.sampler("dpmpp_2m"), keys)
        seen = degradation(jnp.asarray(model.decode(natural) / 127.5 - 1, jnp.float32))
        distances.append(np.asarray(chi_square(observed, seen, noise_std)))
        closest = np.argmin(distances, axis=0) == number
        best = jnp.where(closest[:, None, None, None, None], natural, best)
    return best, np.stack(distances)


def _with_autoencoder(model: VideoDiffusion, noise_std: Any) -> Any:
    return jax.tree.map(lambda std: jnp.hypot(jnp.asarray(std), model.settings.autoencoder_std), noise_std)


def _job_from_guess(
    model: VideoDiffusion, guess: Latents, logsnr: float, steps: int, keys: Array, cond: Conditioning
) -> Job:
    """The job that begins in `guess` under noise of the level `logsnr`."""
    plan = even_plan(model.schedule, steps, logsnr, *guess.shape[:2])
    alpha, sigma = scales(plan[0], guess)
    noise = draw_noise(stream(keys, START_STREAM), guess.shape[1:], model.settings.noise)
    return Job(z=alpha * guess + sigma * noise, plan=plan, known=nothing_known(guess.shape), cond=cond)


def denoise(
    model: VideoDiffusion, video: np.ndarray, noise_std: float, prompts: Sequence[str] | None = None, **options: Any
) -> Latents:
    """Final latents of `video [b f h w 3]` in -1..1 without its white noise, of deviation `noise_std` in its units.

    What becomes of that noise in the latents is found by adding as much again. options: as for `denoise_from_level`.
    """
    video = np.asarray(video, np.float32)
    latents = model.encode(video)
    again = noise_std * np.random.default_rng(0).standard_normal(video.shape).astype(np.float32)
    latent_std = jnp.sqrt(jnp.mean(jnp.square(model.encode(video + again) - latents)))
    return denoise_from_level(model, latents, latent_std, prompts, **options)


def denoise_from_level(
    model: VideoDiffusion,
    noisy: Latents,
    latent_std: Any,
    prompts: Sequence[str] | None = None,
    *,
    keys: Array,
    steps: int | None = None,
    known: Known | None = None,
    times: Array | None = None,
) -> Latents:
    """Latents whose noise is white, of deviation `latent_std` (scalar or `[b]`): denoised from the level of that noise.

    With `logsnr = -2 log(latent_std)` a noisy clip is, times alpha, exactly what the network sees at that level; so no
    measurement is needed and every step costs one call.
    """
    level = -2 * jnp.log(jnp.maximum(jnp.asarray(latent_std, jnp.float32), 1e-4))
    level = jnp.broadcast_to(level[:, None] if level.ndim else level, noisy.shape[:2])
    start = model.schedule.u(jnp.clip(level, model.schedule.logsnr_min, model.schedule.logsnr_max))
    share = jnp.linspace(1.0, 0.0, model.steps(steps) + 1)[:, None, None]
    plan = model.schedule.logsnr(start[None] * share)
    alpha, _ = scales(plan[0], noisy)
    cond = model.condition(prompts, times, noisy.shape)
    known = nothing_known(noisy.shape) if known is None else known
    job = Job(z=alpha * noisy, plan=plan, known=known, cond=cond)
    return model.run(sample, job, model.sampler("dpmpp_2m"), keys)
