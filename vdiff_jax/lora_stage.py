"""Training a low-rank update of a model: what is trained, what stays, and batches that remind it of what it knew.

trainable  {"unet": factors, "text_encoder": factors, "words": {"embedding": [n d]}}
frozen     the base model's parameters, given to the loss beside them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.components import make_config
from vdiff_jax.lora_model import TABLE, Parts, add_words
from vdiff_jax.models.lora import Lora, init_lora, lora_targets, merge
from vdiff_jax.recipe import DataConfig, LoraConfig, checked_data
from vdiff_jax.training.step import LossFn
from vdiff_jax.types import Array, Batch, Params

WORDS = "words"


@dataclasses.dataclass(frozen=True)
class Personalisation:
    """An update in training.

    parts: the base model with the new words added. base: its networks' parameters, by component. rows: where the new
    words stand in the embedding table. digests: of the base's components before the words were added.
    """

    config: LoraConfig
    parts: Parts
    base: Params
    targets: tuple[str, ...]
    rows: np.ndarray
    digests: dict[str, str]
    base_name: str

    def init(self, key: Array) -> Params:
        """The update that changes nothing: see `models.lora.init_lora`; the words as they were added."""
        trainable = init_lora(key, self.base, self.config.rank, self.targets)
        if len(self.rows):
            trainable[WORDS] = {"embedding": self.base["text_encoder"][TABLE][self.rows]}
        return trainable

    def complete(self, trainable: Params, base: Params) -> Params:
        """The parameters of all trained networks: the base with the update."""
        factors = {name: branch for name, branch in trainable.items() if name != WORDS}
        params = merge(base, factors, self.config.alpha / self.config.rank)
        if WORDS in trainable:
            encoder = params["text_encoder"]
            table = encoder[TABLE].at[self.rows].set(trainable[WORDS]["embedding"])
            params["text_encoder"] = {**encoder, TABLE: table}
        return params

    def loss(self, loss_fn: LossFn) -> LossFn:
        """A loss of all parameters as a loss of the update, with the base as its fourth argument."""

        def loss(trainable: Params, batch: Batch, keys: Array, base: Params) -> tuple[Array, dict[str, Array]]:
            return loss_fn(self.complete(trainable, base), batch, keys)

        return loss

    def lora(self, trainable: Params) -> Lora:
        """What is to be saved."""
        factors = {name: branch for name, branch in trainable.items() if name != WORDS}
        return Lora(
            factors=factors,
            rank=self.config.rank,
            alpha=self.config.alpha,
            targets=self.config.targets,
            new_words=tuple(word.partition("=")[0] for word in self.config.new_words),
            word_rows=trainable[WORDS]["embedding"] if WORDS in trainable else None,
            base=self.digests,
            base_name=self.base_name,
        )


def personalisation(
    config: LoraConfig, parts: Parts, trained: tuple[str, ...], digests: dict[str, str], base_name: str
) -> Personalisation:
    """trained: the components that a full training would train. digests: of those. Reads no data.

    Raises ValueError for targets that match nothing, words that are known, or words for a frozen text encoder.
    """
    if config.new_words and "text_encoder" not in trained:
        raise ValueError("lora.new_words needs a text encoder that is trained: set model.text='joint'")
    parts, rows = add_words(parts, config.new_words)
    base = {name: jax.tree.map(jnp.asarray, parts[1][name]) for name in trained}
    targets = lora_targets(base, config.targets)
    touched = {path.split(".")[0] for path in targets} | ({"text_encoder"} if config.new_words else set())
    digests = {name: digests[name] for name in sorted(touched)}
    return Personalisation(config, parts, base, targets, rows, digests, base_name)


def split_batch(data: DataConfig, config: LoraConfig) -> tuple[DataConfig, DataConfig | None]:
    """(data of the new clips, data of what the model was trained on or None), with their shares of the batch size.

    Raises ValueError if one of them would be empty, or for a field of `lora.prior` that is none of the data section's.
    """
    count = round(config.prior_share * data.batch_size)
    if not config.prior_share:
        return data, None
    if not 0 < count < data.batch_size:
        raise ValueError(
            f"lora.prior_share={config.prior_share} of data.batch_size={data.batch_size} leaves one part without clips"
        )
    # What says which clips are new does not say which are old.
    fresh = {"num_scenes": 0, "latent_cache": "", "split": "train", **config.prior, "batch_size": count}
    fixed = {"size", "num_frames", "context_length"} & set(config.prior)
    if fixed:
        raise ValueError(f"lora.prior.{min(fixed)} cannot differ from the data section: both are one batch")
    prior = make_config(DataConfig, {**dataclasses.asdict(data), **fresh}, "lora.prior")
    return dataclasses.replace(data, batch_size=data.batch_size - count), checked_data(prior)


def shifted(video: Array, keys: Array, shift: int) -> Array:
    """`video [b f h w c]`, each clip moved by -shift .. shift pixels along both axes, its edges repeated; keys [b]."""
    padded = jnp.pad(video, ((0, 0), (0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")

    def window(clip: Array, key: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * shift + 1)
        return jax.lax.dynamic_slice(clip, (0, top, left, 0), video.shape[1:])

    return jax.vmap(window)(padded, keys)


def mixed(parts: list[Iterator[Batch]]) -> Iterator[Batch]:
    """Batches joined row by row in turn, so that levels drawn in order over a batch fall on all parts alike."""
    if len(parts) == 1:
        yield from parts[0]
        return
    for batches in zip(*parts):
        yield _join(batches)


@jax.jit
def _join(batches: tuple[dict[str, Any], ...]) -> Batch:
    sizes = [len(jax.tree.leaves(batch)[0]) for batch in batches]
    order = np.argsort(np.concatenate([(np.arange(size) + 0.5) / size for size in sizes]), kind="stable")
    return jax.tree.map(lambda *values: jnp.concatenate(values)[order], *batches)
