"""Fine-tune a public video model, or make a video model of a public image model, on a folder of captioned clips.

    python train.py --config=configs/finetune.py --workdir=runs/tuned --config.data.folder=my_clips \\
        --config.init_from=damo-vilab/text-to-video-ms-1.7b

init_from is a pipeline folder of diffusers, or the name of one on the hub: ModelScope and ZeroScope, AnimateDiff,
Stable Diffusion (which gets motion modules), Stable Video Diffusion. It gives everything that is left open here;
docs/finetune.md says what. With --config.lora.rank=16 only a small update is trained. All of a network of 1.4 B takes
28 GB for weights, optimizer, gradients and EMA alone, so one GPU of 80 GB, or several with --config.parallel.fsdp=8;
the motion modules of AnimateDiff (.45 B), or an update, need a third of it.
"""

from vdiff_jax.recipe import Recipe, finetune_recipe


def get_config() -> Recipe:
    config = finetune_recipe()
    config.model.init_from = "damo-vilab/text-to-video-ms-1.7b"
    config.model.unet.remat = "blocks"
    config.model.unet.dtype = "bfloat16"  # of the computation; weights are float32. "float32" for a CPU
    config.data.update(source="folder", batch_size=8, strides=(1,), stride_weights=(1.0,))
    config.diffusion.prompt_dropout = 0.1
    config.optimizer.update(learning_rate=1e-5, warmup_steps=100, beta2=0.999, final_fraction=1.0)
    config.train.update(num_steps=5000, log_steps=10, checkpoint_steps=500, sample_steps=0, ema_decay=0.999)
    return config
