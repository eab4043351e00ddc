"""Where a training starts from: the weights of another model, once it is known that they fit."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.components import Component
from vdiff_jax.diffusion.timestep_levels import SVD_SIGMAS
from vdiff_jax.models.lora import DEFAULT_TARGETS
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.recipe import DataConfig, Recipe
from vdiff_jax.training.timestep_objective import PLAIN_WEIGHTING
from vdiff_jax.types import Params

COMPUTE_FIELDS = ("dtype", "remat", "attention_implementation")
"""How a network is computed: the recipe's choice, whoever made the weights."""
FREE_FIELDS = (*COMPUTE_FIELDS, "latent_mean", "latent_std")
"""Fields that may differ: weights of one compute type or memory policy fit any other, statistics are measured anew."""
VOCABULARY_FIELDS = ("vocab_size", "context_length")
"""Fields a text encoder takes over from the start, whose words its weights know."""
INFLATED_FRAMES = 16
"""Frames of a training window of an image model that becomes a video model, as AnimateDiff was trained."""
PUBLIC_TARGETS = (r"\.to_(q|k|v|out)\.kernel$",)
"""Kernels that a low-rank update of a public network changes if nothing else is asked for: those of attention."""


def load_start(recipe: Recipe, mesh: Mesh) -> VideoDiffusion | None:
    """The model that `model.init_from` names, or None if it names none, see `load_on`."""
    return load_on(recipe.model.init_from, mesh) if recipe.model.init_from else None


def load_on(name: str, mesh: Mesh) -> VideoDiffusion:
    """A model with its parameters on a mesh: the UNet's split as in training, the others whole on every device.

    Raises FileNotFoundError if there is no such model.
    """

    def split(shapes: Params) -> Any:
        return parallel.tree_shardings(shapes, mesh)

    # A public network may be too large for one device: every tensor goes to its devices as it is read.
    model = load(name, shardings=split)
    others = {part: values for part, values in model.params.items() if part != "unet"}
    return model.with_params(jax.device_put(others, parallel.replicated(mesh)))


def is_public(start: VideoDiffusion | None) -> bool:
    """Whether it is a pipeline of diffusers: its network is told timesteps, and taken as it is."""
    return start is not None and "unet" in start.components and start.unet_config.reads_timesteps


def filled(recipe: Recipe, start: VideoDiffusion) -> Recipe:
    """A copy of the recipe with what it leaves open, an empty name or a 0, taken from the model it starts from."""
    recipe = recipe.copy_and_resolve_references()
    own, public = start.settings, is_public(start)
    image = public and start.unet_config.family == "image"
    _fill(
        recipe.data,
        size=own.size,
        num_frames=INFLATED_FRAMES if image else own.num_frames,
        native_fps=own.fps,
        context_length=own.context_length,
    )
    _fill(recipe.diffusion, prediction=own.prediction, noise=own.noise)
    if not recipe.diffusion.schedule:
        schedule, settings = _training_schedule(start) if public else (own.schedule, own.schedule_settings)
        recipe.diffusion.schedule = schedule
        recipe.diffusion.schedule_settings = {**settings, **recipe.diffusion.schedule_settings.to_dict()}
    weighting = PLAIN_WEIGHTING.get(recipe.diffusion.prediction, "eps") if public else "sigmoid"
    _fill(recipe.diffusion, weighting=weighting)
    num_frames = recipe.data.num_frames if public else own.num_frames
    _fill(recipe.sample, sampler=own.sampler, steps=own.steps, guidance_scale=own.guidance_scale, num_frames=num_frames)
    if public and tuple(recipe.lora.targets) == DEFAULT_TARGETS:
        recipe.lora.targets = PUBLIC_TARGETS
    if not public and not recipe.model.text:
        _fill_networks(recipe, start)
    return recipe


def _fill(section: Any, **values: Any) -> None:
    for name, value in values.items():
        if not section[name]:
            with section.ignore_type():  # a size may be one number or two
                section[name] = value


def _training_schedule(start: VideoDiffusion) -> tuple[str, dict[str, Any]]:
    """Where a public network is trained: at the timesteps of its table, or at the sigmas of Stable Video Diffusion."""
    if start.settings.schedule != "edm":
        return start.settings.schedule, start.settings.schedule_settings
    ends = dict(logsnr_min=start.schedule.logsnr_min, logsnr_max=start.schedule.logsnr_max)
    return "logit_normal", {**SVD_SIGMAS, **ends}


def _fill_networks(recipe: Recipe, start: VideoDiffusion) -> None:
    """The networks of one of our own models, where the recipe leaves `model.text` open."""
    if not recipe.model.autoencoder_from:
        recipe.model.autoencoder_from = recipe.model.init_from
    for name in ("unet", "text_encoder"):
        if name in start.components:
            config = start.components[name].config_dict()
            recipe.model[name].update({field: config[field] for field in config if field not in COMPUTE_FIELDS})
    text = start.components.get("text_encoder")
    recipe.model.text = "none" if text is None else "minilm" if text.config == TextEncoderConfig.minilm() else "joint"


def check_start(recipe: Recipe, data: DataConfig, start: VideoDiffusion, *networks: Component) -> None:
    """Whether the weights of one of our own models fit.

    networks: what the recipe trains, or reads prompts with; the model must hold the same ones.
    Raises ValueError if a network is missing or another one, naming the first field that differs, or if prompts are to
    be longer than its text encoder knows. Reads no data.
    """
    name = recipe.model.init_from
    for network in networks:
        if network.name not in start.components:
            raise ValueError(f"model.init_from={name} holds no {network.name}: give a model that has one")
        _check_same_network(name, start.components[network.name], network)
    if any(network.name == "text_encoder" for network in networks):
        if start.tokenizer is None:
            raise ValueError(f"model.init_from={name} has no tokenizer.json: its text encoder cannot be used without")
        longest = start.components["text_encoder"].config.context_length
        if data.context_length > longest:
            raise ValueError(
                f"data.context_length={data.context_length} is more than the {longest} tokens that the text encoder of "
                f"model.init_from={name} was made for: lower it"
            )


def _check_same_network(name: str, theirs: Component, ours: Component) -> None:
    free = {*FREE_FIELDS, *(VOCABULARY_FIELDS if ours.name == "text_encoder" else ())}
    start, recipe = theirs.config_dict(), ours.config_dict()
    for field in sorted(set(recipe) - free):
        if recipe[field] != start[field]:
            raise ValueError(
                f"model.init_from={name} has model.{ours.name}.{field}={start[field]}, the recipe {recipe[field]}: "
                "its weights fit only the same network"
            )


def warn_of_another_process(recipe: Recipe, start: VideoDiffusion, autoencoder_digest: str) -> None:
    """Says what the weights of `start` have to unlearn: another kind of prediction or noise, other latents."""
    for field in ("prediction", "noise"):
        theirs, ours = getattr(start.settings, field), recipe.diffusion[field]
        if theirs != ours:
            warnings.warn(
                f"model.init_from={recipe.model.init_from} was trained with diffusion.{field}={theirs!r}, the recipe "
                f"says {ours!r}: its weights have to learn that anew",
                stacklevel=2,
            )
    if "autoencoder" in start.components and start.component_digest("autoencoder") != autoencoder_digest:
        warnings.warn(
            f"model.init_from={recipe.model.init_from} was trained on the latents of another autoencoder than "
            f"model.autoencoder_from={recipe.model.autoencoder_from}: its weights have to learn the latents anew",
            stacklevel=2,
        )


def check_public_fields(recipe: Recipe, start: VideoDiffusion, free: tuple[str, ...] = ()) -> None:
    """A public network is taken as it is; a field that a recipe changes from its default must not say otherwise.

    free: fields of the UNet that the recipe decides, beside how it is computed.
    Raises ValueError, naming the field.
    """
    for part, component in start.components.items():
        if part not in recipe.model:
            continue
        theirs, default = dataclasses.asdict(component.config), dataclasses.asdict(type(component.config)())
        for field, value in recipe.model[part].to_dict().items():
            value = tuple(value) if isinstance(value, list) else value
            if field in (*COMPUTE_FIELDS, *free) or value in (default[field], theirs[field]):
                continue
            raise ValueError(
                f"model.{part}.{field}={value!r}, but that of model.init_from={recipe.model.init_from} is "
                f"{theirs[field]!r}: leave it out, a public network is taken as it is"
            )
