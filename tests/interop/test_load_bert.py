"""A BERT saved by transformers gives the same hidden states here (golden file: tests/golden/make_text_golden.py)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdiff_jax.interop.transformers import load_bert

FOLDER = Path(__file__).parent.parent / "golden" / "tiny_bert"


def test_hidden_states_equal_those_of_transformers():
    component, params, tokenizer = load_bert(FOLDER)
    golden = np.load(FOLDER / "expected.npz")
    tokens, mask = tokenizer.encode(json.loads((FOLDER / "prompts.json").read_text()), 10)
    np.testing.assert_array_equal(mask, golden["mask"])
    np.testing.assert_array_equal(tokens, golden["tokens"])
    output = np.asarray(jax.jit(component.apply)(params, tokens, mask))
    np.testing.assert_allclose(output[mask], golden["output"][mask], atol=1e-5)
    assert np.abs(golden["output"][mask]).std() > 0.1


def copy(tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(FOLDER, folder)
    return folder


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path):
    folder = copy(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kernel = tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing encoder\.layer\.1\.output\.dense\.weight \(16, 24\)"):
        load_bert(folder)
    tensors |= {"encoder.layer.1.output.dense.weight": kernel, "lm_head.bias": kernel}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected lm_head\.bias"):
        load_bert(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no .*\.safetensors"):
        load_bert(folder)


def test_another_architecture_is_refused(tmp_path):
    folder = copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    with pytest.raises(ValueError, match="not a BERT with exact GELU"):
        load_bert(folder)
