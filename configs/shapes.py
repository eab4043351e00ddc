"""The bundled model `shapes`: one captioned moving shape, 32x32 pixels, 8x8x4 latents.

    python train.py --config=configs/shapes_autoencoder.py --workdir=runs/shapes_autoencoder
    python train.py --config=configs/shapes.py --workdir=runs/shapes

Clips are rendered on the fly, so no data is needed. 8-frame windows with strides 1 and 2 of 16-frame clips: half the
cost of 16 frames. About an hour on 2 shared CPU cores. What it reaches is in docs/shapes.md.
"""

from vdiff_jax.recipe import Recipe, default_recipe


def get_config() -> Recipe:
    config = default_recipe("diffusion")
    config.model.autoencoder_from = "runs/shapes_autoencoder"
    config.model.text_encoder.update(features=64, hidden_features=128, layers=2, head_dim=32)
    config.model.unet.update(channels=(32, 96), attention=(False, True), blocks_per_level=1, embedding_features=192)
    config.data.update(
        source="shapes",
        world="small",
        world_overrides=dict(sizes=("large",), speeds=("fast",)),
        size=32,
        world_frames=16,
        num_frames=8,
        batch_size=32,
        strides=(1, 2),
        stride_weights=(0.5, 0.5),
        context_length=16,
    )
    # Where things are and which way they go shows through more noise than what they look like: go there often, and let
    # it count.
    config.diffusion.update(weighting="v", schedule_settings=dict(shift=-2.0))
    # The default, .3, costs words in so short a run; the second stage makes up for it (docs/shapes.md).
    config.diffusion.context_prompt_dropout = 0.1
    # More plain text-to-video than the default mixture: the budget of a CPU run is small.
    config.diffusion.mixture.update(text_to_video=0.50, known_frames=0.25, hole=0.10, ramp=0.05, independent=0.10)
    config.optimizer.update(learning_rate=1.5e-3, warmup_steps=200)
    config.train.update(
        num_steps=4000, log_steps=50, checkpoint_steps=500, sample_steps=1000, model_steps=500, ema_decay=0.999
    )
    config.sample.update(
        prompts=(
            "a red circle moving right on a black background",
            "a blue square moving down on a grey background",
            "a yellow triangle moving up-left on a dark background",
            "a green cross moving left on a grey background",
            "a cyan ring moving up-right on a black background",
            "a magenta square standing still on a dark background",
        ),
        num_frames=16,
        sampler="unipc",
        steps=20,
    )
    return config
