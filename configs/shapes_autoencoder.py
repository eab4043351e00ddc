"""Autoencoder of the bundled model: 32x32 moving shapes to 8x8x4 latents.

    python train.py --config=configs/shapes_autoencoder.py --workdir=runs/shapes_autoencoder

Clips are rendered on the fly, so no data is needed. About 18 minutes on 2 CPU cores for 1.5 M parameters.
"""

from vdiff_jax.recipe import Recipe, default_recipe


def get_config() -> Recipe:
    config = default_recipe("autoencoder")
    config.model.autoencoder.update(channels=(24, 48, 96), latent_channels=4, norm_groups=8)
    config.data.update(
        source="shapes",
        world="small",
        world_overrides=dict(sizes=("large",), speeds=("fast",)),
        size=32,
        world_frames=16,
        num_frames=2,
        batch_size=32,
        strides=(7,),
        stride_weights=(1.0,),
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, weight_decay=0.0)
    config.train.update(num_steps=1500, log_steps=25, checkpoint_steps=250, sample_steps=500, ema_decay=0.995)
    return config
