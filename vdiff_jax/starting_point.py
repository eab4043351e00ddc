"""Where a training starts from: the weights of another model, once it is known that they fit."""

from __future__ import annotations

import warnings

from vdiff_jax.components import Component
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.recipe import DataConfig, Recipe

FREE_FIELDS = ("dtype", "remat", "attention_implementation", "latent_mean", "latent_std")
"""Fields that may differ: weights of one compute type or memory policy fit any other, statistics are measured anew."""
VOCABULARY_FIELDS = ("vocab_size", "context_length")
"""Fields a text encoder takes over from the start, whose words its weights know."""


def starting_point(recipe: Recipe, data: DataConfig, *networks: Component) -> VideoDiffusion | None:
    """The model that `model.init_from` names, or None if it names none.

    networks: what the recipe trains, or reads prompts with; the model must hold the same ones.
    Raises FileNotFoundError if there is no such model; ValueError if a network is missing or another one, naming the
    first field that differs, or if prompts are to be longer than its text encoder knows. Reads no data.
    """
    name = recipe.model.init_from
    if not name:
        return None
    start = load(name)
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
    return start


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
