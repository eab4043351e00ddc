"""The networks of the diffusion stage: which are trained, from what, and which stay as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.components import Component, make_component
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.interop import transformers
from vdiff_jax.lora_stage import Personalisation, personalisation
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.pipeline import VideoDiffusion
from vdiff_jax.recipe import DataConfig, LoraConfig, Recipe, lora_config
from vdiff_jax.stages.cache import fill_latent_cache
from vdiff_jax.starting_point import VOCABULARY_FIELDS, check_start, load_on, warn_of_another_process
from vdiff_jax.streams import make_stream
from vdiff_jax.trained_part import TrainedPart, trained_part
from vdiff_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Networks:
    """What the diffusion stage trains, and what it needs beside.

    components: by name. fixed: parameters of those that stay, by component. trained: names of the others. start: the
    parameters that training begins with, or None for fresh ones. update: where only a part of them, or an update, is
    trained. digest: of the autoencoder.
    """

    components: dict[str, Component]
    fixed: dict[str, Params]
    trained: tuple[str, ...]
    tokenizer: Tokenizer | None
    digest: str
    start: Params | None = None
    update: Personalisation | TrainedPart | None = None

    def init(self, key: Array) -> Params:
        if isinstance(self.update, Personalisation):
            return self.update.init(key)
        if self.start is not None:
            return jax.tree.map(jnp.asarray, self.start)
        return {
            name: self.components[name].init(jax.random.fold_in(key, index)) for index, name in enumerate(self.trained)
        }

    def complete(self, trainable: Params) -> Params:
        """The parameters of all networks."""
        params = trainable if self.update is None else self.update.complete(trainable, self.update.base)
        return {**self.fixed, **params}

    def on_host(self, mesh: Mesh) -> Networks:
        """The same, for what one process computes alone on a device of its own; all must call it."""
        if mesh.size == 1:
            return self
        update = self.update
        if update is not None:
            update = dataclasses.replace(update, base=parallel.to_host(update.base))
        return dataclasses.replace(self, fixed=parallel.to_host(self.fixed), update=update)

    def null_prompt(self, context_length: int) -> tuple[Array, Array] | None:
        """The empty prompt as tokens, or as features where the text encoder is fixed; and its mask."""
        text = self.components.get("text_encoder")
        if text is None or self.tokenizer is None:
            return None
        value, mask = self.tokenizer.encode([""], context_length)
        if "text_encoder" in self.fixed:
            with parallel.on_this_process():
                value = np.asarray(jax.jit(text.apply)(parallel.to_host(self.fixed["text_encoder"]), value, mask))
        return jnp.asarray(value[0]), jnp.asarray(mask[0])


def begun(networks: Networks, params: Params, patterns: tuple[str, ...]) -> Networks:
    """The same, begun with `params`, of which those that `patterns` choose are trained (all without any)."""
    part = trained_part(params, patterns)
    start = params if part is None else part.start
    return dataclasses.replace(networks, start=start, update=part)


def updated(low_rank: LoraConfig, start: VideoDiffusion, trained: tuple[str, ...], name: str) -> Personalisation:
    """The low-rank update of the model called `name`. Raises ValueError as `personalisation`."""
    digests = {part: start.component_digest(part) for part in trained}
    return personalisation(low_rank, (start.components, start.params, start.tokenizer), trained, digests, name)


def native_networks(recipe: Recipe, data: DataConfig, start: VideoDiffusion | None, mesh: Mesh) -> Networks:
    """Those of the recipe, with an autoencoder of its own and, where there is a start, its weights.

    Raises ValueError for networks that do not fit each other or the start, before any data is read.
    """
    if not recipe.model.autoencoder_from:
        raise ValueError("model.autoencoder_from is empty: train an autoencoder first and give its run folder")
    if recipe.model.trainable and start is None:
        raise ValueError("model.trainable needs model.init_from: what is not trained has to come from a model")
    base = load_on(recipe.model.autoencoder_from, mesh)
    autoencoder, digest = base.components["autoencoder"], base.component_digest("autoencoder")
    text_settings = _text_settings(recipe)
    unet_settings = recipe.model.unet.to_dict() | {"latent_channels": autoencoder.config.latent_channels}
    unet = make_component("unet", unet_settings | {"text_features": text_settings.get("features")})
    text_networks = [make_component("text_encoder", text_settings)] if text_settings else []
    if start is not None:
        check_start(recipe, data, start, unet, *text_networks)
        warn_of_another_process(recipe, start, digest)
    fill_latent_cache(data, autoencoder, base.params["autoencoder"], digest)  # captions are read from it

    update, low_rank = None, lora_config(recipe)
    if low_rank.rank and start is not None:
        trained = ("unet", "text_encoder") if recipe.model.text == "joint" else ("unet",)
        update = updated(low_rank, start, trained, recipe.model.init_from)
        start = dataclasses.replace(start, **dict(zip(("components", "params", "tokenizer"), update.parts)))
    text, text_params, tokenizer = _text_encoder(recipe, data, start)
    components = {"autoencoder": autoencoder, "unet": unet} | ({"text_encoder": text} if text else {})
    fixed = {"autoencoder": base.params["autoencoder"]} | ({"text_encoder": text_params} if text_params else {})
    trained = tuple(name for name in ("unet", "text_encoder") if name in components and name not in fixed)
    networks = Networks(components, fixed, trained, tokenizer, digest, update=update)
    if start is None or update is not None:
        return networks
    return begun(networks, {name: start.params[name] for name in trained}, tuple(recipe.model.trainable))


def _text_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields of the text encoder as far as they are known before any caption is read; empty without one."""
    kinds = {
        "joint": recipe.model.text_encoder.to_dict(),
        "minilm": dataclasses.asdict(TextEncoderConfig.minilm()),
        "none": {},
    }
    if recipe.model.text not in kinds:
        raise ValueError(f"model.text={recipe.model.text!r}: choose {', '.join(kinds)}")
    return kinds[recipe.model.text]


def _text_encoder(
    recipe: Recipe, data: DataConfig, start: VideoDiffusion | None
) -> tuple[Component | None, Params | None, Tokenizer | None]:
    """(component, fixed params or None if trained, tokenizer)."""
    if recipe.model.text == "none":
        return None, None, None
    if recipe.model.text == "minilm":
        return transformers.load_minilm()
    if start is not None:  # its words are those its weights know
        known = start.components["text_encoder"].config_dict()
        vocabulary, tokenizer = {name: known[name] for name in VOCABULARY_FIELDS}, start.tokenizer
    else:
        tokenizer = make_stream(data, seed=recipe.seed, tokenizer=None).fit_tokenizer()
        vocabulary = {"vocab_size": tokenizer.vocab_size, "context_length": data.context_length}
    return make_component("text_encoder", _text_settings(recipe) | vocabulary), None, tokenizer
