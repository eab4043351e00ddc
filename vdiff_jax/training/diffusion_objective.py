"""The diffusion objective over the training mixture: one loss for every task the network will serve.

Each clip draws a pattern (what is known, the level of every frame), is noised token by token, and the loss is the
weighted eps error over its unknown tokens. Prompts are dropped at random, so that guidance has something to guide from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion import loss as losses
from vdiff_jax.diffusion import patterns
from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise, token_logsnr
from vdiff_jax.types import Array, Batch, Conditioning, Params, PredictFn

EncodeText = Callable[[Params, Array, Array], Array]


def make_diffusion_loss(
    predict_fn: PredictFn,
    encode_text: EncodeText | None,
    *,
    null_prompt: tuple[Array, Array] | None,
    schedule: Any,
    mixture: patterns.Mixture,
    kind: str,
    weighting: str,
    weighting_settings: dict[str, float],
    channel_weights: Array | None = None,
    noise: str = "gaussian",
    prompt_dropout: float = 0.1,
    context_prompt_dropout: float = 0.3,
    log_bins: int = 8,
):
    """loss_fn(params, batch, keys [b]) -> (loss, metrics), for `training.step`.

    batch: `latents [b f h w c]` final, `times [b f]`, optional `anchor [b]` and `valid [b f]`, and either
    `tokens`/`token_mask [b n]` (encoded by `encode_text(params, tokens, mask)`) or ready `text [b n d]`/`token_mask`;
    null_prompt is the pair (tokens or features [n ...], mask [n]) that replaces a dropped prompt. prompt_dropout: share
    of clips with nothing known that lose their prompt; context_prompt_dropout: of those with something known.
    channel_weights: `[c]`, see `diffusion.loss`.

    metrics: `eps_loss`, the mean over clips of the unweighted noise error; the same as sums and counts by pattern row
    (of clips) and by level, in `log_bins` equal bins of log-SNR. By level every frame counts for itself, by the share
    of its tokens that is unknown.
    """
    edges = level_edges(schedule, log_bins)

    def loss_fn(params: Params, batch: Batch, keys: Array) -> tuple[Array, dict[str, Array]]:
        x = batch["latents"]
        batch_size, num_frames, height, width, _ = x.shape
        noise_keys, drop_keys, pattern_key = _split_keys(keys)
        valid = batch.get("valid")
        drawn = patterns.draw_batch(
            pattern_key,
            mixture,
            schedule,
            batch_size,
            num_frames,
            height,
            width,
            batch.get("anchor"),
            None if valid is None else valid.sum(1),
        )
        tokens = token_logsnr(drawn.logsnr, drawn.mask, drawn.context_logsnr)
        eps = draw_noise(noise_keys, x.shape[1:], noise)
        z = add_noise(x, eps, tokens)
        has_context = jnp.any(drawn.mask > 0.5, axis=(1, 2, 3, 4))
        drop_rate = jnp.where(has_context, context_prompt_dropout, prompt_dropout)
        drop = jax.vmap(jax.random.bernoulli)(drop_keys, drop_rate)
        cond = _conditioning(params, batch, drop)
        output = predict_fn(params, z, drawn.logsnr, drawn.mask, drawn.context_logsnr, cond)
        measured = losses.diffusion_loss(
            output, kind, x, eps, z, tokens, without_filler(drawn.mask, valid),
            weighting=weighting, channel_weights=channel_weights, **weighting_settings,
        )  # fmt: skip
        bin_sum, bin_count = losses.loss_by_bin(drawn.logsnr, measured.frame_eps_loss, edges, measured.frame_unknown)
        rows = jnp.arange(patterns.NUM_ROWS + 1) - 0.5
        row_sum, row_count = losses.loss_by_bin(drawn.row.astype(jnp.float32), measured.eps_loss, rows)
        metrics = {
            "eps_loss": measured.eps_loss.mean(),
            "eps_loss_by_logsnr_sum": bin_sum,
            "eps_loss_by_logsnr_count": bin_count,
            "eps_loss_by_row_sum": row_sum,
            "eps_loss_by_row_count": row_count,
        }
        return measured.loss.mean(), metrics

    def _conditioning(params: Params, batch: Batch, drop: Array) -> Conditioning:
        if null_prompt is None:
            return Conditioning(None, None, batch["times"], valid=batch.get("valid"))
        name = "text" if "text" in batch else "tokens"
        value, mask = batch[name], batch["token_mask"]
        value = jnp.where(drop.reshape(-1, *(1,) * (value.ndim - 1)), null_prompt[0][None], value)
        mask = jnp.where(drop[:, None], null_prompt[1][None], mask)
        text = value if name == "text" else encode_text(params, value, mask)  # type: ignore[misc]
        return Conditioning(text, mask, batch["times"], valid=batch.get("valid"))

    return loss_fn


def without_filler(known_mask: Array, valid: Array | None) -> Array:
    """The mask of tokens `[b f h w 1]` that the loss leaves out: what is known, and frames that are not real."""
    return known_mask if valid is None else jnp.where(valid[:, :, None, None, None], known_mask, 1.0)


def level_edges(schedule: Any, log_bins: int) -> Array:
    """Edges `[log_bins + 1]` of equal bins of log-SNR over the levels of a schedule.

    A zero-terminal-SNR table starts at -inf; its bins start where the process is noise for all purposes.
    """
    return jnp.linspace(max(schedule.logsnr_min, -20.0), min(schedule.logsnr_max, 20.0), log_bins + 1)


def predictor(apply: Callable[..., Array], name: str = "unet") -> PredictFn:
    """The `PredictFn` of a network whose parameters stand under `params[name]`."""

    def predict_fn(params, z, logsnr, known_mask, context_logsnr, cond):
        return apply(params[name], z, logsnr, known_mask, context_logsnr, cond)

    return predict_fn


def _split_keys(keys: Array) -> tuple[Array, Array, Array]:
    """(noise keys [b], dropout keys [b], one key for the patterns, whose levels are stratified over the batch)."""
    parts = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    return parts[:, 0], parts[:, 1], parts[0, 2]
