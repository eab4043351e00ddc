"""Rule tables: renaming, transposing, dropping, and refusing what does not match."""

import jax
import numpy as np
import pytest

from vdiff_jax.interop.weights import convert_tensors

RULES = (
    (r"layer\.(\d+)\.weight", r"layers.\1.kernel", "dense"),
    (r"layer\.(\d+)\.bias", r"layers.\1.bias", "same"),
    (r"pooler\..*", None, "same"),
)
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(size=(2, 3)).astype(np.float32), RNG.normal(size=2).astype(np.float32)
TENSORS = {"layer.0.weight": WEIGHT, "layer.0.bias": BIAS, "pooler.weight": WEIGHT}
ABSTRACT = {
    "layers": {0: {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32), "bias": jax.ShapeDtypeStruct((2,), np.float32)}}
}


def test_tensors_are_renamed_transposed_and_dropped():
    params = convert_tensors(TENSORS, RULES, ABSTRACT, "here")
    assert jax.tree.structure(params) == jax.tree.structure(ABSTRACT)
    np.testing.assert_array_equal(params["layers"][0]["kernel"], WEIGHT.T)
    np.testing.assert_array_equal(params["layers"][0]["bias"], BIAS)


def test_half_precision_becomes_the_type_of_the_model():
    half = {name: value.astype(np.float16) for name, value in TENSORS.items()}
    assert convert_tensors(half, RULES, ABSTRACT, "here")["layers"][0]["bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": WEIGHT}, r"here has keys that no rule knows: head\.weight \(2, 3\)"),
        ({"layer.0.weights": WEIGHT}, r"no rule knows: layer\.0\.weights"),  # a rule matches whole keys only
        ({"layer.0.bias": None}, r"here does not fit the model: missing layers\.0\.bias \(2,\)"),
        ({"layer.1.bias": BIAS}, r"unexpected layers\.1\.bias \(2,\)"),
        ({"layer.0.weight": WEIGHT.T}, r"layers\.0\.kernel is \(2, 3\), expected \(3, 2\)"),
    ],
)
def test_what_does_not_match_is_named(change, message):
    tensors = {name: value for name, value in {**TENSORS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_tensors(tensors, RULES, ABSTRACT, "here")
