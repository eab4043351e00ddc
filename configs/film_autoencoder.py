"""Autoencoder of the film model: 64x64 film frames to 16x16x12 latents.

    python benchmarks/fetch_film.py --out=runs/film64
    python train.py --config=configs/film_autoencoder.py --workdir=runs/film_autoencoder

Pairs of frames from the training shots; 0.64 M parameters. Any folder of clips does: --config.data.folder=my_clips.
Two to three steps of 16 frames a second on 2 CPU cores. docs/film.md tells what is measured and reached.
"""

from vdiff_jax.recipe import Recipe, default_recipe


def get_config() -> Recipe:
    config = default_recipe("autoencoder")
    config.model.autoencoder.update(
        channels=(32, 64), patch_size=2, linear_path=True, latent_channels=12, norm_groups=8, mid_attention=False
    )
    config.data.update(
        source="folder",
        folder="runs/film64",
        size=64,
        native_fps=8.0,
        num_frames=2,
        batch_size=8,
        strides=(4,),  # frames half a second apart: more variety than neighbours
        stride_weights=(1.0,),
    )
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0)
    config.train.update(num_steps=600, log_steps=50, checkpoint_steps=250, sample_steps=500, ema_decay=0.99)
    return config
