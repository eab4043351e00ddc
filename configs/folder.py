"""Text to video from a folder of captioned clips of your own, 64x64 pixels.

    python train.py --config=configs/film_autoencoder.py --workdir=runs/mine_autoencoder --config.data.folder=my_clips
    python train.py --config=configs/folder.py --workdir=runs/mine --config.data.folder=my_clips \\
        --config.model.autoencoder_from=runs/mine_autoencoder --config.data.latent_cache=runs/mine_latents

How captions and splits are laid out is told in docs/data.md. The size must be the autoencoder's. A starting point for
some hundred clips on one GPU; on a CPU lower data.batch_size and take model.unet.channels=(32,64).
"""

from vdiff_jax.recipe import Recipe, default_recipe


def get_config() -> Recipe:
    config = default_recipe("diffusion")
    config.model.autoencoder_from = "runs/mine_autoencoder"
    config.model.text = "joint"
    config.model.unet.update(channels=(64, 128, 160), attention=(False, True, True), embedding_features=256)
    config.model.unet.update(nearest_known=True, linear_path=True)  # measured in docs/film.md
    config.data.update(
        source="folder",
        size=64,
        native_fps=8.0,
        num_frames=8,
        batch_size=32,
        strides=(1, 2),
        stride_weights=(0.7, 0.3),
        context_length=32,
    )
    config.optimizer.update(learning_rate=5e-4, warmup_steps=500)
    config.train.update(num_steps=50_000, log_steps=50, checkpoint_steps=1000, sample_steps=2500, ema_decay=0.9995)
    config.sample.update(num_frames=16)
    return config
