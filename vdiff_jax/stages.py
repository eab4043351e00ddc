"""A recipe made into the functions that `training` needs: the two stages `autoencoder` and `diffusion`.

This is the one place where data, networks, losses and previews of a training run meet; `train.py` only drives it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.components import Component, make_component
from vdiff_jax.data.latent_cache import ensure_latent_cache
from vdiff_jax.data.sources import SkipReport
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.data.video_io import contact_sheet, save_image
from vdiff_jax.diffusion.loss import weight
from vdiff_jax.diffusion.noise import NOISE_KINDS
from vdiff_jax.diffusion.prediction import check_kind
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.interop import lora as lora_files
from vdiff_jax.interop import pretrained, transformers
from vdiff_jax.lora_stage import Personalisation, mixed, personalisation, shifted, split_batch
from vdiff_jax.measures import channel_weights, latent_statistics, linear_path_start
from vdiff_jax.models.autoencoder import latents_from_moments, sample_moments
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.pipeline import Settings, VideoDiffusion, load
from vdiff_jax.recipe import (
    DataConfig,
    DiffusionConfig,
    LoraConfig,
    Recipe,
    SampleConfig,
    check_stage,
    data_config,
    diffusion_config,
    lora_config,
    section,
)
from vdiff_jax.starting_point import VOCABULARY_FIELDS, starting_point, warn_of_another_process
from vdiff_jax.streams import make_stream
from vdiff_jax.training.autoencoder_loss import AutoencoderLossConfig, make_autoencoder_loss
from vdiff_jax.training.diffusion_objective import make_diffusion_loss, predictor
from vdiff_jax.training.step import LossFn, TrainState, sample_keys
from vdiff_jax.training.writers import MetricWriter
from vdiff_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training run is made of.

    init: key -> trainable params. loss_fn: see `training.step.LossFn`. batches_from: step -> iterator of device
    batches. on_sample: a preview callback. finish: (state, folder) -> writes the finished model. left_out, unread:
    clips the data could not give, see `Stream`. frozen: parameters that the loss reads and nothing changes, or None.
    """

    init: Callable[[Array], Params]
    loss_fn: LossFn
    batches_from: Callable[[int], Iterator[Batch]]
    on_sample: Callable[[int, TrainState, MetricWriter | None], None]
    finish: Callable[[TrainState, Path], None]
    left_out: SkipReport
    unread: SkipReport
    frozen: Params | None = None


def make_stage(recipe: Recipe, mesh: Mesh, workdir: Path) -> Stage:
    """The stage that `recipe.stage` names.

    Raises ValueError for settings that cannot work and OSError for data that cannot be read, before anything is made.
    """
    data = data_config(recipe)
    parallel.check_batch_size(data.batch_size, mesh)
    stages = {"autoencoder": _autoencoder_stage, "diffusion": _diffusion_stage}
    check_stage(recipe.stage)
    lora_config(recipe)
    return stages[recipe.stage](recipe, data, mesh, workdir)


def _autoencoder_stage(recipe: Recipe, data: DataConfig, mesh: Mesh, workdir: Path) -> Stage:
    component = make_component("autoencoder", recipe.model.autoencoder.to_dict())
    start = starting_point(recipe, data, component)
    stream = make_stream(data, seed=recipe.seed, tokenizer=None)

    def encode_moments(params: Params, video: Array) -> Array:
        return component.apply(params, video, method="encode_moments")

    def decode_raw(params: Params, raw: Array) -> Array:
        return component.apply(params, raw, method="decode_raw")

    loss_fn = make_autoencoder_loss(encode_moments, decode_raw, section(recipe, "loss", AutoencoderLossConfig))
    preview = stream.device_batch(10**6)

    @jax.jit
    def reconstruct(params: Params, video: Array) -> tuple[Array, Array]:
        moments = encode_moments(params, video)
        return decode_raw(params, sample_moments(moments)), sample_moments(moments)

    def on_sample(step: int, state: TrainState, writer: MetricWriter | None) -> None:
        if writer is None:
            return
        output, _ = reconstruct(state.ema, preview["video"])
        mse = float(jnp.mean(jnp.square(jnp.clip(output, -1, 1) - preview["video"])))
        pair = np.concatenate([to_uint8(np.asarray(preview["video"])), to_uint8(np.asarray(output))], axis=2)
        sheet = contact_sheet(pair.reshape(-1, *pair.shape[2:])[:32], columns=8)
        _save_sheet(workdir, step, sheet)
        writer.image(step, "reconstruction", sheet)
        writer.scalars(step, {"preview_psnr": 10 * np.log10(4 / max(mse, 1e-10))})

    def finish(state: TrainState, folder: Path) -> None:
        mean, std = latent_statistics(lambda video: reconstruct(state.ema, video)[1], stream, batches=32)
        config = {**component.config_dict(), "latent_mean": mean, "latent_std": std}
        model = VideoDiffusion(
            components={"autoencoder": make_component("autoencoder", config)},
            params={"autoencoder": jax.device_get(state.ema)},
            tokenizer=None,
            settings=Settings(size=data.size, fps=data.native_fps),
        )
        model.save_pretrained(folder)

    linear = {} if start is not None else linear_path_start(component, stream)

    def init(key: Array) -> Params:
        if start is not None:
            return jax.tree.map(jnp.asarray, start.params["autoencoder"])
        return {**component.init(key), **linear}

    batches = functools.partial(stream.starting_at, mesh=mesh)
    return Stage(init, loss_fn, batches, on_sample, finish, stream.left_out, stream.unread)


def _diffusion_stage(recipe: Recipe, data: DataConfig, mesh: Mesh, workdir: Path) -> Stage:
    diffusion, mixture = diffusion_config(recipe)
    schedule = make_schedule(diffusion.schedule, **diffusion.schedule_settings)
    check_kind(diffusion.prediction, schedule.logsnr_min)
    _check_objective(diffusion)
    low_rank = lora_config(recipe)
    data, prior_data = split_batch(data, low_rank) if low_rank.rank else (data, None)
    for part in filter(None, (data, prior_data)):
        parallel.check_batch_size(part.batch_size, mesh)
    sample = section(recipe, "sample", SampleConfig)
    if not recipe.model.autoencoder_from:
        raise ValueError("model.autoencoder_from is empty: train an autoencoder first and give its run folder")
    base = load(recipe.model.autoencoder_from)
    autoencoder, autoencoder_params = base.components["autoencoder"], base.params["autoencoder"]
    text_settings = _text_settings(recipe)
    unet_settings = recipe.model.unet.to_dict() | {"latent_channels": autoencoder.config.latent_channels}
    unet = make_component("unet", unet_settings | {"text_features": text_settings.get("features")})
    text_networks = [make_component("text_encoder", text_settings)] if text_settings else []
    start = starting_point(recipe, data, unet, *text_networks)
    digest = base.component_digest("autoencoder")
    if start is not None:
        warn_of_another_process(recipe, start, digest)
    if data.latent_cache:
        _fill_latent_cache(data, autoencoder, autoencoder_params, digest)

    tuned = None
    if low_rank.rank and start is not None:
        trained = ("unet", "text_encoder") if recipe.model.text == "joint" else ("unet",)
        tuned = _personalisation(low_rank, start, trained, recipe.model.init_from)
        start = dataclasses.replace(start, **dict(zip(("components", "params", "tokenizer"), tuned.parts)))
    text, text_params, tokenizer = _text_encoder(recipe, data, start)
    trainable = {"unet": unet} | ({"text_encoder": text} if text and text_params is None else {})

    def init(key: Array) -> Params:
        if tuned is not None:
            return tuned.init(key)
        if start is not None:
            return {name: jax.tree.map(jnp.asarray, start.params[name]) for name in trainable}
        return {name: part.init(jax.random.fold_in(key, index)) for index, (name, part) in enumerate(trainable.items())}

    frozen = jax.device_put({"autoencoder": autoencoder_params, "text_encoder": text_params}, parallel.replicated(mesh))
    frozen_text = text if text_params is not None else None
    prepare = [_prepare_fn(autoencoder, frozen_text, shift) for shift in (low_rank.shift if tuned else 0, 0)]
    anchor_rate = mixture.anchor_probability()
    stream = make_stream(data, seed=recipe.seed, tokenizer=tokenizer, anchor_rate=anchor_rate, digest=digest)
    streams = [(stream, data.batch_size)]
    if prior_data is not None:
        prior = make_stream(prior_data, seed=recipe.seed, tokenizer=tokenizer, anchor_rate=anchor_rate, digest=digest)
        streams.append((prior, prior_data.batch_size))

    def prepared(part: int, step: int) -> Iterator[Batch]:
        part_key = jax.random.fold_in(jax.random.key(recipe.seed), 1 + part)
        source, batch_size = streams[part]
        for index, batch in enumerate(source.starting_at(step, mesh), start=step):
            keys = _batch_keys(jax.random.fold_in(part_key, index), batch_size, mesh)
            yield prepare[part](frozen, batch, keys)

    def batches_from(step: int) -> Iterator[Batch]:
        return mixed([prepared(part, step) for part in range(len(streams))])

    loss_fn = make_diffusion_loss(
        predictor(unet.apply),
        None if text is None else lambda params, *args: text.apply(params["text_encoder"], *args),
        null_prompt=_null_prompt(text, text_params, tokenizer, data),
        schedule=schedule,
        mixture=mixture,
        kind=diffusion.prediction,
        weighting=diffusion.weighting,
        weighting_settings=dict(diffusion.weighting_settings),
        channel_weights=channel_weights(diffusion.channel_weighting, autoencoder, autoencoder_params, stream),
        noise=diffusion.noise,
        prompt_dropout=diffusion.prompt_dropout,
        context_prompt_dropout=diffusion.context_prompt_dropout,
        log_bins=diffusion.log_bins,
    )
    components = {"autoencoder": autoencoder, "unet": unet} | ({"text_encoder": text} if text else {})
    known_params = {"autoencoder": autoencoder_params, "text_encoder": text_params}
    settings = _settings(data, diffusion, sample)
    if tuned is not None and start is not None:  # its process is the base's, whatever levels it is trained at
        names = ("num_frames", "sampler", "steps", "guidance_scale")
        settings = dataclasses.replace(start.settings, **{name: getattr(sample, name) for name in names})
    model = VideoDiffusion(components, {n: known_params.get(n) or {} for n in components}, tokenizer, settings)

    def trained_model(state: TrainState) -> VideoDiffusion:
        params = jax.device_get(state.ema)
        return model.with_params(params if tuned is None else tuned.complete(params, tuned.base))

    def on_sample(step: int, state: TrainState, writer: MetricWriter | None) -> None:
        if writer is None or not sample.prompts:
            return
        clips = trained_model(state).generate(list(sample.prompts), seed=sample.seed)
        frames = np.stack([clip.frames for clip in clips])
        _save_sheet(workdir, step, contact_sheet(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1]))
        writer.video(step, "samples", frames, fps=data.native_fps)

    def finish(state: TrainState, folder: Path) -> None:
        if tuned is not None:
            _save_update(tuned, jax.device_get(state.ema), settings, folder)
        else:
            trained_model(state).save_pretrained(folder)

    base_params = None
    if tuned is not None:
        loss_fn = tuned.loss(loss_fn)
        base_params = jax.device_put(tuned.base, parallel.tree_shardings(tuned.base, mesh))
    return Stage(init, loss_fn, batches_from, on_sample, finish, stream.left_out, stream.unread, base_params)


def _personalisation(
    low_rank: LoraConfig, start: VideoDiffusion, trained: tuple[str, ...], base_name: str
) -> Personalisation:
    digests = {name: start.component_digest(name) for name in trained}
    return personalisation(low_rank, (start.components, start.params, start.tokenizer), trained, digests, base_name)


def _save_update(tuned: Personalisation, trainable: Params, settings: Settings, folder: Path) -> None:
    """A folder that `load` takes for the personalised model, as long as it finds the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    lora_files.save_lora(folder / lora_files.FILE_NAME, tuned.lora(trainable))
    settings_dict = dataclasses.asdict(settings)
    config = {"format": lora_files.FORMAT, "base": tuned.base_name, "settings": settings_dict}
    pretrained.save_json(folder / "config.json", config)


def _prepare_fn(
    autoencoder: Component, frozen_text: Component | None, shift: int
) -> Callable[[Params, Batch, Array], Batch]:
    """Pixels (or cached moments) to final latents; prompts to features where the text encoder is frozen.

    shift: see `lora_stage.shifted`.
    """

    @jax.jit
    def prepare(frozen: Params, batch: Batch, keys: Array) -> Batch:
        batch = dict(batch)
        moments = batch.pop("moments", None)
        if moments is None:
            video = batch.pop("video")
            if shift:
                video = shifted(video, jax.vmap(jax.random.fold_in, (0, None))(keys, 1), shift)
            moments = autoencoder.apply(frozen["autoencoder"], video, method="encode_moments")
        shape = (*moments.shape[1:-1], moments.shape[-1] // 2)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        batch["latents"] = latents_from_moments(moments, autoencoder.config, noise)
        if frozen_text is not None:
            batch["text"] = frozen_text.apply(frozen["text_encoder"], batch.pop("tokens"), batch["token_mask"])
        return batch

    return prepare


def _check_objective(diffusion: DiffusionConfig) -> None:
    """Whatever can be wrong with the loss is said before any data is read."""
    if diffusion.channel_weighting not in ("equal", "pixels"):
        raise ValueError(f"diffusion.channel_weighting={diffusion.channel_weighting!r}: choose equal or pixels")
    if diffusion.noise not in NOISE_KINDS:
        raise ValueError(f"diffusion.noise={diffusion.noise!r}: choose one of {', '.join(NOISE_KINDS)}")
    if unknown := sorted(set(diffusion.weighting_settings) - {"bias", "gamma"}):
        raise ValueError(f"diffusion.weighting_settings has no {', '.join(unknown)}: it takes bias and gamma")
    weight(diffusion.weighting, jnp.zeros(()))


def _settings(data: DataConfig, diffusion: DiffusionConfig, sample: SampleConfig) -> Settings:
    """What the saved model will know of its training."""
    return Settings(
        size=data.size,
        fps=data.native_fps,
        num_frames=sample.num_frames,
        sampler=sample.sampler,
        steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        prediction=diffusion.prediction,
        schedule=diffusion.schedule,
        schedule_settings=dict(diffusion.schedule_settings),
        noise=diffusion.noise,
        context_length=data.context_length,
    )


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
    """(component, frozen params or None if trained, tokenizer)."""
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


def _null_prompt(text, text_params, tokenizer, data: DataConfig) -> tuple[Array, Array] | None:
    """The empty prompt as tokens, or as features where the text encoder is frozen."""
    if text is None or tokenizer is None:
        return None
    tokens, mask = (jnp.asarray(value) for value in tokenizer.encode([""], data.context_length))
    value = tokens if text_params is None else jax.jit(text.apply)(text_params, tokens, mask)
    return value[0], mask[0]


def _fill_latent_cache(data: DataConfig, autoencoder: Component, params: Params, digest: str) -> None:
    """Encode the clips once, by the first process; the others wait for it."""
    if jax.process_index() == 0:
        encode = jax.jit(lambda video: autoencoder.apply(params, video, method="encode_moments"))

        def progress(done: int, total: int) -> None:
            if done == total or done * 10 // total != (done - 1) * 10 // total:  # every tenth
                print(f"latent cache {data.latent_cache}: {done} of {total} clips encoded", file=sys.stderr)

        report = ensure_latent_cache(data, encode, digest, progress=progress)
        if report is not None and report.count:
            print(report, file=sys.stderr)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("latent cache")


def _batch_keys(key: Array, batch_size: int, mesh: Mesh) -> Array:
    return jax.device_put(sample_keys(key, batch_size), parallel.batch_sharding(mesh))


def _save_sheet(workdir: Path, step: int, sheet: np.ndarray) -> None:
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    save_image(folder / f"{step:07d}.png", sheet)
