"""Encoders saved by transformers give the same numbers here, block by block, and go back as they came.

Golden folders: tests/golden/make_encoder_golden.py. Where torch and transformers are installed, the same is tried on
more shapes, and transformers reads what we write.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdiff_jax.components import KINDS, make_component
from vdiff_jax.interop.pretrained import flatten
from vdiff_jax.interop.transformers import (
    load_image_encoder,
    load_text_encoder,
    save_image_encoder,
    save_text_encoder,
)
from vdiff_jax.models.clip_pixels import clip_pixels, normalize_pixels, resize_antialiased, resize_matrix
from vdiff_jax.models.functional import functional, parameter_count
from vdiff_jax.models.image_encoder import ImageEncoderConfig
from vdiff_jax.models.t5_encoder import T5Encoder, T5EncoderConfig
from vdiff_jax.models.text_encoder import TextEncoderConfig

GOLDEN = Path(__file__).parent.parent / "golden"
TEXTS = ("tiny_clip_text", "tiny_clip_text_projection", "tiny_t5")
FOLDERS = (*TEXTS, "tiny_clip_vision")
BLOCK, WHOLE = 1e-5, 1e-4  # bounds of the relative error


def error(ours, theirs):
    """Largest difference in units of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def load(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    return (load_image_encoder if "patch_size" in config else load_text_encoder)(folder, **settings)


def save(folder, component, params, dtype="float32"):
    write = save_image_encoder if component.name == "image_encoder" else save_text_encoder
    write(folder, component, params, dtype)


def inputs(golden):
    if "pixels" in golden:
        return (golden["pixels"],)
    tokens = golden["tokens"]
    return tokens, golden["mask"] if "mask" in golden else np.ones(tokens.shape, bool)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_block_and_the_whole_equal_those_of_transformers(name):
    component, params = load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "expected.npz")
    states = component.apply(params, *inputs(golden), method="hidden_states")
    assert len(states) == component.config.layers + 1
    for index, state in enumerate(states):
        assert error(state, golden[f"state{index}"]) <= BLOCK, index
    assert max(block_errors(component, params, golden)) <= BLOCK
    assert error(jax.jit(component.apply)(params, *inputs(golden)), golden["output"]) <= WHOLE
    if "pooled" in golden:
        assert error(component.apply(params, *inputs(golden), method="pooled"), golden["pooled"]) <= WHOLE
    assert golden["output"].std() > 0.3


@pytest.mark.parametrize("name", FOLDERS)
def test_the_gradient_through_a_block_equals_that_of_transformers(name):
    component, params = load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "expected.npz")
    assert error(block_gradient(component, params, golden), golden["gradient"]) <= BLOCK
    assert np.abs(golden["gradient"]).max() > 0.1


def block_errors(component, params, arrays):
    """The error of each block where it reads what theirs read."""
    return [
        error(block(component, params, index)(arrays[f"state{index}"], *inputs(arrays)), arrays[f"state{index + 1}"])
        for index in range(component.config.layers)
    ]


def block_gradient(component, params, arrays):
    """The derivative of a fixed sum over the last block's output with respect to its input."""
    entry = jnp.asarray(arrays[f"state{component.config.layers - 1}"])
    weight = jnp.cos(jnp.arange(entry.size, dtype=jnp.float32)).reshape(entry.shape)
    last = block(component, params, component.config.layers - 1)
    return jax.grad(lambda entry: (last(entry, *inputs(arrays)) * weight).sum())(entry)


def block(component, params, index):
    """`(entry, *inputs) -> exit` of one block: a network that has no other, and whose embeddings are not looked at."""
    config = dataclasses.replace(component.config, layers=1)
    kind = T5Encoder if isinstance(config, T5EncoderConfig) else KINDS[component.name][1]

    class OneBlock(kind):
        def from_entry(self, entry, *given):
            only = self.layers[0]
            self.layers = [lambda _, *rest: only(entry, *rest)]
            return self.hidden_states(*given)[-1]

    _, apply = functional(lambda: OneBlock(config))
    alone = {**params, "layers": {0: params["layers"][index]}}
    return lambda entry, *given: apply(alone, entry, *given, method="from_entry")


def test_pixels_on_their_way_to_clip():
    golden = np.load(GOLDEN / "tiny_clip_vision" / "expected.npz")
    assert error(resize_antialiased(golden["pictures"], 14, 14), golden["resized"]) <= 1e-5
    assert error(normalize_pixels(golden["resized"]), golden["scaled"]) <= 1e-6
    assert error(clip_pixels(golden["pictures"], 14), golden["scaled"]) <= 1e-5
    np.testing.assert_array_equal(resize_matrix(9, 9), np.eye(9, dtype=np.float32))
    with pytest.raises(ValueError, match="a side of 1 pixels is too short"):
        resize_matrix(1, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_comes_back_bit_for_bit(tmp_path, name, dtype):
    theirs = load_file(GOLDEN / name / "model.safetensors")
    component, params = load(GOLDEN / name, dtype=dtype)
    assert all(str(leaf.dtype) == dtype for leaf in jax.tree.leaves(params)) and component.config.dtype == dtype
    save(tmp_path / "out", component, params, dtype)
    prefix = {"tiny_clip_text": "text_model."}.get(name, "")  # left out by newer versions where there is no projection
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == {prefix + key for key in theirs}
    for key, value in theirs.items():
        assert ours[prefix + key].tobytes() == value.astype(ours[prefix + key].dtype).tobytes(), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((GOLDEN / name / "config.json").read_text())
    same = config.keys() - {"projection_dim", "torch_dtype", "tie_word_embeddings"}
    assert {key: config[key] for key in same} == {key: before[key] for key in same}
    again, values = load(tmp_path / "out", dtype=dtype)
    assert again.config == component.config
    jax.tree.map(np.testing.assert_array_equal, values, params)


def test_keys_with_and_without_the_name_of_the_tower(tmp_path):
    for name, prefix in (("tiny_clip_text", "text_model."), ("tiny_clip_text_projection", "text_model.")):
        folder = copy(tmp_path, name)
        tensors = load_file(folder / "model.safetensors")
        bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
        full = {key if key == "text_projection.weight" else prefix + key: value for key, value in bare.items()}
        positions = {"text_model.embeddings.position_ids": np.arange(12)[None]}
        for variant in (bare, full, full | positions):
            save_file(variant, folder / "model.safetensors")
            jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(GOLDEN / name)[1])


def test_one_tower_out_of_both(tmp_path):
    text, image = (GOLDEN / name for name in ("tiny_clip_text_projection", "tiny_clip_vision"))
    tensors = [load_file(folder / "model.safetensors") for folder in (text, image)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (text, image)]
    save_file(tensors[0] | tensors[1] | {"logit_scale": np.ones((), np.float32)}, tmp_path / "model.safetensors")
    both = dict(model_type="clip", text_config=configs[0], vision_config=configs[1], projection_dim=16)
    (tmp_path / "config.json").write_text(json.dumps(both))
    for loader, folder in ((load_text_encoder, text), (load_image_encoder, image)):
        component, params = loader(tmp_path)
        alone, expected = loader(folder)
        assert component.config == alone.config
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_embedding_of_a_t5_under_either_name_and_beside_a_decoder(tmp_path):
    folder = copy(tmp_path, "tiny_t5")
    tensors = load_file(folder / "model.safetensors")
    shared = tensors.pop("shared.weight")
    names = ({"encoder.embed_tokens.weight": shared}, {"shared.weight": shared, "encoder.embed_tokens.weight": shared})
    for given in names:
        save_file(tensors | given | {"decoder.final_layer_norm.weight": shared}, folder / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(GOLDEN / "tiny_t5")[1])


def copy(tmp_path, name):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tensor_that_is_dropped_renamed_or_transposed_is_named(tmp_path, name):
    folder = copy(tmp_path, name)
    tensors = load_file(folder / "model.safetensors")

    def refused(changed, key):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert key in str(caught.value)

    for key, value in tensors.items():
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        refused(rest, f"missing {'text_model.' * (name == 'tiny_clip_text')}{key} {value.shape}")
        refused({**rest, key + "s": value}, f"unexpected {key}s")
        if value.ndim == 2 and value.shape[0] != value.shape[1]:
            turned = np.ascontiguousarray(value.T)
            refused({**rest, key: turned}, f"{key} is {turned.shape}, expected {value.shape}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny_clip_text", dict(hidden_act="silu"), r"config\.json: hidden_act 'silu' is not an activation"),
        ("tiny_clip_text", dict(model_type="xlm"), r"model_type 'xlm' is not a text encoder .*: clip_text_model, clip"),
        ("tiny_clip_text", dict(num_attention_heads=5), "num_attention_heads 5 does not divide hidden_size 24"),
        ("tiny_clip_text", dict(eos_token_id=[1, 2]), r"eos_token_id is \[1, 2\]"),
        ("tiny_clip_vision", dict(model_type="siglip"), "model_type 'siglip' is not an image encoder"),
        ("tiny_clip_vision", dict(patch_size=[7, 7]), r"patch_size is \[7, 7\]; only squares"),
        ("tiny_clip_vision", dict(patch_size=9), r"patch_size=9 does not divide image_size=28"),
        ("tiny_t5", dict(feed_forward_proj="gated-silu"), "feed_forward_proj 'gated-silu' is not known here"),
        ("tiny_bert", dict(num_hidden_layers=None), r"config\.json is not the config\.json of a BERT: it lacks"),
    ],
)
def test_other_architectures_are_refused(tmp_path, name, change, message):
    folder = copy(tmp_path, name)
    config = json.loads((folder / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_what_is_no_clip_is_not_written_as_one(tmp_path):
    component = make_component("text_encoder", {})
    with pytest.raises(ValueError, match="this text encoder is not a CLIP: it needs"):
        save_text_encoder(tmp_path, component, component.init(jax.random.key(0)))
    component = make_component("text_encoder", dict(norm="post"))
    with pytest.raises(ValueError, match="this text encoder is not a BERT: it needs"):
        save_text_encoder(tmp_path, component, component.init(jax.random.key(0)))
    assert not list(tmp_path.iterdir())


def test_published_sizes():
    """Numbers of parameters that the models' authors give, to their precision."""
    for name, config, millions in (
        ("text_encoder", TextEncoderConfig.clip_l14(), 123.06),
        ("text_encoder", TextEncoderConfig.openclip_h14(), 340.39),
        ("image_encoder", ImageEncoderConfig.openclip_h14(), 632.08),
    ):
        component = make_component(name, {})
        component = make_component(name, {**component.config_dict(), **vars(config)})
        assert abs(parameter_count(component.abstract) / 1e6 - millions) < 0.01
    assert flatten(load(GOLDEN / "tiny_t5")[1])["position_bias"].shape == (8, 3)


def test_a_t5_is_built_again_from_its_settings():
    """As a saved model does it; the part's name alone would make a CLIP."""
    component, _ = load_text_encoder(GOLDEN / "tiny_t5")
    assert make_component("text_encoder", json.loads(json.dumps(component.config_dict()))).config == component.config
    with pytest.raises(ValueError, match="architecture='t6' is unknown"):
        make_component("text_encoder", {"architecture": "t6"})
