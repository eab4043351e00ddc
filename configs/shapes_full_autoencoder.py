"""Autoencoder of the full shapes world: 64x64 frames to 8x8x8 latents, about 4 M parameters, bf16.

    python train.py --config=configs/shapes_full_autoencoder.py --workdir=runs/shapes_full_autoencoder

Clips are rendered on the fly, so no data is needed. Sized for about 5 minutes on one data-centre GPU; it has not been
trained yet. `benchmarks/gpu_queue.py` runs it first.
"""

from ml_collections import ConfigDict

from vdiff_jax.recipe import default_recipe


def get_config() -> ConfigDict:
    config = default_recipe("autoencoder")
    config.model.autoencoder.update(channels=(32, 64, 128, 128), latent_channels=8, norm_groups=8, dtype="bfloat16")
    config.data.update(
        source="shapes",
        world="full",
        size=64,
        world_frames=16,
        num_frames=2,
        batch_size=128,
        strides=(7,),
        stride_weights=(1.0,),
    )
    config.optimizer.update(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0)
    config.train.update(num_steps=4000, log_steps=100, checkpoint_steps=1000, sample_steps=0, ema_decay=0.998)
    return config
