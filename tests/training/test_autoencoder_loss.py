"""The autoencoder's loss terms against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.training.autoencoder_loss import AutoencoderLossConfig, make_autoencoder_loss

RNG = np.random.default_rng(0)
VIDEO = RNG.uniform(-1, 1, size=(2, 3, 8, 6, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 2)
OFF = AutoencoderLossConfig(l1_weight=0.0, edge_weight=0.0, kl_weight=0.0)


def measure(config, *, mean=0.0, std=1.0, output=None):
    shape = (2, 3, 4, 3, 2)

    def encode(params, video):
        return jnp.concatenate([jnp.full(shape, mean), jnp.full(shape, 2 * np.log(std))], axis=-1)

    def decode(params, raw):
        return output(raw) if output else jnp.asarray(VIDEO)

    loss_fn = make_autoencoder_loss(encode, decode, config)
    return jax.tree.map(np.asarray, jax.jit(loss_fn)({}, {"video": VIDEO}, KEYS))


def test_psnr_and_l1_of_a_constant_error():
    loss, metrics = measure(OFF, output=lambda raw: VIDEO + 0.2)
    np.testing.assert_allclose([loss, metrics["mse"]], 0.04, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 20.0, rtol=1e-4)  # 0.2 of a range of 2
    with_l1, _ = measure(AutoencoderLossConfig(0.5, 0.0, 0.0), output=lambda raw: VIDEO + 0.2)
    np.testing.assert_allclose(with_l1, 0.04 + 0.5 * 0.2, rtol=1e-4)
    with_edges, _ = measure(AutoencoderLossConfig(0.0, 1.0, 0.0), output=lambda raw: VIDEO + 0.2)
    np.testing.assert_allclose(with_edges, 0.04, rtol=1e-3)  # a constant has no edges


def test_edges_of_a_ramp():
    """An error that rises by 0.1 per row and 0.01 per column has exactly those edges."""
    ramp = 0.1 * np.arange(8)[:, None, None] + 0.01 * np.arange(6)[None, :, None]
    plain, metrics = measure(OFF, output=lambda raw: VIDEO + ramp)
    loss, _ = measure(AutoencoderLossConfig(0.0, 3.0, 0.0), output=lambda raw: VIDEO + ramp)
    np.testing.assert_allclose(loss - plain, 3.0 * 0.11, rtol=1e-3)
    np.testing.assert_allclose(metrics["mse"], np.mean(ramp**2), rtol=1e-4)


def test_kl_of_a_gaussian():
    mean, std = 0.7, 0.3
    loss, metrics = measure(AutoencoderLossConfig(0.0, 0.0, 2.0), mean=mean, std=std)
    one = np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5
    expected = one * (3 * 4 * 3 * 2) / (3 * 8 * 6 * 3)  # per value of the clip
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, 2.0 * expected, rtol=1e-4)
    assert abs(measure(OFF)[1]["kl"]) < 1e-7


def test_latents_are_drawn_from_the_posterior_with_a_key_per_sample():
    seen = {}

    def output(raw):
        seen["raw"] = raw
        return jnp.asarray(VIDEO)

    def draw(keys):
        def encode(params, video):
            shape = (2, 25, 20, 20, 2)
            return jnp.concatenate([jnp.full(shape, 0.7), jnp.full(shape, 2 * np.log(0.3))], axis=-1)

        make_autoencoder_loss(encode, lambda params, raw: output(raw), OFF)({}, {"video": VIDEO}, keys)
        return seen["raw"]

    raw = np.asarray(jax.jit(draw)(KEYS))
    np.testing.assert_allclose(raw.mean(), 0.7, atol=0.01)
    np.testing.assert_allclose(raw.std(), 0.3, atol=0.01)
    assert np.abs(raw[0] - raw[1]).mean() > 0.1


def test_frames_that_fill_a_clip_up_do_not_count():
    """With the error in the last frame of each clip alone, the loss is 0 where that frame is filler."""
    valid = np.array([[True, True, False]] * 2)
    off = VIDEO + 0.3 * (np.arange(3) == 2)[None, :, None, None, None]

    def run(**marks):
        moments = jnp.concatenate([jnp.zeros((2, 3, 4, 3, 2)), jnp.full((2, 3, 4, 3, 2), -60.0)], axis=-1)
        loss_fn = make_autoencoder_loss(
            lambda params, video: moments, lambda params, raw: jnp.asarray(off), AutoencoderLossConfig(0.1, 0.1, 0.0)
        )
        return float(jax.jit(loss_fn)({}, {"video": VIDEO, **marks}, KEYS)[0])

    assert run(valid=valid) == 0.0
    np.testing.assert_allclose(run(), run(valid=np.ones_like(valid)), rtol=1e-6)
    np.testing.assert_allclose(run(), (0.3**2 + 0.1 * 0.3) / 3, rtol=1e-4)
