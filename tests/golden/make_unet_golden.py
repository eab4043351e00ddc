"""Makes unet_<family>.npz: what diffusers' UNets give for the cases of `unet_cases`.

Needs torch and diffusers (the extra `oracle`):  PYTHONPATH=tests python -m golden.make_unet_golden

Weights are `seeded_weights`, made from the names of the tensors. Each file holds the prediction, every fifth number of
the output of each of our blocks, every 37th of the gradient of <prediction, cotangent> with respect to the middle
block, the names and shapes of all tensors, and the versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from golden.seeded_weights import seeded_weights
from golden.unet_cases import CASES, GRADIENT_OF, STRIDES, block_names, inputs

FOLDER = Path(__file__).parent
BUFFERS = (".pos_embed.pe",)


def build(case: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    settings = {name: value for name, value in case.items() if not name.startswith("_")}
    model = getattr(diffusers, case["_class_name"])(**settings).eval()
    with torch.no_grad():
        state = model.state_dict()
        weights = seeded_weights({k: tuple(v.shape) for k, v in state.items() if not k.endswith(BUFFERS)}, seed)
        for name, value in weights.items():
            state[name].copy_(torch.from_numpy(value))
    return model


def forward(model: torch.nn.Module, values: dict[str, Any]) -> torch.Tensor:
    """The prediction in our layout."""
    family = type(model).__name__
    given = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else torch.tensor(v) for k, v in values.items()}
    z, text, timestep = given["z"], given["text"], given["timestep"]
    batch, frames = z.shape[:2]
    if family == "UNetSpatioTemporalConditionModel":
        sample = torch.cat([z, given["image_latents"]], -1).permute(0, 1, 4, 2, 3)
        return model(sample, timestep, text, added_time_ids=given["added"]).sample.permute(0, 1, 3, 4, 2)
    if family == "UNet2DConditionModel":
        sample = z.permute(0, 1, 4, 2, 3).flatten(0, 1)
        output = model(sample, timestep, text.repeat_interleave(frames, 0)).sample
        return output.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)
    sample = z.permute(0, 4, 1, 2, 3)
    if family == "UNetMotionModel":
        text = text.repeat_interleave(frames, 0)  # the pipeline's part
    extra = {}
    if family == "I2VGenXLUNet":
        image = given["image_latents"].permute(0, 4, 1, 2, 3)
        extra = dict(fps=given["added"][:, 0], image_latents=image, image_embeddings=given["image_embedding"])
    return model(sample, timestep, encoder_hidden_states=text, **extra).sample.permute(0, 2, 3, 4, 1)


def oracle(case: dict[str, Any], values: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Prediction, block outputs `block/<name>` in our layout, gradients `gradient/<tensor>`; nothing left out."""
    model = build(case, seed)
    batch, frames = values["z"].shape[:2]
    results: dict[str, np.ndarray] = {}

    def keep(name: str):
        def hook(module, arguments, output):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            output = output.detach().unflatten(0, (batch, frames)) if output.ndim == 4 else output
            results[f"block/{name}"] = output.permute(0, 1, 3, 4, 2).contiguous().numpy()

        return hook

    for name in block_names(case):
        model.get_submodule(name).register_forward_hook(keep(name))
    prediction = forward(model, values)
    (prediction * torch.from_numpy(values["cotangent"])).sum().backward()
    results["prediction"] = prediction.detach().contiguous().numpy()
    for name, parameter in model.named_parameters():
        if name.startswith(GRADIENT_OF):
            results[f"gradient/{name}"] = parameter.grad.numpy()
    return results


def thinned(name: str, value: np.ndarray) -> np.ndarray:
    kind = name.partition("/")[0]
    return value if value.ndim == 1 or f"{kind}s" not in STRIDES else value.reshape(-1)[:: STRIDES[f"{kind}s"]]


def norms(model: torch.nn.Module) -> dict[str, list[float]]:
    """Epsilon and number of groups (0 for a layer norm) of every norm: too small a thing for outputs to tell."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            found[name] = [module.eps, module.num_groups]
        elif isinstance(module, torch.nn.LayerNorm):
            found[name] = [module.eps, 0]
    return found


def main() -> None:
    versions = json.dumps({"torch": torch.__version__, "diffusers": diffusers.__version__})
    for family, case in CASES.items():
        results = {name: thinned(name, value) for name, value in oracle(case, inputs(case)).items()}
        model = build(case)
        about = {"shapes": {k: list(v.shape) for k, v in model.state_dict().items()}, "norms": norms(model)}
        texts = {name: json.dumps(value) for name, value in about.items()}
        np.savez_compressed(FOLDER / f"unet_{family}.npz", versions=versions, **texts, **results)


if __name__ == "__main__":
    main()
