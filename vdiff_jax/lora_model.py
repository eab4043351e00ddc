"""A model with a low-rank update and new words: what `VideoDiffusion.with_lora` and the training of one share.

A model is given in its parts, `(components, params, tokenizer)`, by component name; nothing here changes its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from vdiff_jax.components import Component, make_component
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.models.lora import Lora, merge, misfits
from vdiff_jax.types import Array, Params

Parts = tuple[dict[str, Component], dict[str, Params], Tokenizer | None]
TABLE = "token_embedding"


def add_words(parts: Parts, words: Sequence[str], rows: Array | None = None) -> tuple[Parts, np.ndarray]:
    """A model that knows more words, and where their embeddings stand in its table, i32 [n].

    words: "orange", or "orange=yellow" to start from another word's embedding; alone, from the mean of all.
    rows: their embeddings `[n d]`, if they are known already.
    Raises ValueError without a text encoder, for words that are known or no single words, and for rows of another size.
    """
    components, params, tokenizer = parts
    if not words:
        return parts, np.zeros(0, np.int32)
    if tokenizer is None or "text_encoder" not in components:
        raise ValueError(f"new words ({', '.join(words)}) need a model with a text encoder")
    names = [word.partition("=")[0] for word in words]
    larger, ids = tokenizer.with_words(names)
    table = jnp.asarray(params["text_encoder"][TABLE])
    if rows is None:
        models = [word.partition("=")[2] for word in words]
        rows = jnp.stack([table[tokenizer.word_id(like)] if like else table.mean(axis=0) for like in models])
    if rows.shape != (len(words), table.shape[1]):
        raise ValueError(f"{len(words)} new words have embeddings {tuple(rows.shape)}, expected {table.shape[1]} each")
    index = np.asarray(ids, np.int32)
    table = jnp.pad(table, ((0, max(larger.vocab_size - len(table), 0)), (0, 0))).at[index].set(rows)
    config = {**components["text_encoder"].config_dict(), "vocab_size": len(table)}
    components = {**components, "text_encoder": make_component("text_encoder", config)}
    return (components, {**params, "text_encoder": {**params["text_encoder"], TABLE: table}}, larger), index


def apply_lora(parts: Parts, lora: Lora, strength: float, base: Mapping[str, str]) -> Parts:
    """The model with the update merged in, `strength` times (1 = as trained), and its new words.

    base: digests of the components before any update. Another base than the update was made for is warned of, naming
    both digests, as long as the shapes fit.
    Raises ValueError, naming every misfit, if they do not, or if a word is known already.
    """
    components, params, _ = parts
    if missing := sorted(lora.factors.keys() - components.keys()):
        raise ValueError(f"the low-rank update is for {', '.join(missing)}, which this model does not hold")
    problems = misfits({name: params[name] for name in lora.factors}, lora.factors)
    if problems:
        raise ValueError(f"the low-rank update does not fit this model: {'; '.join(problems)}")
    if others := [name for name, digest in lora.base.items() if base.get(name) != digest]:
        found = f" ({lora.base_name})" if lora.base_name else ""
        digests = "; ".join(f"{name} is {base.get(name)}, not {lora.base[name]}" for name in others)
        warnings.warn(f"the low-rank update was made for another base model{found}: {digests}", stacklevel=4)
    (components, params, tokenizer), _ = add_words(parts, lora.new_words, lora.word_rows)
    scale = strength * lora.alpha / lora.rank
    merged = {name: merge(params[name], factors, scale) for name, factors in lora.factors.items()}
    return components, {**params, **merged}, tokenizer
