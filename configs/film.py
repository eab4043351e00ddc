"""Unconditional model of film shots, 64x64 pixels, trained mostly to continue what it is shown.

    python benchmarks/fetch_film.py --out=runs/film64
    python train.py --config=configs/film_autoencoder.py --workdir=runs/film_autoencoder
    python train.py --config=configs/film.py --workdir=runs/film
    python benchmarks/film_report.py --model=runs/film

Windows of 8 frames at 8 frames a second. The clips are encoded once, into runs/film_latents; 1.25 M parameters.
docs/film.md tells what is measured and reached.
"""

from vdiff_jax.recipe import Recipe, default_recipe


def get_config() -> Recipe:
    config = default_recipe("diffusion")
    config.model.autoencoder_from = "runs/film_autoencoder"
    config.model.text = "none"
    config.model.unet.update(channels=(32, 64), attention=(False, True), blocks_per_level=1, embedding_features=128)
    config.model.unet.update(nearest_known=True, linear_path=True)  # a shot goes on mostly as it was
    config.data.update(
        source="folder",
        folder="runs/film64",
        latent_cache="runs/film_latents",
        size=64,
        native_fps=8.0,
        num_frames=8,
        batch_size=8,
        strides=(1,),
        stride_weights=(1.0,),
    )
    # Prediction is what a model of one film can be measured by, so most clips show a prefix.
    config.diffusion.mixture.update(
        text_to_video=0.10,
        known_frames=0.90,
        hole=0.0,
        ramp=0.0,
        independent=0.0,
        prefix=1.0,
        both_ends=0.0,
        first_only=0.0,
        every_nth=0.0,
        random_frames=0.0,
        suffix=0.0,
        anchor=0.0,
        clean_context=0.8,
    )
    # The noisiest levels decide how the shot goes on: go there often, and let it count.
    config.diffusion.update(weighting="v", schedule_settings=dict(shift=-2.0))
    # The first principal component of the autoencoder moves the pixels 16 times as far as the last one.
    config.diffusion.channel_weighting = "pixels"
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.train.update(
        num_steps=2000, log_steps=50, checkpoint_steps=500, sample_steps=0, model_steps=500, ema_decay=0.995
    )
    config.sample.update(prompts=("",) * 4, num_frames=8)
    return config
