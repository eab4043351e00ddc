"""Makes pipeline_<family>/: tiny random pipelines as diffusers saves them, and the frames they make.

Needs torch, diffusers and transformers (the extra `oracle`):
PYTHONPATH=tests python -m golden.make_pipeline_golden

A folder holds what `save_pretrained` writes but for the weights, which are made from their names (`seeded_weights`),
their shapes (shapes.json), and expected.npz: the latents at the end and the frames.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from golden.make_unet_golden import BUFFERS
from golden.pipeline_cases import CASES, FPS, GUIDANCE, NEGATIVE, PROMPT, SIZE, STEPS, SVD, image, start_noise
from golden.seeded_weights import seeded_input, seeded_weights
from golden.unet_cases import CASES as UNETS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

FOLDER = Path(__file__).parent
TOKENIZER = FOLDER / "tiny_clip_tokenizer"


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        state = model.state_dict()
        names = {k: tuple(v.shape) for k, v in state.items() if v.is_floating_point() and not k.endswith(BUFFERS)}
        for name, value in seeded_weights(names).items():
            state[name].copy_(torch.from_numpy(value))
    return model.eval()


def unet(case: str, **changes: Any) -> torch.nn.Module:
    settings = {name: value for name, value in UNETS[case].items() if not name.startswith("_")}
    return seeded(getattr(diffusers, UNETS[case]["_class_name"])(**{**settings, **changes}))


def autoencoder() -> torch.nn.Module:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return seeded(diffusers.AutoencoderKL(block_out_channels=[32, 64], layers_per_block=1, latent_channels=4, **blocks))


def text_encoder() -> torch.nn.Module:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return seeded(CLIPTextModel(config))


def prompted(family: str) -> Any:
    """A pipeline that takes a prompt."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear" if family == "animatediff" else "scaled_linear",
        clip_sample=False, steps_offset=1, set_alpha_to_one=family == "animatediff",
    )  # fmt: skip
    parts = dict(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        scheduler=scheduler,
    )
    if family == "modelscope":
        return diffusers.TextToVideoSDPipeline(unet=unet("modelscope"), **parts)
    adapter = diffusers.MotionAdapter(
        block_out_channels=[32, 64], motion_layers_per_block=1, motion_num_attention_heads=2, motion_max_seq_length=8,
        use_motion_mid_block=False,
    )  # fmt: skip
    return diffusers.AnimateDiffPipeline(unet=unet("image"), motion_adapter=seeded(adapter), **parts)


def image_encoder() -> torch.nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=24, hidden_act="gelu",
    )  # fmt: skip
    return seeded(CLIPVisionModelWithProjection(vision))


def feature_extractor() -> Any:
    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()


def named_as_before(text: Any) -> None:
    """A text encoder as in transformers 4, where I2VGen-XL's pipeline looks for its last norm."""
    if not hasattr(text, "text_model"):
        object.__setattr__(text, "text_model", text)


def picture_and_prompt() -> Any:
    text = text_encoder()
    named_as_before(text)
    return diffusers.I2VGenXLPipeline(
        vae=autoencoder(),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        image_encoder=image_encoder(),
        feature_extractor=feature_extractor(),
        unet=unet("i2vgen"),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
            prediction_type="v_prediction",
        ),
    )  # fmt: skip


def image_to_video() -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        vae=seeded(
            diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=[32, 64], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 2
            )
        ),
        image_encoder=image_encoder(),
        unet=unet("svd", num_frames=3),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
            timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
            timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
        ),
        feature_extractor=feature_extractor(),
    )  # fmt: skip


def make(family: str) -> Any:
    torch.manual_seed(0)
    special = {"svd": image_to_video, "i2vgen": picture_and_prompt}
    pipeline = special[family]() if family in special else prompted(family)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, family: str) -> dict[str, np.ndarray]:
    """Latents `[b f h w c]` at the end of 10 steps, and frames f32 `[b f H W 3]` in 0..1."""
    noise = torch.from_numpy(start_noise(family))
    height, width = SIZE
    common = dict(height=height, width=width, num_inference_steps=STEPS, num_frames=CASES[family])
    results = {}
    for kind in ("latent", "np"):
        if family == "svd":
            module = sys.modules[type(pipeline).__module__]
            module.randn_tensor = lambda shape, **_: torch.from_numpy(seeded_input("image noise", tuple(shape)))
            output = pipeline(
                _picture(), latents=noise.permute(0, 1, 4, 2, 3), output_type=kind, **common, **SVD
            ).frames  # fmt: skip
            latents = output.permute(0, 1, 3, 4, 2) if kind == "latent" else None
        else:
            extra = {}
            if family == "i2vgen":  # the mean of the autoencoder's posterior, not a draw
                diffusers.models.autoencoders.vae.randn_tensor = lambda shape, **_: torch.zeros(shape)
                extra = dict(image=_picture(), target_fps=FPS)
            output = pipeline(
                PROMPT, negative_prompt=NEGATIVE, guidance_scale=GUIDANCE, latents=noise.permute(0, 4, 1, 2, 3),
                output_type=kind, **extra, **common,
            ).frames  # fmt: skip
            latents = output.permute(0, 2, 3, 4, 1) if kind == "latent" else None
        if latents is not None:
            results["latents"] = latents.contiguous().numpy()
        else:
            results["frames"] = np.asarray(output)
    return results


def _picture() -> Any:
    from PIL import Image

    return Image.fromarray(image())


def main() -> None:
    for family in CASES:
        pipeline = make(family)
        folder = FOLDER / f"pipeline_{family}"
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as temporary:
            pipeline.save_pretrained(temporary)
            shutil.copytree(temporary, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        shapes = {
            name: {
                key: list(value.shape) for key, value in part.state_dict().items() if not key.endswith("position_ids")
            }
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }
        (folder / "shapes.json").write_text(json.dumps(shapes) + "\n")
        versions = json.dumps({m.__name__: m.__version__ for m in (torch, diffusers, transformers)})
        np.savez_compressed(folder / "expected.npz", versions=versions, **run(pipeline, family))


if __name__ == "__main__":
    main()
