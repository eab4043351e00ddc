"""What a stage measures on its data, against finite differences and plain statistics."""

import jax
import numpy as np

from vdiff_jax.measures import channel_weights, latent_statistics
from vdiff_jax.pipeline import load
from vdiff_jax.recipe import DataConfig
from vdiff_jax.streams import make_stream

DATA = DataConfig(world="small", size=16, world_frames=4, num_frames=2, batch_size=8, strides=(1,), stride_weights=(1,))


def test_channels_count_by_how_far_the_pixels_move(model_folder):
    model, stream = load(model_folder), make_stream(DATA, seed=0, tokenizer=None)
    coder, params = model.components["autoencoder"], model.params["autoencoder"]
    weights = np.asarray(channel_weights("pixels", coder, params, stream))
    latents = np.asarray(model.encode(stream.device_batch(0)["video"][:4]))
    decode = jax.jit(lambda latents: coder.apply(params, latents, method="decode"))
    rng, base, moved = np.random.default_rng(0), np.asarray(decode(latents)), []
    for channel in range(latents.shape[-1]):
        draws = []
        for _ in range(4):
            nudged = latents.copy()
            nudged[..., channel] += 1e-2 * rng.normal(size=nudged.shape[:-1])
            draws.append(np.square(np.asarray(decode(nudged)) - base).mean())
        moved.append(np.mean(draws))
    np.testing.assert_allclose(weights, moved / np.mean(moved), rtol=0.2)
    assert weights.max() > 1.5 * weights.min()  # else the test could not tell
    assert channel_weights("equal", coder, params, stream) is None


def test_statistics_are_those_of_all_batches_together():
    stream = make_stream(DATA, seed=0, tokenizer=None)
    mean, std = latent_statistics(lambda video: 2.0 * video + 1.0, stream, batches=3)
    every = (
        2.0 * np.concatenate([np.asarray(stream.device_batch(step)["video"], np.float64) for step in range(3)]) + 1.0
    )
    np.testing.assert_allclose(mean, every.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, every.std((0, 1, 2, 3)), rtol=1e-5)
