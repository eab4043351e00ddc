"""Layers against independent references (scipy, direct formulas)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import signal

from vdiff_jax.models import attention as attention_module
from vdiff_jax.models import layers
from vdiff_jax.models.functional import functional, parameter_count

RNG = np.random.default_rng(0)


def build(make):
    """(apply, random numpy params) of a module."""
    init, apply = functional(make)
    abstract = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return apply, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.3, abstract)


def test_init_gives_each_parameter_its_own_scale():
    init, _ = functional(lambda: layers.Dense(400, 300))
    params = init(jax.random.key(0))
    assert np.std(params["kernel"]) == pytest.approx(1 / 20, rel=0.02)
    assert not params["bias"].any()
    init, _ = functional(lambda: layers.FrameConv(16, 200))
    kernels = [np.asarray(init(jax.random.key(seed))["kernel"]) for seed in (0, 1)]
    assert np.std(kernels[0]) == pytest.approx(1 / np.sqrt(16 * 9), rel=0.02)
    assert not np.allclose(*kernels)


def test_params_are_a_plain_dict_with_attribute_paths():
    class Block(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([layers.Dense(2, 3), layers.Dense(3, 2)])

    init, _ = functional(Block)
    params = init(jax.random.key(0))
    assert type(params) is dict and params["layers"][0]["kernel"].shape == (2, 3)
    assert parameter_count(params) == 2 * 3 + 3 + 3 * 2 + 2


@pytest.mark.parametrize("stride, padding", [(1, None), (2, (1, 1)), (2, (0, 1))])
def test_frame_conv_is_a_correlation_of_every_frame(stride, padding):
    apply, params = build(lambda: layers.FrameConv(2, 3, stride=stride, padding=padding))
    x = RNG.normal(size=(2, 3, 6, 8, 2)).astype(np.float32)
    before, after = padding or (1, 1)
    padded = np.pad(x, ((0, 0), (0, 0), (before, after), (before, after), (0, 0)))
    expected = np.stack(
        [
            sum(
                np.stack(
                    [
                        [
                            signal.correlate2d(padded[b, f, :, :, i], params["kernel"][:, :, i, o], "valid")
                            for f in range(3)
                        ]
                        for b in range(2)
                    ]
                )
                for i in range(2)
            )
            for o in range(3)
        ],
        axis=-1,
    )
    expected = expected[:, :, ::stride, ::stride] + params["bias"]
    np.testing.assert_allclose(apply(params, x), expected, atol=2e-5)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 1), (2, 4)])
def test_convolution_of_frames_smaller_than_the_kernel(height, width):
    x = RNG.normal(size=(3, height, width, 5)).astype(np.float32)
    kernel = RNG.normal(size=(3, 3, 5, 4)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = np.einsum("nhwiyz,yzio->nhwo", windows, kernel)
    np.testing.assert_allclose(layers.convolve(x, kernel, 1, (1, 1)), expected, atol=2e-5)


def test_temporal_conv_is_a_correlation_over_frames():
    apply, params = build(lambda: layers.TemporalConv(2, 3))
    x = RNG.normal(size=(1, 5, 2, 2, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    expected = sum(np.einsum("bfhwi,io->bfhwo", padded[:, k : k + 5], params["kernel"][k]) for k in range(3))
    np.testing.assert_allclose(apply(params, x), expected + params["bias"], atol=1e-5)


@pytest.mark.parametrize("scope, axes", [("frame", (2, 3, 5)), ("video", (1, 2, 3, 5))])
def test_group_norm_scopes(scope, axes):
    apply, params = build(lambda: layers.GroupNorm(6, groups=3, scope=scope, epsilon=1e-5))
    x = RNG.normal(1.0, 2.0, size=(2, 3, 4, 4, 6)).astype(np.float32)
    grouped = x.astype(np.float64).reshape(2, 3, 4, 4, 3, 2)
    normed = (grouped - grouped.mean(axes, keepdims=True)) / np.sqrt(grouped.var(axes, keepdims=True) + 1e-5)
    expected = normed.reshape(x.shape) * params["scale"] + params["bias"]
    np.testing.assert_allclose(apply(params, x), expected, atol=2e-5)
    scale, shift = RNG.normal(size=(2, 2, 3, 6)).astype(np.float32)
    modulated = expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    np.testing.assert_allclose(apply(params, x, scale, shift), modulated, atol=1e-4)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="norm_groups=4 does not divide 6"):
        layers.GroupNorm(6, groups=4, scope="frame", epsilon=1e-5)


def test_layer_norm():
    apply, params = build(lambda: layers.LayerNorm(8, epsilon=1e-5))
    x = RNG.normal(3.0, 2.0, size=(2, 5, 8)).astype(np.float32)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(apply(params, x), normed * params["scale"] + params["bias"], atol=1e-5)


def test_attention_implementations_agree_and_match_the_formula():
    q, k, v = (RNG.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
    mask = np.array([[True] * 7, [True] * 4 + [False] * 3])[:, None, None, :]
    logits = np.einsum("bnkd,bmkd->bknm", q, k) / 2.0
    weights = np.where(mask, np.exp(logits), 0.0)
    expected = np.einsum("bknm,bmkd->bnkd", weights / weights.sum(-1, keepdims=True), v)
    for implementation in ("einsum", "xla", "auto"):
        out = attention_module.dot_product_attention(q, k, v, mask, implementation)
        np.testing.assert_allclose(out, expected, atol=2e-6)
    with pytest.raises(ValueError, match="'flash' is unknown"):
        attention_module.dot_product_attention(q, k, v, implementation="flash")


def test_rotary_attention_sees_time_differences_only():
    q, k = (jnp.asarray(RNG.normal(size=(1, 6, 1, 8)), jnp.float32) for _ in range(2))
    position = jnp.asarray(RNG.uniform(0, 20, size=(1, 6)), jnp.float32)

    def logits(shift):
        turned = [attention_module.rotary_embedding(x, position + shift) for x in (q, k)]
        return jnp.einsum("bnkd,bmkd->nm", *turned)

    np.testing.assert_allclose(logits(0.0), logits(13.5), atol=1e-4)
    assert np.abs(logits(0.0) - jnp.einsum("bnkd,bmkd->nm", q, k)).max() > 0.1
    norms = [np.linalg.norm(x, axis=-1) for x in (q, attention_module.rotary_embedding(q, position))]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_sinusoidal_embedding_tells_positions_apart():
    embedding = np.asarray(layers.sinusoidal_embedding(jnp.arange(0, 1000, 7.0), 32))
    for i, j in itertools.combinations(range(0, len(embedding), 13), 2):
        assert np.abs(embedding[i] - embedding[j]).max() > 0.05
    np.testing.assert_allclose(np.square(embedding).sum(-1), 16.0, rtol=1e-5)


def test_coordinates_are_token_centres_at_any_resolution():
    for height, width in ((4, 8), (16, 2)):
        where = np.asarray(layers.coordinate_embedding(height, width))
        assert where.shape == (height, width, layers.COORDINATE_FEATURES)
        edges = np.linspace(-1, 1, width + 1)
        np.testing.assert_allclose(where[0, :, 1], (edges[:-1] + edges[1:]) / 2, atol=1e-6)
        np.testing.assert_allclose(where[..., 0], -where[::-1, :, 0], atol=1e-6)
        np.testing.assert_allclose(where[..., 5], np.sin(np.pi * where[..., 1] / 2), atol=1e-6)
    fine, coarse = layers.coordinate_embedding(8, 8), layers.coordinate_embedding(4, 4)
    np.testing.assert_allclose(fine[..., :2].reshape(4, 2, 4, 2, 2).mean((1, 3)), coarse[..., :2], atol=1e-6)


def test_attention_of_logits_beyond_half_precision_is_finite():
    """Products of queries and keys are summed in float32, before they are scaled."""
    query = jnp.full((1, 2, 1, 64), 40.0, jnp.float16)
    key = query * jnp.array([1.0, 0.5], jnp.float16)[None, :, None, None]
    value = jnp.arange(128, dtype=jnp.float16).reshape(1, 2, 1, 64)
    out = attention_module.dot_product_attention(query, key, value, implementation="einsum")
    np.testing.assert_array_equal(out[:, 0], value[:, 0])
