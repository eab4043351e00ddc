"""The editing suite on public models: every task runs, known parts stay, and what depends on a network's own levels is
right. The networks are random, so pictures mean nothing; what is exact for any network is checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.pipeline_cases import image, write_pipeline

import vdiff_jax as vd
from vdiff_jax import parallel
from vdiff_jax.components import make_component
from vdiff_jax.data.video_io import Clip
from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.sampling.job import nothing_known
from vdiff_jax.sampling.timesteps import make_timestep_denoise_fn
from vdiff_jax.types import Conditioning, Known

FRAMES, SIZE = 4, (8, 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    loaded = {family: vd.load(write_pipeline(family, root / family)) for family in ("modelscope", "svd")}
    settings = dict(size=SIZE, num_frames=FRAMES, steps=2)
    return {family: smaller(model, **settings) for family, model in loaded.items()}


def smaller(model, **settings):
    """The same with a UNet of one narrow level, which compiles sooner."""
    config = model.components["unet"].config_dict()
    config |= dict(
        channels=(16,),
        attention=(False,),
        blocks_per_level=1,
        norm_groups=8,
        head_dim=8,
        heads=(),
        embedding_features=64,
    )
    unet = make_component("unet", config | dict(transformer_layers=()))
    return dataclasses.replace(
        model,
        components={**model.components, "unet": unet},
        params={**model.params, "unet": jax.tree.map(lambda x: x + 0.1, unet.init(jax.random.key(0)))},
        settings=dataclasses.replace(model.settings, **settings),
    )


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.integers(-20, 21, (FRAMES, *SIZE, 3)), axis=0) + 128
    return Clip(np.uint8(np.clip(frames, 0, 255)), 8.0)


MASK = np.zeros((FRAMES, *SIZE), bool)
MASK[:, 2:6, 4:8] = True

TASKS = {
    "flow": lambda editor: editor.edit("a blue square", "a red circle", method="flow"),
    "sdedit": lambda editor: editor.edit("a blue square", method="sdedit", strength=0.6),
    "ddpm": lambda editor: editor.edit("a blue square", "a red circle", method="ddpm"),
    "inpaint": lambda editor: editor.inpaint(MASK, "a red circle"),
    "denoise": lambda editor: editor.restore("denoise", noise_std=0.1),
    "extend": lambda editor: editor.extend(FRAMES + 2, "a red circle"),
    "interpolate": lambda editor: editor.interpolate(2),
}
LENGTHS = {"extend": FRAMES + 2, "interpolate": 2 * FRAMES - 1}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_on_a_text_to_video_model(models, clip, task):
    made = TASKS[task](models["modelscope"].editor(clip))
    assert made.frames.shape == (LENGTHS.get(task, FRAMES), *SIZE, 3)
    assert np.any(made.frames[:FRAMES] != clip.frames) or task == "extend"
    if task == "inpaint":
        np.testing.assert_array_equal(made.frames[~MASK], clip.frames[~MASK])
        assert np.any(made.frames[MASK] != clip.frames[MASK])
    if task == "extend":
        np.testing.assert_array_equal(made.frames[:FRAMES], clip.frames)


def test_an_image_to_video_model_edits_with_the_first_frame_as_its_picture(models, clip):
    wider = models["svd"].outpaint(clip, left=4)  # of another size, so its picture is read anew
    assert wider.frames.shape == (FRAMES, SIZE[0], SIZE[1] + 4, 3)
    made = models["svd"].editor(clip).edit("", method="sdedit", strength=0.5)
    assert made.frames.shape == clip.frames.shape and np.any(made.frames != clip.frames)


def test_a_picture_is_needed_and_moves(models):
    model = models["svd"]
    with pytest.raises(ValueError, match="this model animates a picture: use animate"):
        model.generate("")
    with pytest.raises(ValueError, match=r"the picture is float64 of shape \(4, 4\)"):
        model.animate(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="this model animates no picture"):
        models["modelscope"].animate(image())
    plain = model.animate(image(), seed=1)
    assert plain.frames.shape == (FRAMES, *SIZE, 3) and plain.fps == model.settings.fps
    for change in (dict(motion_bucket=10), dict(noise_augmentation=0.5), dict(fps=30)):
        other = model.animate(image(), seed=1, **change)
        assert np.any(other.frames != plain.frames), change
    np.testing.assert_array_equal(model.animate(image(), seed=1).frames, plain.frames)


def test_another_picture_compiles_nothing_and_another_size_is_said(models):
    model = dataclasses.replace(models["svd"])  # as if just loaded: nothing is compiled yet
    model.animate(image(), motion_bucket=10)
    sizes = model._run._cache_size(), model._decode._cache_size()
    model.animate(image(), motion_bucket=20)
    assert (model._run._cache_size(), model._decode._cache_size()) == sizes == (1, 1)
    told = model.with_image(image(), size=(16, 16))
    with pytest.raises(ValueError, match="the picture was read for latents of 8x8, the clip has 4x6"):
        told.generate("")


def test_a_save_over_another_model_leaves_no_mixture(models, tmp_path, monkeypatch):
    models["modelscope"].save_pretrained(tmp_path)
    monkeypatch.setattr("vdiff_jax.interop.pipelines.save_autoencoder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models["modelscope"].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model"):
        vd.load(tmp_path)
    monkeypatch.undo()
    models["modelscope"].save_pretrained(tmp_path)
    zero = {"unet": jax.tree.map(jnp.zeros_like, models["modelscope"].params["unet"])}
    models["modelscope"].with_params(zero).save_pretrained(tmp_path, layout="vdiff_jax")
    assert not any(leaf.any() for leaf in jax.tree.leaves(vd.load(tmp_path).params["unet"]))


def test_known_tokens_are_shown_at_the_level_of_the_others(models):
    """With their own noise, whatever level they were pinned at, and the network is told its own timestep."""
    schedule = models["modelscope"].schedule
    shape = (1, 2, 2, 2, 4)
    latents, eps = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    mask = jnp.zeros((*shape[:4], 1)).at[:, 0].set(1.0)
    known = Known(latents, mask, jnp.full(shape[:2], 6.0))
    level = schedule.timestep_to_logsnr(jnp.full(shape[:2], 400))
    seen = {}

    def network(params, z, timestep, known_mask, context_logsnr, cond):
        seen.update(z=z, timestep=timestep)
        return jnp.zeros_like(z)

    denoise_fn = make_timestep_denoise_fn(network, {}, "eps", schedule)
    pinned = jnp.where(mask > 0, add_noise(latents, eps, known.logsnr), 7.0)
    cond = Conditioning(None, None, jnp.zeros(shape[:2]))
    x0_hat = denoise_fn(pinned, level, known, cond, next_logsnr=level, keys=jax.random.split(jax.random.key(0), 1))
    np.testing.assert_allclose(seen["z"][:, 0], add_noise(latents, eps, level)[:, 0], atol=1e-5)
    np.testing.assert_array_equal(seen["z"][:, 1], pinned[:, 1])
    np.testing.assert_allclose(seen["timestep"], 400, atol=1e-3)
    np.testing.assert_array_equal(x0_hat[:, 0], latents[:, 0])
    with pytest.raises(ValueError, match="prediction kind 'noise' is unknown"):
        make_timestep_denoise_fn(network, {}, "noise", schedule)
    assert nothing_known(shape).mask.max() == 0


def test_a_decoder_that_mixes_frames_sees_all_or_a_chunk_of_them(models):
    model = models["svd"]
    chunked = dataclasses.replace(model, settings=dataclasses.replace(model.settings, decode_chunk_frames=2))
    latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 6, 4))
    whole, made = model.decode(latents), chunked.decode(latents)
    by_hand = np.concatenate([model.decode(latents[:, :2]), model.decode(latents[:, 2:])], axis=1)
    np.testing.assert_array_equal(made, by_hand)
    assert made.shape == whole.shape and np.any(made != whole)


def test_weights_spread_over_devices_make_the_same_clip(models, tmp_path):
    folder = tmp_path / "saved"
    models["modelscope"].save_pretrained(folder)
    mesh = parallel.make_mesh(fsdp=8)
    spread = vd.load(folder, shardings=lambda shapes: parallel.tree_shardings(shapes, mesh, min_size=256))
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(spread.params["unet"])]
    assert min(shares) == 1 / 8 and sum(share < 1 for share in shares) > 30
    options = dict(num_frames=2, size=SIZE, steps=1, seed=3)
    whole, parts = (model.generate("a red circle", **options).frames for model in (vd.load(folder), spread))
    assert np.abs(whole.astype(int) - parts).max() <= 1
