"""What a stage starts from, and what its finished model remembers of the recipe."""

import dataclasses
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from vdiff_jax import parallel
from vdiff_jax.data.video_io import Clip, save_image
from vdiff_jax.interop import transformers
from vdiff_jax.interop.transformers import load_bert
from vdiff_jax.models.text_encoder import TextEncoderConfig
from vdiff_jax.pipeline import load
from vdiff_jax.recipe import default_recipe
from vdiff_jax.stages import make_stage
from vdiff_jax.stages.prepare import _rate
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import create_state, init_sharded_state, make_train_step


def staged(recipe, folder, source="shapes"):
    recipe.data.update(source=source, world="small", size=16, world_frames=4, num_frames=2, batch_size=8)
    recipe.data.update(strides=(1,), stride_weights=(1.0,))
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        return make_stage(recipe, mesh, folder)


@pytest.mark.parametrize("linear_path", [True, False])
def test_an_autoencoder_with_a_linear_path_starts_at_the_principal_components(linear_path, tmp_path):
    recipe = default_recipe("autoencoder")
    recipe.model.autoencoder.update(channels=(8, 8), norm_groups=4, mid_attention=False, linear_path=linear_path)
    stage = staged(recipe, tmp_path)
    params = jax.jit(stage.init)(jax.random.key(0))
    batch = next(stage.batches_from(0))
    _, metrics = jax.jit(stage.loss_fn)(params, batch, jax.random.split(jax.random.key(1), 8))
    # Four components of 2x2 squares hold nearly all of a flat shape on a flat ground; untrained convolutions nothing.
    assert (float(metrics["psnr"]) > 22.0) == linear_path
    assert ("linear_in" in params) == linear_path


def diffusion_recipe(model_folder):
    recipe = default_recipe("diffusion")
    recipe.model.autoencoder_from = str(model_folder)
    recipe.model.unet.update(channels=(8,), attention=(True,), embedding_features=16, head_dim=8)
    recipe.model.text_encoder.update(features=8, hidden_features=8, layers=1, head_dim=8)
    return recipe


def take_networks_of(model, recipe):
    recipe.model.unet.update(model.components["unet"].config_dict())
    recipe.model.text_encoder.update(model.components["text_encoder"].config_dict())
    recipe.data.context_length = model.settings.context_length


def test_channels_may_count_by_the_pixels_they_move(model_folder, tmp_path):
    """An untrained network is silent, so its loss is the weighted mean square of its targets."""
    losses = {}
    for kind in ("equal", "pixels"):
        recipe = diffusion_recipe(model_folder)
        recipe.diffusion.channel_weighting = kind
        stage = staged(recipe, tmp_path)
        params = jax.jit(stage.init)(jax.random.key(0))
        batch = next(stage.batches_from(0))
        loss, metrics = jax.jit(stage.loss_fn)(params, batch, jax.random.split(jax.random.key(1), 8))
        losses[kind] = float(loss), float(metrics["eps_loss"])
    assert losses["equal"][1] == pytest.approx(losses["pixels"][1], rel=1e-5)
    assert losses["equal"][0] != pytest.approx(losses["pixels"][0], rel=1e-2)
    recipe.diffusion.channel_weighting = "pixel"
    with pytest.raises(ValueError, match="channel_weighting='pixel': choose equal or pixels"):
        staged(recipe, tmp_path)


def test_weights_of_another_network_are_refused_as_a_start(model_folder, tmp_path):
    recipe = diffusion_recipe(model_folder)
    recipe.model.init_from = str(model_folder)
    theirs = load(model_folder)
    take_networks_of(theirs, recipe)
    recipe.model.unet.update(linear_path=True, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"has model\.unet\.linear_path=False, the recipe True"):
        staged(recipe, tmp_path)
    recipe.model.unet.linear_path = False  # another compute type is no other network
    stage = staged(recipe, tmp_path)
    started = jax.jit(stage.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, started["unet"], theirs.params["unet"])
    recipe.stage = "autoencoder"
    recipe.model.autoencoder.update(channels=(8, 16))
    with pytest.raises(ValueError, match=r"has model\.autoencoder\.channels=\[8, 8\], the recipe \[8, 16\]"):
        staged(recipe, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(text="none"), r"has model\.unet\.text_features=8, the recipe None"),
        (dict(text="minilm"), r"has model\.unet\.text_features=8, the recipe 384"),
        (dict(text="clip"), r"model\.text='clip': choose joint, minilm, none"),
        (dict(text_encoder=dict(layers=2)), r"has model\.text_encoder\.layers=1, the recipe 2"),
    ],
)
def test_a_start_with_another_kind_of_text_is_refused(model_folder, tmp_path, change, sentence):
    recipe = diffusion_recipe(model_folder)
    recipe.model.init_from = str(model_folder)
    take_networks_of(load(model_folder), recipe)
    recipe.model.update(change)
    with pytest.raises(ValueError, match=sentence):
        staged(recipe, tmp_path)


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny encoder knows few words
def test_prompts_longer_than_the_start_knows_are_refused_and_shorter_ones_are_not(model_folder, tmp_path):
    recipe = diffusion_recipe(model_folder)
    recipe.model.init_from = str(model_folder)
    take_networks_of(load(model_folder), recipe)
    recipe.data.context_length = 9
    with pytest.raises(ValueError, match=r"data\.context_length=9 is more than the 8 tokens"):
        staged(recipe, tmp_path)
    recipe.data.context_length = 6
    stage = staged(recipe, tmp_path)
    batch = next(stage.batches_from(0))
    loss, _ = jax.jit(stage.loss_fn)(stage.init(jax.random.key(0)), batch, jax.random.split(jax.random.key(1), 8))
    assert batch["tokens"].shape == (8, 6) and np.isfinite(loss)


def test_another_kind_of_prediction_than_the_start_had_is_said(model_folder, tmp_path):
    recipe = diffusion_recipe(model_folder)
    recipe.model.init_from = str(model_folder)
    take_networks_of(load(model_folder), recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        staged(recipe, tmp_path)
    recipe.diffusion.prediction = "eps"
    with pytest.warns(UserWarning, match=r"trained with diffusion\.prediction='v', the recipe says 'eps'"):
        staged(recipe, tmp_path)
    recipe.diffusion.noise = "gausian"
    with pytest.raises(ValueError, match=r"diffusion\.noise='gausian': choose one of gaussian"):
        staged(recipe, tmp_path)


def test_a_start_without_text_is_refused_where_text_is_to_be_trained(model_folder, tmp_path):
    theirs = load(model_folder)
    components = {name: part for name, part in theirs.components.items() if name != "text_encoder"}
    params = {name: theirs.params[name] for name in components}
    dataclasses.replace(theirs, components=components, params=params, tokenizer=None).save_pretrained(tmp_path / "mute")
    recipe = diffusion_recipe(model_folder)
    recipe.model.init_from = str(tmp_path / "mute")
    take_networks_of(theirs, recipe)
    with pytest.raises(ValueError, match="holds no text_encoder: give a model that has one"):
        staged(recipe, tmp_path)
    dataclasses.replace(theirs, tokenizer=None).save_pretrained(tmp_path / "wordless")
    recipe.model.init_from = str(tmp_path / "wordless")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        staged(recipe, tmp_path)


def test_a_first_run_on_a_folder_builds_its_cache_and_its_words(model_folder, tmp_path):
    """The tokenizer learns from the captions that the cache, which is not there yet, will hold."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        Clip(frames, 8.0).save(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text(f"clip {name}")
    recipe = diffusion_recipe(model_folder)
    recipe.data.update(folder=str(tmp_path / "clips"), latent_cache=str(tmp_path / "latents"), native_fps=8.0)
    stage = staged(recipe, tmp_path, source="folder")
    assert next(stage.batches_from(0))["latents"].shape == (8, 2, 8, 8, 2)
    assert (tmp_path / "latents" / "index.json").is_file()


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny encoder knows few words
def test_a_pretrained_text_encoder_stays_frozen_and_is_saved_along(model_folder, tmp_path, monkeypatch):
    encoder, weights, tokenizer = load_bert(Path(__file__).parent / "golden" / "tiny_bert")
    monkeypatch.setattr(transformers, "load_minilm", lambda: (encoder, weights, tokenizer))
    monkeypatch.setattr(TextEncoderConfig, "minilm", lambda: encoder.config)
    recipe = diffusion_recipe(model_folder)
    recipe.model.text = "minilm"
    recipe.data.context_length = 8
    stage = staged(recipe, tmp_path)
    state = jax.jit(lambda key: create_state(stage.init, make_optimizer(OptimizerConfig(), 1), key))(jax.random.key(0))
    assert set(state.params) == {"unet"}
    batch = next(stage.batches_from(0))
    assert batch["text"].shape == (8, 8, encoder.config.features) and "tokens" not in batch
    loss, _ = jax.jit(stage.loss_fn)(state.params, batch, jax.random.split(jax.random.key(1), 8))
    assert np.isfinite(loss)
    stage.finish(jax.device_get(state.ema), tmp_path / "model")
    saved = load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, saved.params["text_encoder"], weights)
    for ours, theirs in zip(*(part.encode(["a red circle"], 8) for part in (saved.tokenizer, tokenizer)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert saved.generate(["a red circle"], num_frames=2, steps=1)[0].frames.shape == (2, 16, 16, 3)


def test_the_finished_model_remembers_its_process(model_folder, tmp_path):
    recipe = diffusion_recipe(model_folder)
    recipe.diffusion.update(noise="uniform", prediction="eps", schedule_settings=dict(shift=-1.5))
    recipe.sample.update(sampler="ddim", steps=7, guidance_scale=1.5, num_frames=5)
    stage = staged(recipe, tmp_path)
    state = jax.jit(lambda key: create_state(stage.init, make_optimizer(OptimizerConfig(), 1), key))(jax.random.key(0))
    stage.finish(jax.device_get(state.ema), tmp_path / "model")
    settings = load(tmp_path / "model").settings
    assert (settings.noise, settings.prediction, settings.schedule_settings) == ("uniform", "eps", {"shift": -1.5})
    assert (settings.sampler, settings.steps, settings.guidance_scale, settings.num_frames) == ("ddim", 7, 1.5, 5)
    assert settings.size == 16
    saved = load(tmp_path / "model").params["unet"]
    jax.tree.map(np.testing.assert_array_equal, saved, state.ema["unet"])


def test_mixed_clips_and_images_train_with_one_program_for_each_bucket(model_folder, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        Clip(rng.integers(0, 256, (5 if index % 2 else 3, 16, 16, 3), np.uint8), 8.0).save(tmp_path / f"{index}.gif")
        save_image(tmp_path / f"{index}.png", rng.integers(0, 256, (16, 24, 3), np.uint8))
    recipe = diffusion_recipe(model_folder)
    recipe.model.text = "none"
    recipe.data.update(folder=str(tmp_path), buckets=((4, 16, 16), (1, 16, 24)), split="all")
    recipe.data.update(source="folder", size=16, num_frames=4, batch_size=2, strides=(1,), stride_weights=(1.0,))
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = make_stage(recipe, mesh, tmp_path / "run")
        optimizer, key = make_optimizer(OptimizerConfig(warmup_steps=0), 8), jax.random.key(0)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh)
        first = jax.device_get(state.params)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings)
        batches, shapes = stage.batches_from(0), set()
        for _ in range(8):  # two epochs
            batch = next(batches)
            shapes.add(batch["latents"].shape)
            state, metrics = step(state, batch, key)
            assert np.isfinite(metrics["loss"]) and not metrics["skipped"]
    assert shapes == {(2, 4, 8, 8, 2), (2, 1, 8, 12, 2)} and len(stage.example_steps) == 2
    assert step._cache_size() == 2
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state.params)))


def test_buckets_need_a_decoder_that_takes_frames_alone(tmp_path):
    recipe = default_recipe("autoencoder")
    recipe.model.autoencoder.update(channels=(8, 8), norm_groups=4, decoder="temporal")
    recipe.data.update(folder=str(tmp_path), buckets=((4, 16, 16),))
    with pytest.raises(ValueError, match=r"decoder='temporal' mixes frames.*leave data.buckets empty"):
        staged(recipe, tmp_path, source="folder")


def test_an_image_among_clips_has_the_rate_of_the_clips():
    times = np.array([[0, 1, 2], [0, 2, 4], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(_rate(times, 8.0), [8.0, 4.0, 8.0])
    np.testing.assert_allclose(_rate(times[:, :1], 8.0), [8.0] * 3)
