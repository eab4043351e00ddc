"""Makes lora.npz: what the tiny AnimateDiff pipeline gives under updates that diffusers itself loads.

Needs torch, diffusers, transformers and peft (the extra `oracle`):
PYTHONPATH=tests python -m golden.make_lora_golden
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from golden import lora_cases
from golden.make_pipeline_golden import make
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "lora.npz"


def outputs(pipeline: Any) -> dict[str, np.ndarray]:
    """The UNet's prediction `[b f h w c]` and the text encoder's last state `[b n d]`."""
    values = {name: torch.from_numpy(value) for name, value in lora_cases.unet_inputs().items()}
    text = values["text"].repeat_interleave(lora_cases.FRAMES, 0)
    with torch.no_grad():
        prediction = pipeline.unet(values["z"].permute(0, 4, 1, 2, 3), 741, encoder_hidden_states=text).sample
        states = pipeline.text_encoder(torch.from_numpy(lora_cases.TOKENS)).last_hidden_state
    return dict(prediction=prediction.permute(0, 2, 3, 4, 1).contiguous().numpy(), states=states.numpy())


def with_update(file: Path, scale: float = lora_cases.SCALE) -> Any:
    """The pipeline with the update of a file, which the networks apply as they run."""
    pipeline = make("animatediff")
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="golden")
    pipeline.set_adapters(["golden"], [scale])
    for part in (pipeline.unet, pipeline.text_encoder):
        part.eval()
    return pipeline


def main() -> None:
    results = {f"none/{name}": value for name, value in outputs(make("animatediff")).items()}
    with tempfile.TemporaryDirectory() as folder:
        for case in lora_cases.CASES:
            file = Path(folder) / f"{case}.safetensors"
            tensors = lora_cases.tensors(case)
            if case == "motion":  # its pipeline wants to be told whose they are
                tensors = {f"unet.{key}": value for key, value in tensors.items()}
            save_file(tensors, file, metadata={"format": "pt"})
            results |= {f"{case}/{name}": value for name, value in outputs(with_update(file)).items()}
    modules = (torch, diffusers, transformers, peft)
    np.savez_compressed(FILE, versions=json.dumps({m.__name__: m.__version__ for m in modules}), **results)


if __name__ == "__main__":
    main()
