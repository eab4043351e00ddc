"""The text encoder: masks, order, causality, both norm placements, one vector a prompt."""

import jax
import numpy as np
import pytest

from vdiff_jax.components import make_component

SETTINGS = dict(vocab_size=20, context_length=8, features=8, hidden_features=16, layers=2, head_dim=4)
TOKENS = np.array([[1, 5, 6, 7, 2, 0], [1, 9, 2, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)


def random_encoder(**changes):
    component = make_component("text_encoder", {**SETTINGS, **changes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.5, component.abstract)
    return jax.jit(component.apply), params


@pytest.mark.parametrize("changes", [dict(), dict(causal=True), dict(norm="post", token_types=2)])
def test_padding_is_invisible_and_order_matters(changes):
    apply, params = random_encoder(**changes)
    out = np.asarray(apply(params, TOKENS, MASK))
    assert out.shape == (2, 6, 8)
    other = np.where(MASK, TOKENS, 13).astype(np.int32)
    np.testing.assert_allclose(np.asarray(apply(params, other, MASK))[MASK], out[MASK], atol=1e-5)
    swapped = TOKENS.copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    assert np.abs(np.asarray(apply(params, swapped, MASK))[0, 4] - out[0, 4]).max() > 1e-3


def test_causal_means_the_past_only():
    changed = TOKENS.copy()
    changed[0, 3] = 11
    for causal in (True, False):
        apply, params = random_encoder(causal=causal)
        before, after = (np.asarray(apply(params, tokens, MASK)) for tokens in (TOKENS, changed))
        difference = np.abs(before - after)[0, :3].max()
        assert (difference < 1e-6) == causal


def test_post_norm_output_is_normalised():
    apply, params = random_encoder(norm="post", token_types=2)
    params["layers"][1]["norm2"] = dict(scale=np.ones(8, np.float32), bias=np.zeros(8, np.float32))
    out = np.asarray(apply(params, TOKENS, MASK))
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-3)


def test_too_long_a_prompt_is_refused():
    apply, params = random_encoder()
    with pytest.raises(ValueError, match="9 tokens, the text encoder's context is 8"):
        apply(params, np.ones((1, 9), np.int32), np.ones((1, 9), bool))


def test_padding_can_be_attended_to():
    apply, params = random_encoder(attend_padding=True)
    out = np.asarray(apply(params, TOKENS, MASK))
    np.testing.assert_array_equal(np.asarray(apply(params, TOKENS, np.ones_like(MASK))), out)
    other = np.where(MASK, TOKENS, 13).astype(np.int32)
    assert np.abs(np.asarray(apply(params, other, MASK))[MASK] - out[MASK]).max() > 1e-3


def test_one_vector_a_prompt_is_the_state_of_its_end():
    tokens = np.array([[1, 5, 19, 7, 2, 2], [1, 19, 2, 2, 0, 0]], np.int32)
    _, params = random_encoder(projection=3)
    for settings, ends in ((dict(), [2, 1]), (dict(pooled_token=2), [4, 2])):  # the largest id, or the first 2
        component = make_component("text_encoder", {**SETTINGS, **settings, "projection": 3})
        pooled = component.apply(params, tokens, MASK, method="pooled")
        states = component.apply(params, tokens, MASK)
        expected = np.asarray(states)[[0, 1], ends] @ params["projection"]["kernel"]
        np.testing.assert_allclose(np.asarray(pooled), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype):
    apply, params = random_encoder()
    half, _ = random_encoder(dtype=dtype)
    out, near = (np.asarray(f(params, TOKENS, MASK)) for f in (apply, half))
    assert near.dtype == np.float32 and 0 < np.abs(near - out).max() < 0.1


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"text_encoder\.activation='silu': choose one of gelu, gelu_tanh"):
        make_component("text_encoder", dict(activation="silu"))
    with pytest.raises(ValueError, match=r"text_encoder\.norm='middle': choose pre or post"):
        make_component("text_encoder", dict(norm="middle"))
