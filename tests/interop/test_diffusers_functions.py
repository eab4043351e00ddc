"""Single networks of a public folder as plain functions, and no change of a checkpoint that goes unseen."""

import json

import jax
import numpy as np
import pytest
from golden.pipeline_cases import write_pipeline
from golden.seeded_weights import seeded_input, seeded_weights
from golden.unet_cases import CASES, inputs
from safetensors import safe_open
from safetensors.numpy import save_file

import vdiff_jax as vd
from vdiff_jax.interop.diffusers import load_autoencoder, load_image_encoder, load_text_encoder, load_unet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    return {family: write_pipeline(family, root / family) for family in ("modelscope", "svd")}


def unet_folder(family, tmp_path, golden):
    shapes = json.loads(str(golden["shapes"]))
    weights = seeded_weights({k: tuple(v) for k, v in shapes.items() if not k.endswith(".pos_embed.pe")})
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CASES[family]))
    return tmp_path


@pytest.mark.parametrize("family", ["svd", "i2vgen"])
def test_a_unet_is_a_function_of_its_own_timesteps(family, tmp_path):
    golden = np.load(f"{__file__.rpartition('/interop/')[0]}/golden/unet_{family}.npz")
    apply, params = load_unet(unet_folder(family, tmp_path, golden))
    values = inputs(CASES[family])
    extra = {name: values[name] for name in ("image_latents", "image_embedding", "added") if name in values}
    timestep = np.full(2, values["timestep"], np.float32)
    prediction = jax.jit(apply)(params, values["z"], timestep, values["text"], **extra)
    np.testing.assert_allclose(prediction, golden["prediction"], atol=1e-4 * np.abs(golden["prediction"]).max())


def test_autoencoder_and_encoders_are_functions(folders):
    model = vd.load(folders["modelscope"])
    (encode, params), (decode, _) = load_autoencoder(folders["modelscope"] / "vae")
    video = seeded_input("video", (1, 2, 8, 12, 3))
    latents = encode(params, video)
    np.testing.assert_allclose(latents, model.encode(video), atol=1e-5)
    assert decode(params, latents).shape == video.shape
    apply, params = load_text_encoder(folders["modelscope"] / "text_encoder")
    tokens, mask = model.tokenizer.encode(["a red circle"], model.settings.context_length)
    np.testing.assert_allclose(apply(params, tokens, mask), model.encode_prompts(["a red circle"])[0], atol=1e-5)
    apply, params = load_image_encoder(folders["svd"] / "image_encoder")
    assert apply(params, seeded_input("pixels", (2, 224, 224, 3))).shape == (2, 24)


def test_half_precision_is_half_the_memory(folders):
    apply, params = load_unet(folders["modelscope"] / "unet", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    values = inputs(CASES["modelscope"])
    arguments = values["z"], np.full(2, 741.0, np.float32), values["text"]
    whole_apply, whole = load_unet(folders["modelscope"] / "unet")
    half, full = (np.asarray(jax.jit(f)(p, *arguments)) for f, p in ((apply, params), (whole_apply, whole)))
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_no_change_of_a_single_tensor_goes_unseen(folders, tmp_path):
    """200 times one tensor of one part is dropped, renamed or transposed.

    In files that we wrote; in others a square matrix that was transposed has the right shape, and nothing tells.
    """
    vd.load(folders["modelscope"]).save_pretrained(tmp_path / "model")
    loaders = {"unet": load_unet, "vae": load_autoencoder, "text_encoder": load_text_encoder}
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    rng = np.random.default_rng(0)
    seen = dict.fromkeys(("dropped", "renamed", "transposed"), 0)
    files = {}
    for part, stem in stems.items():
        with safe_open(tmp_path / "model" / part / f"{stem}.safetensors", "numpy") as file:
            files[part] = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    for _ in range(200):
        part, change = str(rng.choice(list(loaders), p=[0.2, 0.4, 0.4])), str(rng.choice(list(seen)))
        tensors, metadata = dict(files[part][0]), files[part][1]
        name = str(rng.choice([key for key, value in tensors.items() if change != "transposed" or value.ndim > 1]))
        value = tensors[name]
        if change != "transposed":
            del tensors[name]
        if change == "renamed":
            tensors[name + "_"] = value
        elif change == "transposed":
            tensors[name] = np.ascontiguousarray(value.swapaxes(0, 1))
        path = tmp_path / "model" / part / f"{stems[part]}.safetensors"
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError) as error:
            loaders[part](tmp_path / "model" / part)
        assert name in str(error.value)
        save_file(files[part][0], path, metadata=metadata)
        seen[change] += 1
    assert min(seen.values()) > 30
