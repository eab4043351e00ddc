"""Style transfer on batches of latents: the content of one clip, the look of another or of an image.

`editing.style` has the changes of the denoiser, this is the layer that puts a model, prompts and a start beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.editing import text_edit
from vdiff_jax.editing.style import Composition, SharedAttention, StatisticsGuidance, between, statistics
from vdiff_jax.sampling.job import nothing_known, stream, uniform_plan
from vdiff_jax.sampling.samplers import sample
from vdiff_jax.types import Array, DenoiserWrapper, Known, Latents

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion

METHODS = ("flow", "inversion", "sdedit")

STYLE_STREAM = 3
"""The noise of the style is of a stream of its own, see `sampling.job.stream`."""


def stylize_latents(
    model: VideoDiffusion,
    source: Latents,
    style: Latents,
    prompts: Sequence[str] | None = None,
    source_prompts: Sequence[str] | None = None,
    *,
    keys: Array,
    strength: float | Array = 1.0,
    structure: float = 0.3,
    shared_attention: float | Array = 0.0,
    layout: float | Array = 0.0,
    method: str = "flow",
    steps: int | None = None,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    known: Known | None = None,
    times: Array | None = None,
) -> Latents:
    """Gives clips the look of a style: palette, contrast and, with shared attention, what the network sees in it.

    Args:
        source: final latents `[b f h w c]` of the clips. keys: `[b]`, one per clip.
        style: final latents `[b f h w c]`, or `[b 1 h w c]` of images; a batch of one serves all clips.
        prompts: what the result shows, without words for what the style shall decide; None = nothing is said.
        source_prompts: what the source shows; None = the same as `prompts`.
        strength: scalar or `[b]`, 0..1, how far the palette goes from the source's to the style's; also scales shared
            attention.
        structure: 0 up to, not including, 1: how firmly the source is held. The walk starts at the level
            `1 - structure` of the schedule.
        shared_attention: weight of the style's tokens, 0 = off (and half the cost), 1 = as own ones.
        layout: 0..1, also pull light and dark to where the style has them; costs content.
        method: what holds the content: "flow", "inversion" or "sdedit", see `editing.text_edit`.
        steps, guidance_scale, negative_prompt, times: as elsewhere; guidance is off by default.
        known: what must stay, with its latents (see `Known`).
    Returns:
        Final latents `[b f h w c]`, equal to `known.latents` where they are known. With method "flow", strength 0, no
        guidance and no `source_prompts`, the source, to rounding.
    Raises:
        ValueError: an unknown method, a structure that is out of range, or a style that does not fit the source.
    """
    if method not in METHODS:
        raise ValueError(f"style method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if not 0 <= structure < 1:
        raise ValueError(f"structure={structure}: it must be at least 0 and below 1")
    style = _like(style, source)
    known = nothing_known(source.shape) if known is None else known
    cond = model.condition(prompts, times, source.shape)
    batch, num_frames = source.shape[:2]
    plan = uniform_plan(model.schedule, model.steps(steps), batch, num_frames, 1.0 - structure)
    guidance = model.guidance(cond, negative_prompt, guidance_scale)
    strength = jnp.asarray(strength, jnp.float32)

    wrappers: tuple[DenoiserWrapper, ...] = guidance
    if not (isinstance(shared_attention, (int, float)) and shared_attention == 0):
        noise = draw_noise(stream(keys, STYLE_STREAM), source.shape[1:], model.settings.noise).astype(source.dtype)
        untold = model.condition(None, times, source.shape)
        wrappers = (SharedAttention(style, untold, noise, strength * jnp.asarray(shared_attention)), *wrappers)
    wanted = between(statistics(source), statistics(style), strength)
    # The strength is in what is wanted; the pull to it is whole from a tenth on, and off at 0.
    pull = StatisticsGuidance(wanted, jnp.minimum(10 * strength, 1.0), jnp.asarray(layout, jnp.float32))
    wrappers = (*wrappers, pull)

    source_cond = cond if source_prompts is None else model.condition(source_prompts, times, source.shape)
    if method == "flow":
        job = text_edit.flow_job(source, plan, known, cond)
        flow = text_edit.FlowEdit(source, source_cond, Composition(wrappers), noise_kind=model.settings.noise)
        return model.run(sample, job, text_edit.FLOW_SAMPLER, keys, wrappers=(flow,))
    if method == "sdedit":
        job = text_edit.sdedit_job(source, plan, known, cond, keys, model.settings.noise)
        return model.run(sample, job, model.sampler(), keys, wrappers=wrappers)
    job = text_edit.inversion_job(source, plan, known, source_cond)
    z = model.run(sample, job, text_edit.INVERSION_SAMPLER, keys, finish=False)
    job = dataclasses.replace(job, z=z, plan=plan, cond=cond)
    return model.run(sample, job, text_edit.INVERSION_SAMPLER, keys, wrappers=wrappers)


def _like(style: Latents, source: Latents) -> Latents:
    """The style repeated over frames and clips where it has one."""
    style = jnp.asarray(style, source.dtype)
    fits = style.ndim == 5 and style.shape[2:] == source.shape[2:]
    if not fits or any(have not in (1, need) for have, need in zip(style.shape[:2], source.shape[:2])):
        raise ValueError(
            f"a style of shape {style.shape} does not fit clips of {source.shape}: give [b 1 h w c] of an image or "
            "[b f h w c], of the clips' size"
        )
    return jnp.broadcast_to(style, source.shape)
