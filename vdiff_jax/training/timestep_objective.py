"""The diffusion objective of public networks, which are told timesteps: one level a clip, nothing known.

What an image-to-video network is shown of the clip's first frame stands in the batch. For v-prediction on the variance-
preserving scale the plain squared error is the loss of Karras et al. (2022) with the weight (sigma^2 + 1) / sigma^2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion import loss as losses
from vdiff_jax.diffusion.continuous import Schedule
from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.diffusion.timestep_levels import told_levels
from vdiff_jax.training.diffusion_objective import level_edges, without_filler
from vdiff_jax.types import Array, Batch, Conditioning, Params, PredictFn

CLEAN = 10.0  # level of known tokens, of which there are none
PLAIN_WEIGHTING = {"eps": "eps", "x0": "x0", "v": "v", "velocity": "flow"}
"""By prediction kind, the weighting with which the loss is the squared error of the network's output."""


def make_timestep_loss(
    predict_fn: PredictFn,
    *,
    null_prompt: tuple[Array, Array] | None,
    schedule: Schedule,
    drawn: Schedule,
    kind: str,
    weighting: str,
    weighting_settings: dict[str, float],
    channel_weights: Array | None = None,
    noise: str = "gaussian",
    prompt_dropout: float = 0.1,
    picture_dropout: float = 0.1,
    attend_padding: bool = True,
    log_bins: int = 8,
):
    """loss_fn(params, batch, keys [b]) -> (loss, metrics), for `training.step`.

    batch: `latents [b f h w c]` final, `times [b f]`, optional `valid [b f]`; with prompts `text [b n d]` and
    `token_mask [b n]`; with a picture `image_latents [b h w c]`, `image_embedding [b d]` and `added [b k]`, see
    `Conditioning`.

    predict_fn: reads the timestep in the place of the level. schedule, drawn: see `told_levels`. null_prompt: features
    `[n d]` and mask `[n]` that replace a dropped prompt. picture_dropout: share of clips that lose the embedding (it
    becomes 0), as many that lose the latents, as many that lose both. attend_padding: the network reads padding too.

    metrics: `eps_loss`, the mean over clips of the unweighted noise error, and the same as sums and counts in
    `log_bins` equal bins of log-SNR.
    """
    edges = level_edges(drawn, log_bins)

    def loss_fn(params: Params, batch: Batch, keys: Array) -> tuple[Array, dict[str, Array]]:
        x = batch["latents"]
        parts = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
        logsnr, timestep = told_levels(schedule, drawn, losses.stratified_u(parts[0, 2], len(x)))
        logsnr, timestep = (jnp.broadcast_to(value[:, None], x.shape[:2]) for value in (logsnr, timestep))
        eps = draw_noise(parts[:, 0], x.shape[1:], noise)
        z = add_noise(x, eps, logsnr)
        cond = _conditioning(batch, parts[:, 1], parts[:, 3])
        nothing_known = jnp.zeros((*x.shape[:-1], 1))
        output = predict_fn(params, z, timestep, nothing_known, jnp.full(x.shape[:2], CLEAN), cond)
        measured = losses.diffusion_loss(
            output, kind, x, eps, z, logsnr, without_filler(nothing_known, batch.get("valid")),
            weighting=weighting, channel_weights=channel_weights, **weighting_settings,
        )  # fmt: skip
        bin_sum, bin_count = losses.loss_by_bin(logsnr[:, 0], measured.eps_loss, edges)
        metrics = {
            "eps_loss": measured.eps_loss.mean(),
            "eps_loss_by_logsnr_sum": bin_sum,
            "eps_loss_by_logsnr_count": bin_count,
        }
        return measured.loss.mean(), metrics

    def _conditioning(batch: Batch, drop_keys: Array, picture_keys: Array) -> Conditioning:
        if "image_latents" in batch:
            return _shown_picture(batch, picture_keys, picture_dropout)
        if null_prompt is None:
            return Conditioning(None, None, batch["times"], valid=batch.get("valid"))
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, prompt_dropout))(drop_keys)
        text = jnp.where(drop[:, None, None], null_prompt[0][None], batch["text"])
        mask = jnp.where(drop[:, None], null_prompt[1][None], batch["token_mask"])
        shown = None if attend_padding else mask
        return Conditioning(text, shown, batch["times"], valid=batch.get("valid"))

    return loss_fn


def _shown_picture(batch: Batch, keys: Array, dropout: float) -> Conditioning:
    """The conditioning of Stable Video Diffusion, with the picture's parts zeroed where they are dropped."""
    u = jax.vmap(jax.random.uniform)(keys)
    keep_embedding = (u >= 2 * dropout).astype(jnp.float32)
    keep_latents = ((u < dropout) | (u >= 3 * dropout)).astype(jnp.float32)
    latents = batch["image_latents"] * keep_latents[:, None, None, None]
    num_frames = batch["times"].shape[1]
    return Conditioning(
        (batch["image_embedding"] * keep_embedding[:, None])[:, None],
        None,
        batch["times"],
        image_latents=jnp.broadcast_to(latents[:, None], (len(latents), num_frames, *latents.shape[1:])),
        added=batch["added"],
        valid=batch.get("valid"),
    )
