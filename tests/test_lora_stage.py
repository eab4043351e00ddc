"""A model is personalised from a few clips: what is trained, what is written, and what becomes of the base."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from script_runner import run_scripts

from vdiff_jax import parallel
from vdiff_jax.data.shapes import captions
from vdiff_jax.data.video_io import Clip
from vdiff_jax.interop.lora import load_lora, save_lora
from vdiff_jax.lora_model import add_words
from vdiff_jax.lora_stage import personalisation, shifted
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.models.lora import lora_targets
from vdiff_jax.pipeline import load
from vdiff_jax.recipe import LoraConfig, SampleConfig, data_config, default_recipe
from vdiff_jax.stages import make_stage
from vdiff_jax.streams import make_stream
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import init_sharded_state, make_train_step
from vdiff_jax.training.writers import MetricWriter

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny encoder's words are few, its context short
TARGETS = (r"\.mid\..*\.film\.kernel$", r"\.conv_out\.kernel$", r"^text_encoder.*\.to_q\.kernel$")
OLD = ["a red circle moving left", "green square on a grey background"]


def lora_recipe(model, model_folder, **lora):
    recipe = default_recipe("diffusion")
    recipe.model.autoencoder_from = recipe.model.init_from = str(model_folder)
    recipe.model.unet.update(model.components["unet"].config_dict())
    recipe.model.text_encoder.update(model.components["text_encoder"].config_dict())
    recipe.data.update(world="small", size=16, world_frames=4, num_frames=2, batch_size=16, context_length=8)
    recipe.data.update(strides=(1,), stride_weights=(1.0,), num_scenes=2)
    recipe.data.world_overrides.update(shapes=("star",), colours=("red",), empty_rate=0.0)
    recipe.lora.update(dict(rank=2, alpha=4.0, new_words=("star=circle",), prior_share=0.5, shift=1) | lora)
    recipe.lora.prior.update(world_overrides=dict(shapes=("circle",), colours=("green",), empty_rate=0.0))
    recipe.sample.update(prompts=("a red star",), num_frames=2, steps=1)
    recipe.diffusion.schedule_settings.shift = 1.5  # levels to train at; the model walks its own
    return recipe


def encoded(model, prompts):
    """Token rows of prompts that may hold the word star."""
    return model.tokenizer.with_words(["star"])[0].encode(prompts, 8)[0].tolist()


def staged(recipe, folder):
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        return make_stage(recipe, mesh, folder)


@pytest.fixture(scope="module")
def trained(model, model_folder, tmp_path_factory):
    """Three steps on clips of a red star and of green circles: (stage, first state, last state, folder)."""
    folder = tmp_path_factory.mktemp("run")
    recipe = lora_recipe(model, model_folder, targets=TARGETS)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = make_stage(recipe, mesh, folder)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.05, warmup_steps=0), 3)
        state, shardings = init_sharded_state(stage.init, optimizer, jax.random.key(0), mesh)
        first = jax.device_get(state)
        step = make_train_step(stage.loss_fn, optimizer, mesh, shardings, ema_decay=0.5, frozen=stage.frozen)
        batches = stage.batches_from(0)
        for _ in range(3):
            state, _ = step(state, next(batches), jax.random.key(1))
        checkpoints = Checkpoints(folder)
        checkpoints.save(state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    stage.on_sample(3, jax.device_get(state.ema), writer := MetricWriter(folder))
    writer.close()
    stage.finish(jax.device_get(state.ema), folder / "model")
    return stage, first, jax.device_get(state), folder


def test_only_the_update_is_trained_kept_and_saved(model, trained):
    stage, first, last, folder = trained
    targets = lora_targets({name: model.params[name] for name in ("unet", "text_encoder")}, TARGETS)
    sizes = 8 + sum(2 * (np.prod(k.shape[:-1]) + k.shape[-1]) for k in map(leaf_at(model.params), targets))
    assert parameter_count(last.params) == sizes  # and eight numbers for the new word
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(last.params)}
    moments = [leaf for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sizes and len(moments) == 2 * len(paths)
    # A has no gradient as long as B is zero, so after the first step it has moved in the later ones only; all moved.
    for before, after in zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True):
        assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
    assert (folder / "samples" / "0000003.png").is_file()  # the preview
    size = sum(file.stat().st_size for file in (folder / "model").iterdir())
    assert size < 4 * sizes + 20_000
    # The base is the model's, bit for bit, before and after training.
    jax.tree.map(np.testing.assert_array_equal, stage.frozen["unet"], model.params["unet"])
    table = stage.frozen["text_encoder"]["token_embedding"]
    np.testing.assert_array_equal(table[:-1], model.params["text_encoder"]["token_embedding"])


def leaf_at(params):
    def find(path):
        leaf = params
        for key in path.split("."):
            leaf = leaf[int(key) if key.isdigit() else key]
        return leaf

    return find


def test_an_untrained_update_is_the_base_and_its_gradient_leaves_the_base_alone(model):
    parts = (model.components, model.params, model.tokenizer)
    digests = {"unet": "u", "text_encoder": "t"}
    tuned = personalisation(LoraConfig(rank=2, new_words=("star",)), parts, ("unet", "text_encoder"), digests, "tiny")
    trainable = jax.jit(tuned.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(tuned.complete)(trainable, tuned.base), tuned.base)

    def squares(params, batch, keys):
        return 0.5 * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)), {}

    # Half the sum of squares has the parameter itself as gradient: of a word its row, of B scale A^T W, of A nothing.
    gradient = jax.jit(jax.grad(lambda trainable, base: tuned.loss(squares)(trainable, {}, None, base)[0]))
    grads = gradient(trainable, tuned.base)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    np.testing.assert_allclose(grads["words"]["embedding"], trainable["words"]["embedding"], atol=1e-6)
    a, base = trainable["unet"]["mid_out"]["film"]["kernel"]["a"], model.params["unet"]["mid_out"]["film"]["kernel"]
    ours = grads["unet"]["mid_out"]["film"]["kernel"]
    np.testing.assert_allclose(ours["b"], 4.0 / 2 * a.T @ base, atol=1e-5)
    np.testing.assert_array_equal(ours["a"], 0.0)
    assert tuned.lora(trainable).base == digests and tuned.lora(trainable).base_name == "tiny"


def test_half_of_a_batch_is_old_and_rows_alternate(model, model_folder, tmp_path):
    recipe = lora_recipe(model, model_folder)
    batch = next(staged(recipe, tmp_path).batches_from(0))
    start = add_words((model.components, model.params, model.tokenizer), ["star"])[0]
    star, green = (start[2].word_id(word) for word in ("star", "green"))
    tokens = np.asarray(batch["tokens"])
    np.testing.assert_array_equal((tokens == star).any(axis=1), np.arange(16) % 2 == 0)
    np.testing.assert_array_equal((tokens == green).any(axis=1)[::2], False)
    assert (tokens == green).any(axis=1)[1::2].mean() > 0.5  # some captions are cut before their colour
    assert batch["latents"].shape == (16, 2, 8, 8, 2)


def test_the_run_folder_is_the_personalised_model(model, trained, tmp_path):
    _, _, last, folder = trained
    personal = load(folder)
    lora = load_lora(folder)
    walk = dict(sampler=SampleConfig().sampler, guidance_scale=SampleConfig().guidance_scale, num_frames=2, steps=1)
    assert personal.settings == dataclasses.replace(model.settings, **walk)
    assert lora.new_words == ("star",) and lora.rank == 2 and lora.alpha == 4.0
    jax.tree.map(
        np.testing.assert_array_equal, lora.factors, {name: last.ema[name] for name in ("unet", "text_encoder")}
    )
    np.testing.assert_array_equal(lora.word_rows, last.ema["words"]["embedding"])
    # The new word has its own row; old prompts have their old tokens.
    np.testing.assert_array_equal(personal.tokenizer.encode(OLD, 8)[0], model.tokenizer.encode(OLD, 8)[0])
    row = personal.tokenizer.encode(["a Red star"], 8)[0][0, 3]
    np.testing.assert_array_equal(
        personal.params["text_encoder"]["token_embedding"][row], last.ema["words"]["embedding"][0]
    )
    # By hand: the kernel of one layer.
    factors = last.ema["unet"]["mid"]["res"]["film"]["kernel"]
    by_hand = np.asarray(model.params["unet"]["mid"]["res"]["film"]["kernel"]) + 4.0 / 2 * factors["a"] @ factors["b"]
    np.testing.assert_allclose(personal.params["unet"]["mid"]["res"]["film"]["kernel"], by_hand, atol=1e-6)
    # Merged and saved whole, it needs its base no more: the same weights, configuration and words.
    personal.save_pretrained(tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert whole.digest == personal.digest != model.digest
    np.testing.assert_array_equal(*(each.tokenizer.encode(["a red star"], 8)[0] for each in (personal, whole)))


def test_a_scale_of_zero_is_the_base_and_updates_add_up(model, trained):
    lora = load_lora(trained[3])
    off = model.with_lora(lora, scale=0.0)
    jax.tree.map(np.testing.assert_array_equal, off.params["unet"], model.params["unet"])
    wordless = dataclasses.replace(lora, new_words=(), word_rows=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second is still an update of the same base
        twice = model.with_lora(wordless, 0.3).with_lora(wordless, 0.7)
    once = model.with_lora(wordless)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), twice.params["unet"], once.params["unet"])
    with pytest.raises(ValueError, match="new word 'star': the tokenizer knows it already"):
        model.with_lora(lora).with_lora(lora)


def test_the_update_shows_in_clips_and_compiled_functions_are_shared(model, trained):
    before = model.generate(OLD, seed=0)
    compiled = {name: value for name, value in model.__dict__.items() if hasattr(value, "_cache_size")}
    sizes = {name: value._cache_size() for name, value in compiled.items() if name != "_encode_text"}
    after = model.with_lora(load_lora(trained[3])).generate(OLD, seed=0)
    assert sizes and {name: compiled[name]._cache_size() for name in sizes} == sizes
    for ours, theirs in zip(before, after, strict=True):
        assert ours.frames.shape == theirs.frames.shape and (ours.frames != theirs.frames).any()


def test_a_wrong_base_is_told_by_both_digests_and_a_wrong_shape_refused(model, trained):
    lora = load_lora(trained[3])
    other = model.with_params({"unet": jax.tree.map(lambda leaf: leaf + 1e-3, model.params["unet"])})
    ours, theirs = other.component_digest("unet"), model.component_digest("unet")
    with pytest.warns(UserWarning, match=f"another base model.*unet is {ours}, not {theirs}"):
        other.with_lora(lora)
    kernel = {"mid": {"res": {"film": {"kernel": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 16))}}}}}
    with pytest.raises(ValueError, match=r"unexpected unet\.top; unet\.mid\.res\.film\.kernel has factors \(3, 2\)"):
        model.with_lora(dataclasses.replace(lora, factors={"unet": {"top": kernel["mid"], **kernel}}))
    mute = dataclasses.replace(model, components={"unet": model.components["unet"]}, tokenizer=None)
    with pytest.raises(ValueError, match="is for text_encoder, which this model does not hold"):
        mute.with_lora(lora)


def test_files_are_read_strictly(model, trained, tmp_path):
    lora = load_lora(trained[3])
    save_lora(tmp_path / "copy.safetensors", lora)
    copy = load_lora(tmp_path / "copy.safetensors")
    jax.tree.map(np.testing.assert_array_equal, copy.factors, lora.factors)
    same = ("rank", "alpha", "targets", "new_words", "base", "base_name")
    assert {name: getattr(copy, name) for name in same} == {name: getattr(lora, name) for name in same}
    assert lora.base == {name: model.component_digest(name) for name in ("text_encoder", "unet")}
    save_lora(tmp_path / "other_rank.safetensors", dataclasses.replace(lora, rank=3))
    with pytest.raises(ValueError, match=r"unet\.mid\.res\.film\.kernel\.a \(16, 2\) is not of rank 3"):
        load_lora(tmp_path / "other_rank.safetensors")
    stray = {**lora.factors, "gate": jnp.ones((2, 2))}
    save_lora(tmp_path / "stray.safetensors", dataclasses.replace(lora, factors=stray))
    with pytest.raises(ValueError, match=r"gate \(2, 2\) is not one of a pair"):
        load_lora(tmp_path / "stray.safetensors")
    save_lora(tmp_path / "wordless.safetensors", dataclasses.replace(lora, word_rows=None))
    with pytest.raises(ValueError, match="names 1 new words"):
        load_lora(tmp_path / "wordless.safetensors")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="it holds no update"):
        load_lora(tmp_path / "whole" / "unet.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_lora(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nor a folder that holds lora\.safetensors"):
        load_lora(tmp_path)


def test_a_folder_of_clips_is_as_good_as_a_world(model, model_folder, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        Clip(frames, 8.0).save(tmp_path / "clips" / f"{name}.mp4")
        (tmp_path / "clips" / f"{name}.txt").write_text("a red rex moving left")
    recipe = lora_recipe(model, model_folder, new_words=("rex",), targets=("to_q",))
    recipe.data.update(source="folder", folder=str(tmp_path / "clips"), split="all", native_fps=8.0, num_scenes=0)
    recipe.lora.prior.update(source="shapes")
    stage = staged(recipe, tmp_path)
    batch = next(stage.batches_from(0))
    trainable = jax.jit(stage.init)(jax.random.key(0))
    assert batch["latents"].shape == (16, 2, 8, 8, 2) and batch["tokens"].shape == (16, 8)
    mean = model.params["text_encoder"]["token_embedding"].mean(axis=0)  # where a word without a model starts
    np.testing.assert_allclose(trainable["words"]["embedding"][0], mean, atol=1e-6)


def test_a_star_may_start_from_a_circle(model):
    parts, rows = add_words((model.components, model.params, model.tokenizer), ["star=circle", "rex"])
    table = parts[1]["text_encoder"]["token_embedding"]
    old = model.params["text_encoder"]["token_embedding"]
    np.testing.assert_array_equal(table[rows[0]], old[model.tokenizer.word_id("circle")])
    assert len(table) == parts[0]["text_encoder"].config.vocab_size == parts[2].vocab_size == len(old) + 2


@pytest.mark.parametrize(
    ("lora", "data", "sentence"),
    [
        (dict(rank=-1), {}, "lora.rank=-1: 0 trains all weights"),
        (dict(alpha=0.0), {}, "lora.alpha=0.0: it must be above 0"),
        (dict(prior_share=1.0), {}, "lora.prior_share=1.0: it must be at least 0 and below 1"),
        (dict(prior_share=0.01), {}, "leaves one part without clips"),
        (dict(shift=-1), {}, "lora.shift=-1: 0, or above 0 without"),
        (dict(shift=2), dict(latent_cache="latents"), "lora.shift=2: 0, or above 0 without"),
        (dict(targets=("to_z",)), {}, "'to_z' is found in no kernel"),
        (dict(new_words=("red",)), {}, "new word 'red': the tokenizer knows it already"),
        (dict(new_words=("red star",)), {}, "give single words"),
        (dict(new_words=("star=disc",)), {}, "does not know the word 'disc'"),
        ({}, dict(num_scenes=-1), "data.num_scenes=-1"),
        ({}, dict(batch_size=8), "not a multiple of 8 devices"),
    ],
)
def test_settings_that_cannot_work_are_named(model, model_folder, tmp_path, lora, data, sentence):
    recipe = lora_recipe(model, model_folder, **lora)
    recipe.data.update(data)
    with pytest.raises(ValueError, match=sentence):
        staged(recipe, tmp_path)


def test_an_update_needs_a_model_and_old_clips_a_place(model, model_folder, tmp_path):
    recipe = lora_recipe(model, model_folder)
    recipe.lora.prior.update(size=8)
    with pytest.raises(ValueError, match=r"lora\.prior\.size cannot differ"):
        staged(recipe, tmp_path)
    recipe = lora_recipe(model, model_folder)
    recipe.lora.prior = {}
    with pytest.raises(ValueError, match=r"lora\.prior_share=0\.5 needs lora\.prior"):
        staged(recipe, tmp_path)
    recipe.lora.prior_share = 0.0
    recipe.model.init_from = ""
    with pytest.raises(ValueError, match=r"lora\.rank=2 needs model\.init_from"):
        staged(recipe, tmp_path)


def test_fixed_scenes_are_the_same_clips_at_every_step(model, model_folder, tmp_path):
    recipe = lora_recipe(model, model_folder, prior_share=0.0)
    stage = staged(recipe, tmp_path)
    batches = stage.batches_from(0)
    prompts = {tuple(row) for _ in range(3) for row in np.asarray(next(batches)["tokens"]).tolist()}
    assert len(prompts) == 2
    host = make_stream(data_config(recipe), seed=5, tokenizer=None).host
    assert len(prompts & set(map(tuple, encoded(model, captions(host.fixed_scenes()))))) == 2  # for any seed of the run


def test_the_script_takes_updates_with_scales(model_folder, trained, tmp_path):
    run = str(trained[3])
    sample = ["sample.py", f"--model={model_folder}", "--prompt=a red star", "--steps=1"]
    good, bad, missing = run_scripts(
        [
            [*sample, f"--out={tmp_path / 'star.png'}", f"--lora={run}:0.5"],
            [*sample, f"--out={tmp_path / 'none.png'}", f"--lora={run}:half"],
            [*sample, f"--out={tmp_path / 'none.png'}", f"--lora={tmp_path / 'none.safetensors'}"],
        ]
    )
    assert good.code == 0 and (tmp_path / "star.png").is_file() and "does not know" not in good.stderr
    assert bad.code == 1 and "give a path, or path:scale with a number" in bad.stderr
    assert missing.code == 1 and "is no file of a low-rank update" in missing.stderr


def test_windows_are_moved_as_a_whole_and_their_edges_repeated():
    """Every clip is the padded clip cut at one place for all its frames; all 25 places come up."""
    video = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6, 5, 3)), jnp.float32)
    moved = np.asarray(shifted(jnp.tile(video, (400, 1, 1, 1, 1)), jax.random.split(jax.random.key(0), 400), 2))
    padded = np.pad(np.asarray(video[0]), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = {(top, left): padded[:, top : top + 6, left : left + 5].tobytes() for top in range(5) for left in range(5)}
    assert {clip.tobytes() for clip in moved} == set(places.values())
