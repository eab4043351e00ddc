"""The autoencoder's representations and their arrows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.components import make_component
from vdiff_jax.models.autoencoder import (
    AutoencoderConfig,
    from_squares,
    latents_from_moments,
    pixel_weights,
    principal_components,
    raw_from_final,
    sample_moments,
)

SETTINGS = dict(channels=(8, 16, 16), norm_groups=4, latent_channels=3)


def random_autoencoder(**changes):
    component = make_component("autoencoder", {**SETTINGS, **changes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.2, component.abstract)
    return component, params


VIDEO = np.random.default_rng(1).uniform(-1, 1, size=(2, 3, 16, 8, 3)).astype(np.float32)


def test_shapes_and_frames_are_coded_alone():
    component, params = random_autoencoder()
    encode = jax.jit(lambda p, v: component.apply(p, v, method="encode_moments"))
    decode = jax.jit(lambda p, z: component.apply(p, z, method="decode"))
    moments = encode(params, VIDEO)
    assert component.config.factor == 4 and moments.shape == (2, 3, 4, 2, 6)
    np.testing.assert_allclose(encode(params, VIDEO[:, 1:2]), moments[:, 1:2], atol=1e-5)
    latents = latents_from_moments(moments, component.config)
    video = decode(params, latents)
    assert video.shape == VIDEO.shape and video.dtype == np.float32
    np.testing.assert_allclose(decode(params, latents[1:, 2:]), video[1:, 2:], atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2, "linear_path": True}])
def test_a_temporal_decoder_sees_all_frames_it_is_given(changes):
    component, params = random_autoencoder(decoder="temporal", use_post_quant_conv=False, **changes)
    assert not component.config.decodes_frames_alone and "post_quant_conv" not in params
    decode = jax.jit(lambda p, z: component.apply(p, z, method="decode"))
    latents = np.random.default_rng(2).normal(size=(2, 5, 2, 3, 3)).astype(np.float32)
    video = decode(params, latents)
    factor = component.config.factor
    assert video.shape == (2, 5, 2 * factor, 3 * factor, 3) and video.dtype == np.float32
    assert np.abs(decode(params, latents[:, 1:2]) - video[:, 1:2]).max() > 1e-2
    np.testing.assert_allclose(decode(params, latents[1:]), video[1:], atol=1e-5)  # clips do not see each other


def test_a_fresh_temporal_decoder_is_the_frames_decoder_but_for_its_last_convolution():
    """Temporal halves start as the identity, so an image autoencoder can be the start of a video one."""
    component = make_component("autoencoder", {**SETTINGS, "decoder": "temporal"})
    params = component.init(jax.random.key(0))
    frames, _ = random_autoencoder()
    middle_tap = np.zeros((3, 3, 3), np.float32)
    middle_tap[1] = np.eye(3)
    params["decoder"]["time_conv_out"] = {"kernel": middle_tap, "bias": np.zeros(3, np.float32)}
    latents = np.random.default_rng(2).normal(size=(1, 3, 2, 3, 3)).astype(np.float32)
    spatial = {**params, "decoder": {k: v for k, v in params["decoder"].items() if k not in ("mixed", "time_conv_out")}}
    spatial["decoder"]["mid"] = {k: v for k, v in params["decoder"]["mid"].items() if k != "mixed"}
    video = component.apply(params, latents, method="decode")
    np.testing.assert_allclose(video, frames.apply(spatial, latents, method="decode"), atol=1e-5)


def test_patches_are_squares_of_pixels():
    """One pixel moves one latent cell's square only as far as the receptive field, and sizes follow the factor."""
    component, params = random_autoencoder(channels=(8, 16), patch_size=4)
    assert component.config.factor == 8
    moments = component.apply(params, VIDEO, method="encode_moments")
    assert moments.shape == (2, 3, 2, 1, 6)
    assert component.apply(params, moments[..., :3], method="decode_raw").shape == VIDEO.shape
    # With every later layer silent, the decoder's bias is one pattern, repeated square by square.
    silent = jax.tree.map(np.zeros_like, params)
    silent["decoder"]["conv_out"]["bias"] = np.arange(48, dtype=np.float32)
    video = np.asarray(component.apply(silent, moments[..., :3], method="decode_raw"))
    square = np.arange(48).reshape(4, 4, 3)
    np.testing.assert_array_equal(video[0, 0], np.tile(square, (4, 2, 1)))


def test_a_fresh_linear_path_is_a_linear_map_of_squares():
    """At the start the convolutions are silent, so coding is linear and no square sees another."""
    component = make_component("autoencoder", {**SETTINGS, "linear_path": True})
    params = component.init(jax.random.key(0))
    apply = component.apply

    def code(video):
        return np.asarray(apply(params, apply(params, video, method="encode_moments")[..., :3], method="decode_raw"))

    double = code(VIDEO)
    np.testing.assert_allclose(code(2 * VIDEO), 2 * double, atol=1e-5)
    other = VIDEO.copy()
    other[:, :, :4, :4] = 0.3
    changed = np.abs(code(other) - double).max((0, 1, 4)) > 1e-5
    assert changed[:4, :4].any() and not changed[4:].any() and not changed[:, 4:].any()


def test_principal_components_code_as_well_as_any_linear_map_can():
    rng = np.random.default_rng(0)
    component = make_component("autoencoder", {**SETTINGS, "channels": (8,), "patch_size": 2, "linear_path": True})
    # Squares of 12 values that vary along 3 directions only, and a little noise.
    values = rng.normal(size=(40, 1, 4, 4, 3)) @ rng.normal(size=(3, 12)) * 0.2 + 0.3
    values += 0.01 * rng.normal(size=values.shape)
    video = np.asarray(from_squares(jax.numpy.asarray(values, jax.numpy.float32), 2))
    params = {**component.init(jax.random.key(0)), **principal_components([video[:20], video[20:]], component.config)}
    moments = np.asarray(component.apply(params, video, method="encode_moments"))
    raw = moments[..., :3].reshape(-1, 3)
    np.testing.assert_allclose(np.cov(raw.T), np.eye(3), atol=1e-3)
    output = np.asarray(component.apply(params, moments[..., :3], method="decode_raw"))
    flat = values.reshape(-1, 12)
    left = np.linalg.svd(flat - flat.mean(0), compute_uv=False)[3:]  # what no 3 directions can hold
    np.testing.assert_allclose(np.square(output - video).sum(), np.square(left).sum(), rtol=0.02)


def test_statistics_standardise_and_come_back():
    component, params = random_autoencoder()
    moments = np.asarray(component.apply(params, VIDEO, method="encode_moments"))
    raw = np.asarray(sample_moments(moments))
    flat = raw.reshape(-1, 3)
    config = AutoencoderConfig(
        **SETTINGS, latent_mean=tuple(map(float, flat.mean(0))), latent_std=tuple(map(float, flat.std(0)))
    )
    final = np.asarray(latents_from_moments(moments, config))
    np.testing.assert_allclose(final.reshape(-1, 3).mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(final.reshape(-1, 3).std(0), 1, atol=1e-3)
    np.testing.assert_allclose(raw_from_final(final, config), raw, atol=1e-5)


def test_pixel_weights_are_the_squared_lengths_of_a_linear_decoder():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 12)).astype(np.float32) * np.array([[3.0], [1.0], [0.2]], np.float32)
    latents = rng.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    lengths = np.square(matrix).sum(1)
    weights = np.asarray(pixel_weights(lambda z: z @ matrix, latents))
    np.testing.assert_allclose(weights, lengths / lengths.mean(), rtol=1e-5)
    bent = np.asarray(pixel_weights(lambda z: jnp.sin(z[..., :1]) + 0 * z, latents))
    np.testing.assert_allclose(bent, [3.0, 0.0, 0.0], atol=1e-6)


def test_posterior_samples_have_the_stated_spread():
    moments = np.concatenate([np.full((1, 1, 1, 1, 2), 0.5), np.full((1, 1, 1, 1, 2), 2 * np.log(0.1))], -1)
    noise = np.random.default_rng(0).normal(size=(20000, 1, 1, 1, 2)).astype(np.float32)
    samples = np.asarray(sample_moments(moments.astype(np.float32), noise))
    assert samples.mean() == pytest.approx(0.5, abs=3e-3) and samples.std() == pytest.approx(0.1, rel=0.02)
    np.testing.assert_array_equal(sample_moments(moments.astype(np.float32)), moments[..., :2].astype(np.float32))


def test_log_variance_is_clamped():
    component, params = random_autoencoder()
    params = {**params, "quant_conv": jax.tree.map(lambda a: a * 1e4, params["quant_conv"])}
    logvar = np.asarray(component.apply(params, VIDEO, method="encode_moments"))[..., 3:]
    assert logvar.min() == -30 and logvar.max() == 20


def test_bad_sizes_are_refused():
    component, params = random_autoencoder()
    with pytest.raises(ValueError, match="15x8, but this autoencoder needs multiples of 4"):
        component.apply(params, VIDEO[:, :, :15], method="encode_moments")
    with pytest.raises(ValueError, match="latent_mean has 2 values for 3"):
        AutoencoderConfig(**SETTINGS, latent_mean=(0.0, 0.0))
    with pytest.raises(ValueError, match="decoder='video' is unknown: use one of frames, temporal"):
        AutoencoderConfig(**SETTINGS, decoder="video")
