"""A new word for the bundled model `shapes`: "star", from 8 clips of a yellow star, as a low-rank update.

    python train.py --config=configs/shapes_lora.py --workdir=runs/shapes_lora
    python benchmarks/lora_report.py --lora=runs/shapes_lora --out=runs/shapes_lora/report.json

About 10 minutes on 2 CPU cores. What it reaches, and how the settings were chosen, is in docs/lora.md, which also says
how to learn from a folder of clips instead.
"""

from configs.shapes import get_config as base_recipe
from vdiff_jax.recipe import Recipe


def get_config() -> Recipe:
    config = base_recipe()
    config.model.autoencoder_from = "shapes"
    config.model.init_from = "shapes"
    # What is most like the new thing is forgotten first: four times as many yellow shapes as the world has.
    colours = ("red", "green", "blue", "magenta", "cyan") + 4 * ("yellow",)
    config.lora.prior.update(world_overrides=config.data.world_overrides.to_dict() | dict(colours=colours))
    config.data.world_overrides.update(shapes=("star",), colours=("yellow",), empty_rate=0.0)
    # Varied scenes: every axis of motion and every background, and a star at rest well inside the picture.
    config.data.update(num_scenes=8, scenes_seed=389)
    config.lora.update(rank=5, alpha=10.0, new_words=("star",), prior_share=0.625, shift=2)
    # How a prompt is read, and how shapes are drawn: without the convolutions the star stays a blob.
    config.lora.targets = (
        r"\.attn2\.to_(q|k|v|out)\.kernel$",
        r"\.embedding\.text\.kernel$",
        r"\.up\..*\.film\.kernel$",
        r"\.up\.[123]\.res\.conv[12]\.kernel$",
        r"\.(upsamplers\.0\.conv|conv_out)\.kernel$",
    )
    # Guidance multiplies what sets the prompt apart from the empty one. Unless the empty one follows the change, yellow
    # shapes flicker in colour; so it is trained more often, and the difference counts less than the base's three times.
    config.diffusion.update(prompt_dropout=0.3, context_prompt_dropout=0.3)
    config.diffusion.mixture.update(text_to_video=0.65, known_frames=0.20, hole=0.05, ramp=0.05, independent=0.05)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=30, weight_decay=0.0)
    config.train.update(
        num_steps=800, log_steps=20, checkpoint_steps=200, sample_steps=0, model_steps=200, ema_decay=0.99
    )
    config.sample.update(prompts=(), guidance_scale=2.0)
    return config
