"""Training starts from public pipelines: what is taken over, what is trained, and what the saved folder holds."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.pipeline_cases import write_pipeline
from golden.seeded_weights import seeded_tensor
from golden.unet_cases import CASES as UNETS
from golden.unet_cases import inputs
from tiny_model import random_params

import vdiff_jax as vd
from vdiff_jax import parallel, starting_point
from vdiff_jax.components import make_component
from vdiff_jax.data.video_io import Clip
from vdiff_jax.interop.motion import inflated
from vdiff_jax.interop.pipelines import Parts, save_pipeline
from vdiff_jax.interop.unet_rules import unet_rules
from vdiff_jax.interop.unets import unet_settings
from vdiff_jax.interop.weights import bind
from vdiff_jax.parallel import path_name
from vdiff_jax.recipe import finetune_recipe
from vdiff_jax.stages import make_stage
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.step import init_sharded_state, make_train_step
from vdiff_jax.types import Conditioning

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny tokenizers know few words
FAMILIES = ("modelscope", "animatediff", "image", "svd")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Family -> folder of a tiny pipeline: the golden ones with one level, and an image model with AnimateDiff's rest.

    "golden image" has the image UNet of the golden files.
    """
    root = tmp_path_factory.mktemp("pipelines")

    def write(name, model, unet, params):
        parts = model.components | {"unet": unet}, model.params | {"unet": params}, model.tokenizer, model.settings
        save_pipeline(root / name, Parts(*parts))
        return root / name

    folders = {}
    for family in ("modelscope", "animatediff", "svd"):
        model = vd.load(write_pipeline(family, root / f"golden_{family}"))
        folders[family] = write(family, model, *one_level(model.unet_config))
    model = vd.load(folders["animatediff"])
    image, params = image_unet()
    return folders | {
        "image": write("image", model, *one_level(image.config)),
        "golden image": write("golden_image", model, image, params),
    }


def one_level(config):
    """A UNet of the same family that compiles in half the time, no part of it silent."""
    heads = config.heads[:1]
    config = dataclasses.replace(config, channels=(32,), attention=(True,), heads=heads, transformer_layers=())
    component = make_component("unet", dataclasses.asdict(config))
    return component, random_params(component, 0, 0.1)


def image_unet():
    """The image UNet of the golden files."""
    component = make_component("unet", unet_settings(UNETS["image"]))
    bindings = bind(unet_rules(component.config), component.abstract)
    flat = {b.ours: b.leaf.load(seeded_tensor(b.theirs, b.their_shape, 0)) for b in bindings}
    return component, jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(flat[path_name(path)]), component.abstract
    )


def recipe_for(folder, **changes):
    recipe = finetune_recipe()
    recipe.init_from = str(folder)
    recipe.data.update(size=16, num_frames=3, batch_size=2, world="small", world_frames=4)
    recipe.data.update(strides=(1,), stride_weights=(1.0,), num_scenes=2)
    for section, values in changes.items():
        recipe[section].update(values)
    return recipe


def staged(recipe, folder, devices=1, fsdp=1):
    mesh = parallel.make_mesh(-1, fsdp, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return make_stage(recipe, mesh, folder), mesh


def trained(recipe, folder, steps=3, rate=3e-2):
    """(stage, losses on one batch with one key, state), trained on that batch."""
    stage, mesh = staged(recipe, folder)
    with jax.set_mesh(mesh):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))  # compiles sooner than AdamW
        key = jax.random.key(0)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh, start=stage.start)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings, ema_decay=0.0, frozen=stage.frozen)
        batch, losses = next(stage.batches_from(0)), []
        for _ in range(steps):
            state = dataclasses.replace(state, step=jnp.zeros_like(state.step))  # the same levels and noise again
            state, metrics = step(state, batch, key)
            losses.append(float(metrics["loss"]))
    return stage, losses, state


def leaves(params):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.fixture(scope="module")
def runs(pipelines, tmp_path_factory):
    """Family -> (losses, state, folder of the finished model)."""
    results = {}

    def run(family):
        if family not in results:
            folder = tmp_path_factory.mktemp(f"run_{family}")
            stage, losses, state = trained(recipe_for(pipelines[family]), folder)
            stage.finish(jax.device_get(state.ema), folder / "model")
            results[family] = losses, jax.device_get(state), folder
        return results[family]

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_is_trained_and_saved_as_a_pipeline(pipelines, runs, family):
    losses, state, folder = runs(family)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    base, tuned = vd.load(pipelines[family]), vd.load(folder)
    assert (folder / "model" / "model_index.json").is_file()
    assert tuned.unet_config.family == ("animatediff" if family == "image" else family)
    for name in base.components:
        if name != "unet":
            jax.tree.map(np.testing.assert_array_equal, tuned.params[name], base.params[name])
    before, after = leaves(base.params["unet"]), leaves(tuned.params["unet"])
    moving = {name for name in after if ".temporal." in name}
    changed = {name for name, value in after.items() if name not in before or (value != before[name]).any()}
    if family in ("animatediff", "image"):
        assert changed <= moving and len(changed) > 0.8 * len(moving)
        assert leaves(state.params["unet"]).keys() == moving  # and so of the optimizer and the average
    else:
        assert len(changed) > 0.8 * len(after)
    assert tuned.settings.prediction == base.settings.prediction
    assert tuned.settings.schedule_settings == base.settings.schedule_settings


def test_a_finished_run_samples(runs):
    for family in ("modelscope", "image"):
        clip = vd.load(runs(family)[2]).generate("a red circle", num_frames=3, size=16, steps=1, guidance_scale=1.0)
        assert clip.frames.shape == (3, 16, 16, 3)


def test_an_inflated_image_model_is_itself_on_every_frame(pipelines, tmp_path):
    """Against the golden numbers, and against the image network, on frames that differ."""
    values = inputs(UNETS["image"])
    expected = np.load("tests/golden/unet_image.npz")["prediction"]
    times = jnp.tile(jnp.arange(3.0)[None], (2, 1))
    nothing = jnp.zeros((*values["z"].shape[:4], 1)), jnp.full((2, 3), 10.0)
    cond = Conditioning(jnp.asarray(values["text"]), None, times)

    def predict(component, params):
        apply = jax.jit(component.apply)
        told = jnp.full((2, 3), values["timestep"], jnp.float32)
        return np.asarray(apply(params, jnp.asarray(values["z"]), told, *nothing, cond))

    image, params = image_unet()
    video, grown = inflated(image, params)
    still, moving = predict(image, params), predict(video, grown)
    scale = np.abs(expected).max()
    assert np.abs(moving - still).max() <= 1e-5 * scale
    assert np.abs(moving - expected).max() <= 1e-5 * scale
    # What the stage starts from is that network.
    stage, _ = staged(recipe_for(pipelines["golden image"]), tmp_path)
    assert stage.start is not None and stage.frozen is not None
    start = leaves(stage.start["unet"]) | leaves(stage.frozen["unet"])
    assert start.keys() == leaves(grown).keys()
    for name, value in leaves(grown).items():
        np.testing.assert_array_equal(start[name], value)


def test_the_loss_is_the_squared_error_of_the_network(pipelines, tmp_path):
    """A silent network's loss is the mean square of its targets: 1 for noise."""
    recipe = recipe_for(pipelines["modelscope"], data=dict(batch_size=8))
    stage, _ = staged(recipe, tmp_path)
    params = jax.tree.map(jnp.zeros_like, stage.init(jax.random.key(0)))
    batch = next(stage.batches_from(0))
    loss, metrics = jax.jit(stage.loss_fn)(params, batch, jax.random.split(jax.random.key(1), 8))
    np.testing.assert_allclose(loss, 1.0, atol=0.1)
    np.testing.assert_allclose(metrics["eps_loss"], loss, rtol=1e-5)


def test_the_picture_is_the_first_frame_and_is_told_with_its_noise(pipelines, tmp_path):
    recipe = recipe_for(pipelines["svd"], data=dict(strides=(2,), num_frames=2), picture=dict(motion_bucket=40.0))
    batch = next(staged(recipe, tmp_path)[0].batches_from(0))
    model = vd.load(pipelines["svd"])
    assert set(batch) >= {"image_latents", "image_embedding", "added", "latents"} and "text" not in batch
    assert batch["image_latents"].shape == batch["latents"].shape[:1] + batch["latents"].shape[2:]
    added = np.asarray(batch["added"])
    np.testing.assert_allclose(added[:, 0], model.settings.fps / 2 - 1)  # every second frame
    np.testing.assert_array_equal(added[:, 1], 40.0)
    assert (added[:, 2] > 0).all() and np.ptp(added[:, 2]) > 0
    # Without noise it is what the pipeline is told when it animates that frame.
    recipe.picture.noise_mean = -30.0
    stage, _ = staged(recipe, tmp_path)
    batch = next(stage.batches_from(0))
    scale = model.components["autoencoder"].config.latent_std[0]
    raw = np.asarray(batch["latents"][:, 0]) * scale  # a sample: near the mode, as the posterior is narrow or not
    assert np.corrcoef(raw.ravel(), np.asarray(batch["image_latents"]).ravel())[0, 1] > 0.5


def test_levels_and_settings_are_those_of_the_pipeline(pipelines, tmp_path):
    for family in FAMILIES:
        model = vd.load(pipelines[family])
        recipe = finetune_recipe()
        recipe.model.init_from = str(pipelines[family])
        recipe.diffusion.schedule_settings.update({} if family == "svd" else dict(beta_end=0.013))
        full, own = starting_point.filled(recipe, model), model.settings
        assert full.data.size == own.size and full.data.context_length == own.context_length
        assert full.data.num_frames == (16 if family == "image" else own.num_frames)
        assert full.diffusion.prediction == own.prediction and full.diffusion.noise == own.noise
        assert full.diffusion.weighting == own.prediction  # "eps" or "v": the plain error
        settings = full.diffusion.schedule_settings.to_dict()
        if family == "svd":
            assert full.diffusion.schedule == "logit_normal" and (settings["mean"], settings["std"]) == (0.7, 1.6)
        else:
            assert settings == {**own.schedule_settings, "beta_end": 0.013}
        assert recipe.data.size == 0  # the recipe itself is left alone


def test_one_of_our_own_models_is_taken_over_too(model_folder, tmp_path):
    recipe = recipe_for(model_folder, data=dict(num_frames=2, batch_size=2))
    stage, _ = staged(recipe, tmp_path)
    start = vd.load(model_folder)
    params = stage.init(jax.random.key(0))
    assert set(params) == {"unet", "text_encoder"}
    jax.tree.map(np.testing.assert_array_equal, params, {name: start.params[name] for name in params})
    assert next(stage.batches_from(0))["latents"].shape == (2, 2, 8, 8, 2)


def test_chosen_parameters_alone_are_trained(pipelines, tmp_path):
    patterns = (r"\.attn2\.to_k\.kernel$", r"^unet\.conv_out\.")
    recipe = recipe_for(pipelines["modelscope"], model=dict(trainable=patterns))
    stage, _ = staged(recipe, tmp_path)
    names = leaves(stage.init(jax.random.key(0))).keys()
    assert all(name.endswith("attn2.to_k.kernel") or ".conv_out." in name for name in names) and len(names) > 3
    # AnimateDiff as a whole
    recipe = recipe_for(pipelines["animatediff"], model=dict(trainable=(".",)))
    stage, _ = staged(recipe, tmp_path)
    assert stage.frozen is None and stage.start is not None and "conv_in" in stage.start["unet"]


def test_a_low_rank_update_of_a_public_model(pipelines, tmp_path):
    recipe = recipe_for(pipelines["animatediff"], lora=dict(rank=2, alpha=2.0))
    stage, losses, state = trained(recipe, tmp_path)
    assert losses[-1] < losses[0]
    names = leaves(state.params).keys()
    assert names and all(".to_" in name for name in names)
    stage.finish(jax.device_get(state.ema), tmp_path / "model")
    base, tuned = vd.load(pipelines["animatediff"]), vd.load(tmp_path)
    again = base.with_lora(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, again.params)
    before, after = leaves(base.params["unet"]), leaves(tuned.params["unet"])
    changed = {name for name in after if (after[name] != before[name]).any()}
    assert changed and all(".to_" in name for name in changed)
    options = dict(num_frames=3, size=16, steps=1, guidance_scale=1.0)
    assert tuned.generate("a red circle", **options).frames.shape == (3, 16, 16, 3)
    # A whole pipeline of it
    tuned.save_pretrained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, vd.load(tmp_path / "whole").params["unet"], tuned.params["unet"])


def test_weights_are_split_over_devices_and_runs_resume(pipelines, tmp_path):
    stage, mesh = staged(recipe_for(pipelines["modelscope"]), tmp_path, devices=2, fsdp=2)
    with jax.set_mesh(mesh):
        begin = functools.partial(init_sharded_state, stage.init, optax.adam(1e-3), jax.random.key(0), mesh)
        state, shardings = begin(start=stage.start)
        assert shardings == begin()[1]
    jax.tree.map(np.testing.assert_array_equal, state.params, stage.start)
    jax.tree.map(np.testing.assert_array_equal, state.ema, stage.start)
    split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert split and all(leaf.addressable_shards[0].data.size == leaf.size // 2 for leaf in split)
    assert all(a.sharding == b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_folder_of_clips_is_read_at_the_pipeline_s_rate(pipelines, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 20, 28, 3)).astype(np.uint8)
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        Clip(frames, 8.0).save(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text("a red circle")
    recipe = recipe_for(pipelines["modelscope"])
    recipe.data.update(source="folder", folder=str(tmp_path / "clips"), split="all", num_scenes=0)
    batch = next(staged(recipe, tmp_path)[0].batches_from(0))
    assert batch["latents"].shape == (2, 3, 8, 8, 4) and batch["text"].shape[0] == 2


LOAD_ONCE = functools.cache(vd.load)


@pytest.fixture
def loaded_once(monkeypatch):
    """Pipelines are read from disk once; for tests that train nothing."""
    monkeypatch.setattr(starting_point, "load", LOAD_ONCE)


MISTAKES = {
    "another width": ("modelscope", dict(model=dict(unet=dict(channels=(8, 16)))), r"model\.unet\.channels=\(8, 16\)"),
    "text of ours": ("modelscope", dict(model=dict(text="joint")), r"model\.text='joint': the text encoder of"),
    "cut prompts": ("modelscope", dict(data=dict(context_length=5)), r"data\.context_length=5: .* leave it 0"),
    "levels of ours": ("modelscope", dict(diffusion=dict(schedule="cosine")), r"diffusion\.schedule='cosine': .*empty"),
    "an odd size": ("modelscope", dict(data=dict(size=15)), "size 15x15 does not fit"),
    "no such parameter": ("modelscope", dict(model=dict(trainable=("motion",))), "'motion' is found in no parameter"),
    "new words": ("modelscope", dict(lora=dict(rank=2, new_words=("rex",))), r"lora\.new_words: the text encoder of"),
    "both at once": ("modelscope", dict(lora=dict(rank=2), model=dict(trainable=("x",))), "exclude each other"),
    "an unpublished walk": ("modelscope", dict(sample=dict(sampler="unipc")), "no public scheduler"),
    "too many frames": ("animatediff", dict(data=dict(num_frames=9)), r"data\.num_frames=9: .* know 8 positions"),
    "an update of stills": ("image", dict(lora=dict(rank=2)), "is an image model, whose motion modules"),
    "cached pictures": ("svd", dict(data=dict(latent_cache="latents")), r"data\.latent_cache: .* pixels"),
    "prompts for pictures": ("svd", dict(sample=dict(prompts=("a",))), r"sample\.prompts: .* reads pictures"),
    "too much dropped": ("svd", dict(picture=dict(dropout=0.5)), r"picture\.dropout=0\.5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_contradicts_the_pipeline_is_named(pipelines, loaded_once, tmp_path, name):
    family, changes, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match=sentence):
        staged(recipe_for(pipelines[family], **changes), tmp_path)


def test_a_pipeline_without_its_encoder_is_refused(pipelines, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(pipelines["modelscope"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = index["tokenizer"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no text_encoder, which its network reads"):
        staged(recipe_for(folder), tmp_path)
