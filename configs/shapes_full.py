"""The model `shapes` of the full world: up to two objects, every motion, weather and camera, 64x64, 16 frames.

    python train.py --config=configs/shapes_full_autoencoder.py --workdir=runs/shapes_full_autoencoder
    python train.py --config=configs/shapes_full.py --workdir=runs/shapes_full

About 7 M parameters in bf16 on 8x8x8 latents, so that the saved file stays under 16 MB in fp16. Sized for 10 minutes
on one data-centre GPU (`benchmarks/gpu_queue.py` measures the pace there and sets train.num_steps to fit); it has not
been trained yet.
"""

from ml_collections import ConfigDict

from vdiff_jax.recipe import default_recipe


def get_config() -> ConfigDict:
    config = default_recipe("diffusion")
    config.model.autoencoder_from = "runs/shapes_full_autoencoder"
    config.model.text_encoder.update(features=128, hidden_features=256, layers=3, head_dim=32)
    config.model.unet.update(
        channels=(96, 128), attention=(True, True), blocks_per_level=1, embedding_features=256, dtype="bfloat16"
    )
    config.data.update(
        source="shapes",
        world="full",
        size=64,
        world_frames=16,
        num_frames=16,
        batch_size=256,
        strides=(1, 2),
        stride_weights=(0.85, 0.15),
        context_length=40,
    )
    # As in configs/shapes.py, moved further: twice the frames show the same thing through still more noise.
    config.diffusion.update(weighting="v", schedule_settings=dict(shift=-2.5))
    config.optimizer.update(learning_rate=1e-3, warmup_steps=300)
    config.train.update(num_steps=8000, log_steps=100, checkpoint_steps=1000, sample_steps=0, ema_decay=0.999)
    config.sample.update(
        prompts=(
            "a small red circle moving right slowly on a black background",
            "a large blue square spinning on a grey textured background in the snow",
            "a small cyan triangle bouncing down-left and a small yellow ring standing still on a dark background",
            "a large magenta cross growing on a black background at night",
        ),
        num_frames=16,
    )
    return config
