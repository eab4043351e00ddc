"""Tensor files and json: strict, atomic, exact in float32."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdiff_jax.interop import pretrained

RNG = np.random.default_rng(0)
PARAMS = {"blocks": {0: {"kernel": RNG.normal(size=(3, 4)).astype(np.float32)}, 1: {"bias": np.ones(2, np.float32)}}}
ABSTRACT = jax.eval_shape(lambda: PARAMS)


def test_paths_and_values_come_back(tmp_path):
    pretrained.save_tensors(tmp_path / "a.safetensors", PARAMS)
    assert set(load_file(tmp_path / "a.safetensors")) == {"blocks.0.kernel", "blocks.1.bias"}
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_tensors(tmp_path / "a.safetensors", ABSTRACT), PARAMS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file is left


@pytest.mark.parametrize(("dtype", "precision"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_files_load_as_float32(tmp_path, dtype, precision):
    pretrained.save_tensors(tmp_path / "a.safetensors", PARAMS, dtype)
    loaded = pretrained.load_tensors(tmp_path / "a.safetensors", ABSTRACT)
    kernel = loaded["blocks"][0]["kernel"]
    assert kernel.dtype == np.float32 and str(load_file(tmp_path / "a.safetensors")["blocks.1.bias"].dtype) == dtype
    np.testing.assert_allclose(kernel, PARAMS["blocks"][0]["kernel"], rtol=precision)
    assert np.any(kernel != PARAMS["blocks"][0]["kernel"])


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path):
    flat = pretrained.flatten(PARAMS)
    flat["stray"] = flat.pop("blocks.1.bias")
    flat["blocks.0.kernel"] = np.zeros((4, 3), np.float32)
    save_file(flat, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit the model") as error:
        pretrained.load_tensors(tmp_path / "a.safetensors", ABSTRACT)
    for problem in (
        "missing blocks.1.bias (2,)",
        "unexpected stray (2,)",
        "blocks.0.kernel is (4, 3), expected (3, 4)",
    ):
        assert problem in str(error.value)


def test_unreadable_files_are_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors is missing"):
        pretrained.load_tensors(tmp_path / "a.safetensors", ABSTRACT)
    pretrained.save_tensors(tmp_path / "a.safetensors", PARAMS)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        pretrained.load_tensors(tmp_path / "a.safetensors", ABSTRACT)
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        pretrained.load_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid json"):
        pretrained.load_json(tmp_path / "config.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    pretrained.save_json(tmp_path / "config.json", {"b": [1, 2], "a": "x"})
    with pytest.raises(TypeError):
        pretrained.save_json(tmp_path / "config.json", {"a": {1, 2}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": "x", "b": [1, 2]}
    pretrained.save_tensors(tmp_path / "a.safetensors", PARAMS)
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(TypeError):
        pretrained.save_tensors(tmp_path / "a.safetensors", PARAMS, "float7")
    assert (tmp_path / "a.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
