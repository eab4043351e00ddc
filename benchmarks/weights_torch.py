"""The torch side of `public_weights.py`: diffusers writes folders with random weights, predicts and samples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from golden.make_pipeline_golden import TOKENIZER, seeded
from golden.make_unet_golden import forward
from golden.seeded_weights import seeded_tensor
from weights_cases import (
    AUTOENCODER_CHANNELS,
    CHANNELS,
    FULL,
    GUIDANCE,
    NEGATIVE,
    PIPELINES,
    PROMPT,
    answer,
    full_inputs,
)


def write_unet(family: str, folder: str) -> dict[str, Any]:
    """A full-size UNet's folder with seeded weights in float32; one tensor at a time is in memory."""
    settings = {name: value for name, value in FULL[family].items() if name != "_class_name"}
    with torch.device("meta"):
        model = getattr(diffusers, FULL[family]["_class_name"])(**settings)
    model.save_config(folder)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # Buffers cannot be seeded: the network computes with them.
    buffers = {
        f"{name}.pe": SinusoidalPositionalEmbedding(module.pe.shape[2], module.pe.shape[1]).pe.numpy()
        for name, module in model.named_modules()
        if isinstance(module, SinusoidalPositionalEmbedding)
    }
    tensors = ((name, buffers.get(name, None), shape) for name, shape in shapes.items())
    values = (seeded_tensor(name, shape) if value is None else value for name, value, shape in tensors)
    stream_safetensors(Path(folder) / "diffusion_pytorch_model.safetensors", shapes, values)
    return {"parameters": sum(math.prod(shape) for name, shape in shapes.items() if name not in buffers)}


def stream_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], values: Iterator[np.ndarray]) -> None:
    """Write float32 tensors one after the other; the library's own writer wants them all at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            file.write(np.ascontiguousarray(value, np.float32).data)


def predict(family: str, folder: str, out: str, num_frames: int, height: int, width: int) -> dict[str, Any]:
    """The full-size UNet's prediction, `[b f h w c]`, as an array file."""
    config = json.loads((Path(folder) / "config.json").read_text())
    began = time.perf_counter()
    model = getattr(diffusers, FULL[family]["_class_name"]).from_pretrained(folder).eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        prediction = forward(model, full_inputs(config, num_frames, height, width)).contiguous().numpy()
    np.save(out, prediction)
    return {"load_s": loaded - began, "predict_s": time.perf_counter() - loaded}


def write_pipeline(family: str, folder: str) -> dict[str, Any]:
    """A narrow pipeline of the family, as diffusers saves it."""
    torch.manual_seed(0)
    pipeline = _animating() if family == "svd" else _prompted(family)
    pipeline.save_pretrained(folder)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {"parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}}


def _prompted(family: str) -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    parts = dict(
        vae=seeded(
            diffusers.AutoencoderKL(
                block_out_channels=AUTOENCODER_CHANNELS, layers_per_block=2, latent_channels=4,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            )
        ),
        text_encoder=seeded(transformers.CLIPTextModel(text)),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    )  # fmt: skip
    settings = dict(PIPELINES[family], block_out_channels=CHANNELS)
    if family == "modelscope":
        return diffusers.TextToVideoSDPipeline(unet=seeded(diffusers.UNet3DConditionModel(**settings)), **parts)
    adapter = diffusers.MotionAdapter(
        block_out_channels=CHANNELS, motion_num_attention_heads=4, use_motion_mid_block=False
    )
    unet = seeded(diffusers.UNet2DConditionModel(**settings))
    return diffusers.AnimateDiffPipeline(unet=unet, motion_adapter=seeded(adapter), **parts)


def _animating() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, patch_size=32,
        projection_dim=256, hidden_act="gelu",
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=AUTOENCODER_CHANNELS, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=seeded(autoencoder),
        image_encoder=seeded(transformers.CLIPVisionModelWithProjection(vision)),
        unet=seeded(diffusers.UNetSpatioTemporalConditionModel(block_out_channels=CHANNELS, **PIPELINES["svd"])),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
            timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
            timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
        ),
        feature_extractor=getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(),
    )  # fmt: skip


def sample(family: str, folder: str, steps: int, num_frames: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of the pipeline from prompt, or picture, to frames; a first run, of one step, is told by itself."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = dict(
        height=size, width=size, num_frames=num_frames, num_inference_steps=steps, output_type="np"
    )
    if family == "svd":
        from PIL import Image

        picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        asked |= dict(image=Image.fromarray(picture), max_guidance_scale=3.0)
    else:
        asked |= dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=GUIDANCE)
    runs = []
    for index in range(1 + repeats):
        wall, processor = time.perf_counter(), time.process_time()
        # One step warms up as well as all of them do: nothing is compiled for their number.
        frames = np.asarray(pipeline(**asked | ({} if index else {"num_inference_steps": 1})).frames)
        runs.append((time.perf_counter() - wall, time.process_time() - processor))
    assert np.isfinite(frames).all() and frames.std() > 0.01
    return {"first_s": runs[0][0], "runs": runs[1:], "threads": torch.get_num_threads()}


if __name__ == "__main__":
    answer({"write_unet": write_unet, "predict": predict, "write_pipeline": write_pipeline, "sample": sample})
