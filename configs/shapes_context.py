"""Second stage of the bundled model `shapes`: more clips of which something is known, half of them without words.

    python train.py --config=configs/shapes.py --workdir=runs/shapes
    python train.py --config=configs/shapes_context.py --workdir=runs/shapes_context

Starts from the weights of the first stage, which hears its prompts but was seldom asked to go on without one. It took
43 minutes on 2 shared CPU cores. What it reaches is in docs/shapes.md.
"""

from configs.shapes import get_config as first_stage
from vdiff_jax.recipe import Recipe


def get_config() -> Recipe:
    config = first_stage()
    config.model.init_from = "runs/shapes"
    config.diffusion.context_prompt_dropout = 0.5
    config.diffusion.mixture.update(text_to_video=0.35, known_frames=0.40)
    config.optimizer.update(learning_rate=7e-4, warmup_steps=100)
    config.train.update(num_steps=1500, sample_steps=0)
    return config
