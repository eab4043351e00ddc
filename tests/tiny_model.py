"""A complete model of toy size with random weights: what pipeline, script and parallel tests share."""

import functools

import jax
import numpy as np

from vdiff_jax.components import make_component
from vdiff_jax.data.tokenizer import train_tokenizer
from vdiff_jax.pipeline import Settings, VideoDiffusion

WORDS = "a red green blue circle square triangle moving left right up down on black grey background and".split()
AUTOENCODER = dict(
    channels=(8, 8), latent_channels=2, norm_groups=4, mid_attention=False, latent_mean=(0.2, -0.1), latent_std=(2, 3.0)
)
UNET = dict(latent_channels=2, channels=(8,), attention=(True,), embedding_features=16, head_dim=8)
TEXT = dict(context_length=8, features=8, hidden_features=16, layers=1, head_dim=8)
SETTINGS = Settings(size=16, fps=8.0, num_frames=3, steps=3, guidance_scale=2.0, context_length=8)


def random_params(component, seed: int, scale: float = 0.2):
    """Every leaf random, the zero-initialised ones too, so that no part of the network is silent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * scale, component.abstract)


@functools.cache
def tiny_model() -> VideoDiffusion:
    """16 x 16 pixels, 8 x 8 x 2 latents, 3 frames, prompts of up to 8 tokens."""
    tokenizer = train_tokenizer([" ".join(WORDS)])
    components = {
        "autoencoder": make_component("autoencoder", AUTOENCODER),
        "text_encoder": make_component("text_encoder", dict(TEXT, vocab_size=tokenizer.vocab_size)),
        "unet": make_component("unet", dict(UNET, text_features=TEXT["features"])),
    }
    params = {name: random_params(part, seed) for seed, (name, part) in enumerate(components.items())}
    return VideoDiffusion(components, jax.tree.map(jax.numpy.asarray, params), tokenizer, SETTINGS)
