"""The diffusion stage from a pipeline of diffusers: its networks as they are, an image model made a video model."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from vdiff_jax.components import Component, make_component
from vdiff_jax.diffusion.schedule import Schedule, make_schedule
from vdiff_jax.interop.motion import inflated
from vdiff_jax.interop.schedulers import scheduler_json
from vdiff_jax.pipeline import Settings, VideoDiffusion
from vdiff_jax.recipe import DataConfig, DiffusionConfig, LoraConfig, Recipe, SampleConfig, lora_config
from vdiff_jax.stages.cache import fill_latent_cache
from vdiff_jax.stages.networks import Networks, begun, updated
from vdiff_jax.starting_point import COMPUTE_FIELDS, check_public_fields, load_on, warn_of_another_process
from vdiff_jax.types import Params

MOTION_FIELDS = ("motion_heads", "motion_layers", "motion_mid", "motion_positions", "motion_norm")
"""What a recipe may say of the motion modules that an image model is given."""
MOTION_MODULES = (r"^unet\..*\.temporal\.",)
"""What is trained of AnimateDiff's networks (Guo et al. 2024) if nothing else is asked for."""
NEEDED = {
    "modelscope": ("text_encoder",),
    "animatediff": ("text_encoder",),
    "image": ("text_encoder",),
    "svd": ("image_encoder",),
}
"""Families that are trained -> encoders without which their networks read nothing."""


def public_networks(recipe: Recipe, data: DataConfig, start: VideoDiffusion, mesh: Mesh) -> Networks:
    """The pipeline's networks: its UNet is trained, or a part or an update of it; all others stay.

    Raises ValueError for a family that is not trained, and for settings that contradict the pipeline, by name.
    """
    _check(recipe, data, start)
    unet, params = _unet(recipe, data, start)
    base = load_on(recipe.model.autoencoder_from, mesh) if recipe.model.autoencoder_from else start
    autoencoder, digest = base.components["autoencoder"], base.component_digest("autoencoder")
    if autoencoder.config.latent_channels != unet.config.latent_channels:
        raise ValueError(
            f"model.autoencoder_from={recipe.model.autoencoder_from} has {autoencoder.config.latent_channels} latent "
            f"channels, the network of model.init_from={recipe.model.init_from} reads {unet.config.latent_channels}"
        )
    warn_of_another_process(recipe, start, digest)
    fill_latent_cache(data, autoencoder, base.params["autoencoder"], digest)
    stay = [name for name in ("text_encoder", "image_encoder") if name in start.components]
    components = {"autoencoder": autoencoder, "unet": unet} | {name: start.components[name] for name in stay}
    fixed = {"autoencoder": base.params["autoencoder"]} | {name: start.params[name] for name in stay}
    networks = Networks(components, fixed, ("unet",), start.tokenizer, digest)
    low_rank: LoraConfig = lora_config(recipe)
    if low_rank.rank:
        update = updated(low_rank, start, ("unet",), recipe.model.init_from)
        return dataclasses.replace(networks, update=update)
    patterns = tuple(recipe.model.trainable) or (MOTION_MODULES if unet.config.family == "animatediff" else ())
    return begun(networks, {"unet": params}, patterns)


def _check(recipe: Recipe, data: DataConfig, start: VideoDiffusion) -> None:
    """What a recipe asks of a pipeline that it cannot have."""
    name, family = recipe.model.init_from, start.unet_config.family
    if family not in NEEDED:
        raise ValueError(f"model.init_from={name} is of family {family!r}: those trained are {', '.join(NEEDED)}")
    for part in NEEDED[family]:
        if part not in start.components:
            raise ValueError(f"model.init_from={name} has no {part}, which its network reads: give a whole pipeline")
    if start.unet_config.conditioning_channels and family != "svd":
        raise ValueError(f"model.init_from={name} is made for filling in (its UNet reads masks): that is not trained")
    if recipe.model.text:
        raise ValueError(
            f"model.text={recipe.model.text!r}: the text encoder of the public model.init_from={name} stays as it is; "
            "leave model.text empty, as configs/finetune.py does"
        )
    if start.tokenizer is not None and data.context_length != start.settings.context_length:
        raise ValueError(
            f"data.context_length={data.context_length}: model.init_from={name} reads all of its "
            f"{start.settings.context_length} tokens, padding too; leave it 0"
        )
    own = start.settings.schedule
    if (own == "discrete") != (recipe.diffusion.schedule == "discrete"):
        raise ValueError(
            f"diffusion.schedule={recipe.diffusion.schedule!r}: the network of model.init_from={name} is told the "
            f"timesteps of schedule {own!r}; leave it empty, as configs/finetune.py does"
        )
    start.latent_size(data.size)  # raises for a size that does not fit
    check_public_fields(recipe, start, free=MOTION_FIELDS if family == "image" else ())
    _check_parts_trained(recipe, family)
    if family == "svd" and data.latent_cache:
        raise ValueError(f"data.latent_cache: model.init_from={name} is shown pixels of first frames; leave it empty")
    if family == "svd" and recipe.sample.prompts:
        raise ValueError(f"sample.prompts: model.init_from={name} reads pictures and no prompts; leave it empty")


def _check_parts_trained(recipe: Recipe, family: str) -> None:
    name, low_rank = recipe.model.init_from, recipe.lora
    if not low_rank.rank:
        return
    if recipe.model.trainable:
        raise ValueError("model.trainable and lora.rank exclude each other: lora.targets says what is updated")
    if low_rank.new_words:
        raise ValueError(f"lora.new_words: the text encoder of model.init_from={name} stays as it is; describe instead")
    if family == "image":
        raise ValueError(
            f"lora.rank={low_rank.rank}: model.init_from={name} is an image model, whose motion modules have to be "
            "trained first (lora.rank=0)"
        )


def _unet(recipe: Recipe, data: DataConfig, start: VideoDiffusion) -> tuple[Component, Params]:
    """The network that is trained and its parameters; computed as the recipe says."""
    unet, params = start.components["unet"], start.params["unet"]
    if unet.config.family == "image":
        unet, params = inflated(unet, params, **{field: recipe.model.unet[field] for field in MOTION_FIELDS})
    positions = unet.config.motion_positions
    if unet.config.family == "animatediff" and 0 < positions < data.num_frames:
        raise ValueError(
            f"data.num_frames={data.num_frames}: the motion modules of model.init_from={recipe.model.init_from} know "
            f"{positions} positions; lower it"
        )
    computed = {field: recipe.model.unet[field] for field in COMPUTE_FIELDS}
    return make_component("unet", {**unet.config_dict(), **computed}), params


def public_settings(data: DataConfig, diffusion: DiffusionConfig, sample: SampleConfig, own: Settings) -> Settings:
    """What the saved pipeline will know: its own settings, and what the recipe changes.

    Raises ValueError for a process that no public scheduler has, as no pipeline could be saved.
    """
    table = own.schedule == "discrete"
    settings = dataclasses.replace(
        own,
        size=data.size,
        fps=data.native_fps,
        num_frames=sample.num_frames,
        sampler=sample.sampler,
        steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        prediction=diffusion.prediction,
        schedule=diffusion.schedule if table else own.schedule,
        schedule_settings=dict(diffusion.schedule_settings) if table else own.schedule_settings,
        noise=diffusion.noise,
    )
    scheduler_json(settings)
    return settings


def told_schedule(drawn: Schedule, own: Settings) -> Schedule:
    """The schedule whose timesteps the network is told, where levels are drawn from `drawn`."""
    return drawn if own.schedule == "discrete" else make_schedule(own.schedule, **own.schedule_settings)
