"""CLIP's image encoder: patches in order, the class token, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.components import make_component
from vdiff_jax.models.functional import functional
from vdiff_jax.models.image_encoder import PatchEmbedding
from vdiff_jax.models.layers import convolve

SETTINGS = dict(image_size=8, patch_size=4, features=8, hidden_features=12, layers=2, head_dim=4)
PIXELS = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)


def random_encoder(**changes):
    component = make_component("image_encoder", {**SETTINGS, **changes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.5, component.abstract)
    return component, params


def test_patches_are_a_strided_convolution():
    init, apply = functional(lambda: PatchEmbedding(3, 5, patch_size=4))
    params = init(jax.random.key(0))
    expected = convolve(jnp.asarray(PIXELS), params["kernel"], 4, (0, 0)).reshape(2, 4, 5)
    np.testing.assert_allclose(np.asarray(apply(params, PIXELS)), np.asarray(expected), atol=1e-5)


def test_the_embedding_sees_every_patch_and_its_place():
    component, params = random_encoder(projection=6)
    apply = jax.jit(component.apply)
    out = np.asarray(apply(params, PIXELS))
    assert out.shape == (2, 6) and out.dtype == np.float32
    for row, column in ((0, 0), (7, 0), (0, 7), (7, 7)):
        changed = PIXELS.copy()
        changed[:, row, column] += 2
        assert np.abs(np.asarray(apply(params, changed)) - out).max(1).min() > 1e-4
    assert np.abs(np.asarray(apply(params, PIXELS[:, ::-1])) - out).max() > 1e-3
    states = component.apply(params, PIXELS, method="last_states")
    assert states.shape == (2, 5, 8)


def test_without_a_projection_the_embedding_is_as_wide_as_the_states():
    component, params = random_encoder()
    params["post_norm"] = dict(scale=np.ones(8, np.float32), bias=np.zeros(8, np.float32))
    out = np.asarray(component.apply(params, PIXELS))
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
    assert "projection" not in params and out.shape == (2, 8)


def test_half_precision_stays_near():
    component, params = random_encoder(projection=6)
    half, _ = random_encoder(projection=6, dtype="bfloat16")
    out, near = (np.asarray(c.apply(params, PIXELS)) for c in (component, half))
    assert near.dtype == np.float32 and 0 < np.abs(near - out).max() < 0.2


def test_wrong_sizes_are_named():
    component, params = random_encoder()
    with pytest.raises(ValueError, match=r"pixels of the image encoder are \(8, 4, 3\), it takes 8 x 8 x 3: resize"):
        component.apply(params, PIXELS[:, :, :4])
    with pytest.raises(ValueError, match=r"image_encoder\.patch_size=3 does not divide image_size=8"):
        random_encoder(patch_size=3)
