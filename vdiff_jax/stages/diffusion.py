"""The stage `diffusion`: from scratch, from a model or a pipeline of diffusers; whole, in part, or an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.data.video_io import contact_sheet
from vdiff_jax.diffusion.loss import weight
from vdiff_jax.diffusion.noise import NOISE_KINDS
from vdiff_jax.diffusion.patterns import Mixture
from vdiff_jax.diffusion.prediction import check_kind
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.interop import lora as lora_files
from vdiff_jax.interop import pretrained
from vdiff_jax.lora_stage import Personalisation, mixed, split_batch
from vdiff_jax.measures import channel_weights
from vdiff_jax.pipeline import Settings, VideoDiffusion
from vdiff_jax.recipe import (
    DataConfig,
    DiffusionConfig,
    PictureConfig,
    Recipe,
    SampleConfig,
    diffusion_config,
    lora_config,
    section,
)
from vdiff_jax.stages.networks import Networks, native_networks
from vdiff_jax.stages.prepare import Prepare, batch_keys, make_prepare
from vdiff_jax.stages.public_start import public_networks, public_settings, told_schedule
from vdiff_jax.stages.stage import Stage, save_sheet
from vdiff_jax.starting_point import is_public
from vdiff_jax.streams import Stream, make_stream
from vdiff_jax.training.diffusion_objective import make_diffusion_loss, predictor
from vdiff_jax.training.step import LossFn
from vdiff_jax.training.timestep_objective import make_timestep_loss
from vdiff_jax.training.writers import MetricWriter
from vdiff_jax.types import Array, Batch, Params


def diffusion_stage(recipe: Recipe, data: DataConfig, start: VideoDiffusion | None, mesh: Mesh, workdir: Path) -> Stage:
    # --- what is asked for
    diffusion, mixture = diffusion_config(recipe)
    _check_objective(diffusion)
    low_rank = lora_config(recipe)
    data, prior_data = split_batch(data, low_rank) if low_rank.rank else (data, None)
    for part in filter(None, (data, prior_data)):
        parallel.check_batch_size(part.batch_size, mesh)

    # --- networks, and what the finished model will know
    if start is not None and is_public(start):
        networks = public_networks(recipe, data, start, mesh)
    else:
        networks = native_networks(recipe, data, start, mesh)
    settings = _settings(recipe, data, diffusion, start, networks)
    shown = networks.on_host(mesh)
    model = VideoDiffusion(
        networks.components,
        {name: shown.fixed.get(name) or {} for name in networks.components},
        networks.tokenizer,
        settings,
    )

    # --- data
    autoencoder = networks.components["autoencoder"]
    tokenizer = networks.tokenizer if "text_encoder" in networks.components else None
    anchor_rate = 0.0 if is_public(start) else mixture.anchor_probability()
    parts = [
        make_stream(
            part,
            seed=recipe.seed,
            tokenizer=tokenizer,
            anchor_rate=anchor_rate,
            digest=networks.digest,
            share=parallel.batch_share(mesh),
        )
        for part in filter(None, (data, prior_data))
    ]
    picture = section(recipe, "picture", PictureConfig)
    shifts = (low_rank.shift if low_rank.rank else 0, 0)
    prepare = [make_prepare(networks, picture, data.native_fps, shift) for shift in shifts]

    # --- loss
    weights = channel_weights(diffusion.channel_weighting, autoencoder, networks.fixed["autoencoder"], parts[0])
    loss_fn = _loss(recipe, data, networks, diffusion, mixture, weights, start)
    base = None
    if networks.update is not None:
        loss_fn = networks.update.loss(loss_fn)
        base = jax.device_put(networks.update.base, parallel.tree_shardings(networks.update.base, mesh))

    sample = section(recipe, "sample", SampleConfig)
    return Stage(
        init=networks.init,
        loss_fn=loss_fn,
        batches_from=_batches(parts, prepare, networks, recipe.seed, mesh),
        on_sample=_preview(model, shown, sample, workdir, data.native_fps),
        finish=_finish(model, shown),
        left_out=parts[0].left_out,
        example_steps=parts[0].example_steps,
        unread=parts[0].unread,
        frozen=base,
        start=networks.start,
    )


def _check_objective(diffusion: DiffusionConfig) -> None:
    """Whatever can be wrong with the loss is said before any data is read."""
    schedule = make_schedule(diffusion.schedule, **diffusion.schedule_settings)
    check_kind(diffusion.prediction, schedule.logsnr_min)
    if diffusion.channel_weighting not in ("equal", "pixels"):
        raise ValueError(f"diffusion.channel_weighting={diffusion.channel_weighting!r}: choose equal or pixels")
    if diffusion.noise not in NOISE_KINDS:
        raise ValueError(f"diffusion.noise={diffusion.noise!r}: choose one of {', '.join(NOISE_KINDS)}")
    if unknown := sorted(set(diffusion.weighting_settings) - {"bias", "gamma"}):
        raise ValueError(f"diffusion.weighting_settings has no {', '.join(unknown)}: it takes bias and gamma")
    weight(diffusion.weighting, jnp.zeros(()))


def _settings(
    recipe: Recipe, data: DataConfig, diffusion: DiffusionConfig, start: VideoDiffusion | None, networks: Networks
) -> Settings:
    """What the saved model will know of its training."""
    sample = section(recipe, "sample", SampleConfig)
    if start is not None and is_public(start):
        return public_settings(data, diffusion, sample, start.settings)
    walk = {name: getattr(sample, name) for name in ("num_frames", "sampler", "steps", "guidance_scale")}
    if start is not None and isinstance(networks.update, Personalisation):
        return dataclasses.replace(start.settings, **walk)  # its process is the base's, whatever it is trained at
    return Settings(
        size=data.size,
        fps=data.native_fps,
        prediction=diffusion.prediction,
        schedule=diffusion.schedule,
        schedule_settings=dict(diffusion.schedule_settings),
        noise=diffusion.noise,
        context_length=data.context_length,
        **walk,
    )


def _loss(
    recipe: Recipe,
    data: DataConfig,
    networks: Networks,
    diffusion: DiffusionConfig,
    mixture: Mixture,
    weights: Array | None,
    start: VideoDiffusion | None,
) -> LossFn:
    """The loss of all parameters: over the mixture, or at one timestep a clip for a public network."""
    drawn = make_schedule(diffusion.schedule, **diffusion.schedule_settings)
    predict_fn = predictor(networks.components["unet"].apply)
    text = networks.components.get("text_encoder")
    shared: dict[str, Any] = dict(
        null_prompt=networks.null_prompt(data.context_length),
        kind=diffusion.prediction,
        weighting=diffusion.weighting,
        weighting_settings=dict(diffusion.weighting_settings),
        channel_weights=weights,
        noise=diffusion.noise,
        prompt_dropout=diffusion.prompt_dropout,
        log_bins=diffusion.log_bins,
    )
    if start is not None and is_public(start):
        return make_timestep_loss(
            predict_fn,
            schedule=told_schedule(drawn, start.settings),
            drawn=drawn,
            picture_dropout=section(recipe, "picture", PictureConfig).dropout,
            attend_padding=start.settings.attend_padding,
            **shared,
        )
    return make_diffusion_loss(
        predict_fn,
        None if text is None else lambda params, *args: text.apply(params["text_encoder"], *args),
        schedule=drawn,
        mixture=mixture,
        context_prompt_dropout=diffusion.context_prompt_dropout,
        **shared,
    )


def _batches(
    streams: list[Stream], prepare: list[Prepare], networks: Networks, seed: int, mesh: Mesh
) -> Callable[[int], Iterator[Batch]]:
    """step -> prepared batches from there on, of all streams together."""
    fixed = jax.device_put(networks.fixed, parallel.replicated(mesh))

    def prepared(part: int, step: int) -> Iterator[Batch]:
        part_key = jax.random.fold_in(jax.random.key(seed), 1 + part)
        for index, batch in enumerate(streams[part].starting_at(step, mesh), start=step):
            keys = batch_keys(jax.random.fold_in(part_key, index), len(batch["times"]), mesh)
            yield prepare[part](fixed, batch, keys)

    return lambda step: mixed([prepared(part, step) for part in range(len(streams))])


def _preview(model: VideoDiffusion, networks: Networks, sample: SampleConfig, workdir: Path, fps: float):
    def on_sample(step: int, params: Params, writer: MetricWriter) -> None:
        trained = model.with_params(networks.complete(params))
        clips = trained.generate(list(sample.prompts), seed=sample.seed)
        frames = np.stack([clip.frames for clip in clips])
        save_sheet(workdir, step, contact_sheet(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1]))
        writer.video(step, "samples", frames, fps=fps)

    return on_sample if sample.prompts else None


def _finish(model: VideoDiffusion, networks: Networks):
    def finish(params: Params, folder: Path) -> None:
        if isinstance(networks.update, Personalisation):
            _save_update(networks.update, params, model.settings, folder)
        else:
            model.with_params(networks.complete(params)).save_pretrained(folder)

    return finish


def _save_update(update: Personalisation, trainable: Params, settings: Settings, folder: Path) -> None:
    """A folder that `load` takes for the personalised model, as long as it finds the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    lora_files.save_lora(folder / lora_files.FILE_NAME, update.lora(trainable))
    settings_dict = dataclasses.asdict(settings)
    config = {"format": lora_files.FORMAT, "base": update.base_name, "settings": settings_dict}
    pretrained.save_json(folder / "config.json", config)
