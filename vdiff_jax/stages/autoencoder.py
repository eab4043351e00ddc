"""The stage `autoencoder`: pixels to latents and back, and the statistics of the latents at its end."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.components import Component, make_component
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.data.video_io import contact_sheet
from vdiff_jax.measures import latent_statistics, linear_path_start
from vdiff_jax.models.autoencoder import sample_moments
from vdiff_jax.pipeline import Settings, VideoDiffusion
from vdiff_jax.recipe import DataConfig, Recipe, section
from vdiff_jax.stages.stage import Stage, save_sheet
from vdiff_jax.starting_point import check_start
from vdiff_jax.streams import Stream, make_stream
from vdiff_jax.training.autoencoder_loss import AutoencoderLossConfig, make_autoencoder_loss
from vdiff_jax.training.writers import MetricWriter
from vdiff_jax.types import Array, Params


def autoencoder_stage(
    recipe: Recipe, data: DataConfig, start: VideoDiffusion | None, mesh: Mesh, workdir: Path
) -> Stage:
    component = make_component("autoencoder", recipe.model.autoencoder.to_dict())
    if start is not None:
        check_start(recipe, data, start, component)
    if data.buckets and not component.config.decodes_frames_alone:
        raise ValueError(
            f"model.autoencoder.decoder={component.config.decoder!r} mixes frames, also with those that fill a clip "
            "up: leave data.buckets empty, or set the decoder to 'frames'"
        )
    stream = make_stream(data, seed=recipe.seed, tokenizer=None, share=parallel.batch_share(mesh))

    def encode_moments(params: Params, video: Array) -> Array:
        return component.apply(params, video, method="encode_moments")

    def decode_raw(params: Params, raw: Array) -> Array:
        return component.apply(params, raw, method="decode_raw")

    @jax.jit
    def reconstruct(params: Params, video: Array) -> tuple[Array, Array]:
        moments = encode_moments(params, video)
        return decode_raw(params, sample_moments(moments)), sample_moments(moments)

    with parallel.on_this_process():
        preview = stream.device_batch(10**6)

    def on_sample(step: int, params: Params, writer: MetricWriter) -> None:
        output, _ = reconstruct(params, preview["video"])
        _show(step, preview["video"], output, workdir, writer)

    def finish(params: Params, folder: Path) -> None:
        mean, std = latent_statistics(lambda video: reconstruct(params, video)[1], stream, batches=32)
        config = {**component.config_dict(), "latent_mean": mean, "latent_std": std}
        model = VideoDiffusion(
            components={"autoencoder": make_component("autoencoder", config)},
            params={"autoencoder": params},
            tokenizer=None,
            settings=Settings(size=data.size, fps=data.native_fps),
        )
        model.save_pretrained(folder)

    first = None if start is None else start.params["autoencoder"]
    return Stage(
        init=_init(component, stream, first),
        loss_fn=make_autoencoder_loss(encode_moments, decode_raw, section(recipe, "loss", AutoencoderLossConfig)),
        batches_from=functools.partial(stream.starting_at, mesh=mesh),
        on_sample=on_sample,
        finish=finish,
        left_out=stream.left_out,
        example_steps=stream.example_steps,
        unread=stream.unread,
        start=first,
    )


def _init(component: Component, stream: Stream, start: Params | None):
    """key -> parameters: those of the start, or fresh ones with the principal components of the data."""
    linear = {} if start is not None else linear_path_start(component, stream)

    def init(key: Array) -> Params:
        if start is not None:
            return jax.tree.map(jnp.asarray, start)
        return {**component.init(key), **linear}

    return init


def _show(step: int, video: Array, output: Array, workdir: Path, writer: MetricWriter) -> None:
    """Clips beside what came of them, and how near that is."""
    mse = float(jnp.mean(jnp.square(jnp.clip(output, -1, 1) - video)))
    pair = np.concatenate([to_uint8(np.asarray(video)), to_uint8(np.asarray(output))], axis=2)
    sheet = contact_sheet(pair.reshape(-1, *pair.shape[2:])[:32], columns=8)
    save_sheet(workdir, step, sheet)
    writer.image(step, "reconstruction", sheet)
    writer.scalars(step, {"preview_psnr": 10 * np.log10(4 / max(mse, 1e-10))})
