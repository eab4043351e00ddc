"""Clips that are split over devices, and clips filled up to the length of their batch: no network notices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.seeded_weights import seeded_input
from golden.unet_cases import CASES, inputs
from tiny_model import random_params

from vdiff_jax import parallel
from vdiff_jax.components import make_component
from vdiff_jax.interop.unets import unet_settings
from vdiff_jax.latent_model import _decode_chunks
from vdiff_jax.models import frame_axis
from vdiff_jax.types import Conditioning

REAL, FILLED = 3, 4
SCALE = 0.3
"""Of the weights. With small ones attention over frames adds so little that nothing would be seen of it."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each network runs once: what compiles soonest is best."""
NATIVE = dict(
    latent_channels=4, channels=(8, 16), attention=(False, True), text_features=24, embedding_features=16, head_dim=8,
    norm_groups=4, nearest_known=True, linear_path=True,
)  # fmt: skip
FAMILIES = ["native", *(family for family in CASES if family != "image")]


@functools.cache
def network(family):
    """(component, parameters, arguments of two clips of 4 frames of 4 x 6)."""
    settings = NATIVE if family == "native" else unet_settings(CASES[family])
    component = make_component("unet", settings)
    values = inputs(CASES["modelscope" if family == "native" else family], frames=FILLED)
    shape = values["z"].shape[:2]
    extra = {name: values[name] for name in ("image_latents", "image_embedding", "added") if name in values}
    cond = Conditioning(values["text"], None, np.tile(np.array([0, 1, 3, 5], np.float32), (2, 1)), **extra)
    if family == "native":
        level, mask = seeded_input("level", shape), (seeded_input("mask", (*shape, 4, 6, 1)) > 0.5)
        mask[:, FILLED - 1] = True  # what fills a clip up is not taken for something known
        arguments = [values["z"], 3.0 * level, mask.astype(np.float32), np.full(shape, 5.0, np.float32), cond]
    else:
        nothing = np.zeros((*shape, 4, 6, 1), np.float32), np.full(shape, 10.0, np.float32)
        arguments = [values["z"], np.full(shape, values["timestep"], np.float32), *nothing, cond]
    return component, random_params(component, 0, SCALE), arguments


def run(family, arguments, devices=1, data=1, scale=1.0):
    component, params, _ = network(family)
    params = jax.tree.map(lambda leaf: scale * leaf, params)
    with jax.set_mesh(parallel.make_mesh(data, 1, devices, devices=jax.devices()[: data * devices])):
        program = jax.jit(component.apply).lower(params, *arguments).compile(compiler_options=QUICK)
        return np.asarray(program(params, *arguments))


def cut(arguments, num_frames):
    """The first frames of everything that has frames."""
    *arrays, cond = arguments
    parts = {"times": cond.times[:, :num_frames]}
    if cond.image_latents is not None:
        parts["image_latents"] = cond.image_latents[:, :num_frames]
    return [*(array[:, :num_frames] for array in arrays), dataclasses.replace(cond, **parts)]


@functools.cache
def alone(family):
    """What the network makes of the first frames when there are no others."""
    return run(family, cut(network(family)[2], REAL))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_filled_up_and_split_over_devices_is_denoised_as_it_is(family):
    arguments = network(family)[2]
    expected = alone(family)
    valid = np.arange(FILLED)[None] < np.full((2, 1), REAL)
    filled = run(family, [*arguments[:-1], dataclasses.replace(arguments[-1], valid=valid)], devices=2)
    np.testing.assert_allclose(filled[:, :REAL], expected, atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["native", "svd"])
def test_frames_that_are_not_marked_as_filler_count(family):
    arguments, expected = network(family)[2], alone(family)
    assert np.abs(run(family, arguments)[:, :REAL] - expected).max() > 1e-3 * np.abs(expected).max()


def test_rows_that_see_each_other_are_not_split():
    """A clip and its style, whose tokens it attends to. With larger weights, so that one tells in the other."""
    *arrays, cond = network("native")[2]
    styled = [*arrays, dataclasses.replace(cond, style_weight=np.full(1, 3.0, np.float32))]
    expected = run("native", styled, scale=2.0)
    effect = np.abs(run("native", network("native")[2], scale=2.0) - expected)[0].max()
    assert effect > 1e-2
    np.testing.assert_allclose(run("native", styled, devices=2, data=2, scale=2.0), expected, atol=0.1 * effect)


def test_a_decoder_that_mixes_frames_decodes_a_split_clip_as_a_whole():
    settings = dict(channels=(8, 8), latent_channels=2, norm_groups=4, mid_attention=False, decoder="temporal")
    decoder = make_component("autoencoder", settings)
    params, latents = random_params(decoder, 0), seeded_input("latents", (1, FILLED, 4, 4, 2))
    expected = jax.jit(lambda x: decoder.apply(params, x, method="decode"))(latents)
    with jax.set_mesh(parallel.make_mesh(1, 1, 2, devices=jax.devices()[:2])):
        split = jax.jit(lambda x: decoder.apply(params, x, method="decode"))(latents)
        with pytest.raises(ValueError, match="3 frames are not a multiple of the 2 devices"):
            decoder.apply(params, latents[:, :3], method="decode")
    np.testing.assert_allclose(split, expected, atol=1e-5 * np.abs(expected).max())
    first = decoder.apply(params, latents[:, :1], method="decode")
    assert np.abs(first - expected[:, :1]).max() > 1e-3  # it does mix them


def test_chunks_of_a_split_clip_divide_over_its_devices():
    def decode(params, latents, method):
        assert method == "decode" and latents.shape[1] % 4 == 0
        return latents

    latents = jnp.arange(16.0).reshape(1, 16, 1, 1, 1)
    with jax.set_mesh(parallel.make_mesh(1, 1, 4, devices=jax.devices()[:4])):
        np.testing.assert_array_equal(_decode_chunks(decode, 14, {}, latents), latents)
        np.testing.assert_array_equal(_decode_chunks(decode, 5, {}, latents), latents)


def test_pixels_that_do_not_divide_come_back_in_place():
    x = jnp.arange(2 * 4 * 3 * 5 * 2, dtype=jnp.float32).reshape(2, 4, 3, 5, 2)

    def there_and_back(_, x):
        tokens = frame_axis.to_pixels(x)
        assert tokens.shape == (2 * 4, 4, 2)  # 15 pixels over 4 devices: 4 each, the last of them filler
        return frame_axis.to_frames(tokens + frame_axis.shards(), x)

    with jax.set_mesh(parallel.make_mesh(1, 1, 4, devices=jax.devices()[:4])):
        np.testing.assert_array_equal(jax.jit(parallel.split_clips(there_and_back))({}, x), x + 4)


def test_statistics_and_neighbours_leave_filler_out():
    x = jnp.arange(2 * 4 * 1 * 2 * 1, dtype=jnp.float32).reshape(2, 4, 1, 2, 1)
    valid = jnp.array([[True, True, True, False], [True, False, False, False]])
    np.testing.assert_allclose(frame_axis.clip_mean(x, valid).ravel(), [2.5, 8.5])
    near = frame_axis.with_neighbours(x, valid)[..., 0, 0, 0]
    np.testing.assert_array_equal(near, [[0, 0, 2, 4, 0, 0], [0, 8, 0, 0, 0, 0]])
