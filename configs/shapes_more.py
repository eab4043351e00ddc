"""Goes on from the model of `configs/shapes.py`: the same world, with most of the training at high noise.

    python train.py --config=configs/shapes_more.py --workdir=runs/shapes_more --config.model.init_from=runs/shapes

A clip of one object is so redundant that its direction can be seen down to a log-SNR of about -5. The plain cosine
schedule spends 5 % of its samples below that, where the prompt decides, and the sigmoid weighting of the noise error
hardly counts them. A shifted schedule and the weighting of the v error make the prompt matter.
"""

from configs.shapes import get_config as base_config
from vdiff_jax.recipe import Recipe


def get_config() -> Recipe:
    config = base_config()
    config.model.init_from = "runs/shapes"
    config.diffusion.schedule_settings = dict(shift=-2.0)
    config.diffusion.weighting = "v"
    config.diffusion.mixture.update(text_to_video=0.60, known_frames=0.20, hole=0.05, ramp=0.05, independent=0.10)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=50)
    config.train.update(num_steps=550, checkpoint_steps=150, ema_decay=0.995, sample_steps=0)
    return config
