"""The whole model, small and random: generate, encode, decode, save, load, and what changes what."""

import dataclasses
import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdiff_jax.data.video_io import Clip
from vdiff_jax.diffusion.noise import draw_noise
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.sampling.guidance import make_denoise_fn
from vdiff_jax.sampling.job import START_STREAM, known_frames, stream, text_to_video_job
from vdiff_jax.sampling.samplers import SAMPLERS, make_sampler, sample
from vdiff_jax.types import Conditioning

PROMPT = "a red circle moving right"


def frames(clip: Clip) -> np.ndarray:
    return clip.frames.astype(np.float32)


def test_a_clip_has_the_shape_rate_and_provenance_asked_for(model):
    clip = model.generate(PROMPT, seed=3)
    assert isinstance(clip, Clip) and clip.frames.shape == (3, 16, 16, 3) and clip.frames.dtype == np.uint8
    assert clip.fps == 8.0 and frames(clip).std() > 1
    slow = model.generate(PROMPT, seed=3, stride=0.5)
    assert slow.fps == 16.0 and model.generate(PROMPT, seed=3, fps=5).fps == 5
    image = model.generate(["a", "a square"], num_frames=1, size=(8, 16), guidance_scale=1.0, sampler="ddim")
    assert [clip.frames.shape for clip in image] == [(1, 8, 16, 3)] * 2
    used = clip.metadata
    assert used["prompt"] == PROMPT and used["seed"] == 3 and used["note"] == "AI-generated"
    assert used["model"] == model.digest and used["steps"] == 3 and used["sampler"] == "dpmpp_2m"


def test_an_item_of_a_batch_is_what_it_would_be_with_other_neighbours(model):
    words = ["red", "green", "blue", "a", "up", "down", "left", "right"]
    keys = jax.vmap(lambda seed: jax.random.key(seed))(jnp.arange(8))
    eight = np.asarray(model.generate_latents(words, keys=keys))
    one = np.asarray(model.generate_latents(words[3:4], keys=keys[3:4]))
    np.testing.assert_allclose(one[0], eight[3], atol=1e-4 * np.abs(eight).max())
    assert np.abs(eight[3] - eight[4]).max() > 0.1
    both = model.generate([PROMPT, PROMPT], seed=3)
    alone = model.generate([PROMPT], seed=3)
    assert np.abs(frames(both[0]) - frames(alone[0])).max() <= 1  # one grey level of rounding
    assert np.any(both[1].frames != both[0].frames)


def test_a_clip_of_a_list_can_be_made_again_alone(model):
    listed = model.generate([PROMPT] * 8, seed=5)
    alone = model.generate(PROMPT, seed=5, first_index=3)
    assert np.abs(frames(alone) - frames(listed[3])).max() <= 1  # one grey level of rounding
    assert np.abs(frames(alone) - frames(listed[2])).max() > 3
    assert alone.metadata == listed[3].metadata and alone.metadata["index"] == 3


def test_changed_values_change_the_clip_and_compile_nothing(model, caplog):
    settings = dict(guidance_scale=2.0, eta=0.0, stride=1.0, negative_prompt="")
    base = model.generate_latents
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    first = np.asarray(base([PROMPT], keys=keys, **settings))
    changes = [
        dict(prompts=["a blue square"]),
        dict(keys=jax.vmap(jax.random.key)(jnp.arange(1) + 9)),
        dict(guidance_scale=5.5),
        dict(eta=0.7),
        dict(stride=2.0),
        dict(negative_prompt="green"),
        dict(guidance_interval=(-2.0, 2.0)),
    ]
    others = []
    caplog.set_level(logging.DEBUG, logger="jax")
    with jax.log_compiles():
        for change in changes:
            arguments = {"prompts": [PROMPT], "keys": keys, **settings, **change}
            others.append(np.asarray(base(arguments.pop("prompts"), **arguments)))
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]
    assert [text for text in compiled if any(f"jit({name})" in text for name in ("run", "call", "apply"))] == []
    assert len(compiled) <= 3, compiled  # single scalar operations of a first use at most
    for change, other in zip(changes, others):
        assert np.abs(other - first).max() > 1e-3, change


def test_context_and_steps_are_noised_as_in_the_training(model):
    other = dataclasses.replace(model, settings=dataclasses.replace(model.settings, noise="uniform"))
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    shape = (1, 3, 8, 8, 2)
    known = known_frames(jnp.zeros(shape), [0], logsnr=0.0)
    latents = other.complete(known, [PROMPT], keys=keys, sampler="ddpm", guidance_scale=1.0)
    cond = Conditioning(*model.encode_prompts([PROMPT]), jnp.arange(3.0)[None])
    denoise = make_denoise_fn(model.components["unet"].apply, model.params["unet"], model.settings.prediction)
    job = text_to_video_job(keys, shape, model.schedule, model.settings.steps, cond, "uniform")
    job = dataclasses.replace(job, known=known)
    for kind in ("uniform", "gaussian"):
        expected = jax.jit(functools.partial(sample, denoise))(job, make_sampler("ddpm", noise_kind=kind), keys)
        assert (np.abs(latents - expected).max() < 1e-4) == (kind == "uniform")


def test_guidance_of_one_is_no_guidance(model):
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    plain, nearly, strong = (
        np.asarray(model.generate_latents([PROMPT], keys=keys, negative_prompt="green up", guidance_scale=scale))
        for scale in (1.0, 1.0 + 1e-6, 3.0)
    )
    np.testing.assert_allclose(nearly, plain, atol=1e-3 * np.abs(plain).max())
    assert np.abs(strong - plain).max() > 1e-2
    ignored = model.generate_latents([PROMPT], keys=keys, negative_prompt="a", guidance_scale=1.0)
    np.testing.assert_array_equal(ignored, plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs(model, sampler):
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    latents = np.asarray(model.generate_latents([PROMPT], keys=keys, guidance_scale=1.0, sampler=sampler))
    assert latents.shape == (1, 3, 8, 8, 2) and np.isfinite(latents).all() and latents.std() > 1e-3


def test_encode_and_decode_take_every_form_of_video(model):
    rng = np.random.default_rng(0)
    clip = Clip(rng.integers(0, 256, size=(3, 16, 16, 3)).astype(np.uint8), 8.0)
    latents = model.encode(clip)
    assert latents.shape == (1, 3, 8, 8, 2)
    video = clip.frames.astype(np.float32)[None] / 127.5 - 1
    np.testing.assert_allclose(model.encode(clip.frames), latents, atol=1e-5)
    np.testing.assert_allclose(model.encode(video), latents, atol=1e-4)
    pixels = model.decode(latents)
    assert pixels.shape == (1, 3, 16, 16, 3) and pixels.dtype == np.uint8
    moved = latents.at[:, 1].add(1.0)
    changed = np.any(model.decode(moved) != pixels, axis=(0, 2, 3, 4))
    assert changed.tolist() == [False, True, False]  # frame by frame


def test_saved_and_loaded_is_bit_equal_with_a_stable_digest(model, model_folder, tmp_path):
    again = load(model_folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.settings == model.settings and again.digest == model.digest
    assert {name: part.config for name, part in again.components.items()} == {
        name: part.config for name, part in model.components.items()
    }
    np.testing.assert_array_equal(again.tokenizer.encode([PROMPT], 8)[0], model.tokenizer.encode([PROMPT], 8)[0])
    again.save_pretrained(tmp_path / "copy")
    for path in model_folder.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes(), path.name
    other = dataclasses.replace(model, settings=dataclasses.replace(model.settings, prediction="eps"))
    moved = jax.tree.map(lambda leaf: leaf, model.params)
    moved["unet"]["conv_in"]["bias"] = moved["unet"]["conv_in"]["bias"] + 1e-6
    digests = {model.digest, other.digest, dataclasses.replace(model, params=moved).digest}
    assert len(digests) == 3


def test_a_run_folder_is_loaded_through_its_model(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    assert load(tmp_path / "run").settings.size == 16


def test_files_that_do_not_fit_are_refused_by_name(model_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    flat = load_file(folder / "unet.safetensors")
    bias = flat.pop("conv_in.bias")
    save_file({**flat, "conv_in.bios": bias, "conv_out.bias": bias}, folder / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors does not fit the model") as error:
        load(folder)
    for problem in ("missing conv_in.bias (8,)", "unexpected conv_in.bios", "conv_out.bias is (8,), expected (2,)"):
        assert problem in str(error.value)
    config = json.loads((folder / "config.json").read_text())
    for change, message in {
        "format": "has format 'vdiff_jax/999'",
        "settings": "settings.colour is not a setting",
        "components": "model.unet.colour is not a setting",
    }.items():
        broken = json.loads(json.dumps(config))
        if change == "format":
            broken["format"] = "vdiff_jax/999"
        else:
            (broken["settings"] if change == "settings" else broken["components"]["unet"])["colour"] = 1
        (folder / "config.json").write_text(json.dumps(broken))
        if change == "settings":
            shutil.copy(model_folder / "unet.safetensors", folder)
        with pytest.raises(ValueError, match=message):
            load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "text_encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder\.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_frames=0), "num_frames=0: it must be at least 1"),
        (dict(steps=0), "steps=0: it must be at least 1"),
        (dict(size=15), "size 15x15 does not fit this model: use multiples of 2"),
        (dict(size=(16, 0)), "size 16x0 does not fit this model"),
        (dict(sampler="ddimm"), "sampler 'ddimm' is unknown; did you mean 'ddim'"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_a_sentence(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **settings)


def test_unknown_models_and_missing_parts_are_said_so(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model 'no_such_model': give a run folder"):
        load("no_such_model")
    silent = VideoDiffusion({"autoencoder": model.components["autoencoder"]}, model.params, None, model.settings)
    with pytest.raises(ValueError, match="no text encoder: it takes no prompts"):
        silent.encode_prompts([PROMPT])


def test_too_long_a_prompt_warns_and_says_what_was_cut(model):
    with pytest.warns(UserWarning, match="2 tokens too long; cut from it: 'background and'"):
        model.encode_prompts(["a red circle moving right on background and"])


def test_the_estimate_is_one_denoising_step_without_guidance(model):
    """A plan of one step returns the estimate at the noisiest level of the schedule."""
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    prompts = [PROMPT, "a blue square"]
    sampled = model.generate_latents(prompts, keys=keys, steps=1, guidance_scale=1.0, sampler="ddim")
    z = draw_noise(stream(keys, START_STREAM), sampled.shape[1:])
    level = jnp.full(z.shape[:2], model.schedule.logsnr_min)
    estimate = model.estimate(z, level, prompts)
    assert np.abs(np.asarray(estimate) - np.asarray(model.estimate(z, level))).max() > 1e-3  # the prompt matters
    np.testing.assert_allclose(estimate, sampled, atol=1e-4 * np.abs(np.asarray(sampled)).max())
