"""The encoder of T5: masks, relative positions, half precision without overflow."""

import dataclasses

import jax
import numpy as np
import pytest

from vdiff_jax.models.functional import functional
from vdiff_jax.models.t5_encoder import T5Encoder, T5EncoderConfig, relative_buckets

CONFIG = T5EncoderConfig(vocab_size=20, features=8, hidden_features=16, layers=2, heads=3, head_dim=4)
TOKENS = np.array([[5, 6, 7, 8, 1, 0], [9, 1, 0, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], bool)


def random_encoder(scale=0.5, **changes):
    init, apply = functional(lambda: T5Encoder(dataclasses.replace(CONFIG, **changes)))
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * scale, abstract)
    return jax.jit(apply), params


@pytest.mark.parametrize("gated", [True, False])
def test_padding_is_invisible_and_order_matters(gated):
    apply, params = random_encoder(gated=gated, activation="gelu_tanh" if gated else "relu")
    assert ("gate" in params["layers"][0]) == gated
    out = np.asarray(apply(params, TOKENS, MASK))
    assert out.shape == (2, 6, 8) and out.dtype == np.float32
    other = np.where(MASK, TOKENS, 13).astype(np.int32)
    np.testing.assert_allclose(np.asarray(apply(params, other, MASK))[MASK], out[MASK], atol=1e-5)
    swapped = TOKENS.copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    assert np.abs(np.asarray(apply(params, swapped, MASK))[0, 4] - out[0, 4]).max() > 1e-3


def test_positions_are_relative():
    apply, params = random_encoder()
    out = np.asarray(apply(params, TOKENS[:1, :5], MASK[:1, :5]))
    shifted = np.concatenate([np.zeros((1, 3), np.int32), TOKENS[:1, :5]], axis=1)
    mask = np.arange(8)[None] >= 3
    np.testing.assert_allclose(np.asarray(apply(params, shifted, mask))[:, 3:], out, atol=1e-5)


def test_buckets_by_hand():
    rows = relative_buckets(9, 8, 6)  # two sides of 4 rows: distances 0, 1, then 2-3 and beyond
    assert rows[0].tolist() == [0, 5, 6, 6, 7, 7, 7, 7, 7]
    assert rows[8].tolist() == [3, 3, 3, 3, 3, 2, 2, 1, 0]


def test_a_sum_beyond_float16_is_kept():
    apply, params = random_encoder()
    half, _ = random_encoder(dtype="float16")
    params["token_embedding"] = params["token_embedding"] * 1e6  # the norms bring it back for the layers
    out, near = (np.asarray(f(params, TOKENS, MASK)) for f in (apply, half))
    assert np.isfinite(near).all() and np.abs(near - out).max() < 0.05
