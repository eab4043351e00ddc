"""Makes autoencoder_kl.npz and autoencoder_temporal.npz: what diffusers' autoencoders compute, block by block.

Needs torch and diffusers (the extra `oracle`):  PYTHONPATH=tests python -m golden.make_autoencoder_golden
Weights and inputs are made from their names (`seeded_weights`), so only results are stored. Arrays are `[b f h w c]`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from golden.seeded_weights import seeded_input, seeded_weights

FOLDER = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "autoencoder_kl": {"latent_channels": 3, "norm_num_groups": 16, "scaling_factor": 0.18215},
    "autoencoder_temporal": {},
}
GRADIENTS = ("attentions.0.to_q.weight", "resnets.1.{}norm2.weight", "resnets.0.{}conv1.bias")


def build(case: str, **changes: Any):
    """The torch module of a case with its seeded weights, and config.json's fields; widths 32, 64 unless changed."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    fields = {"block_out_channels": (32, 64), "layers_per_block": 2, **CASES[case], **changes}
    levels = len(fields["block_out_channels"])
    fields["down_block_types"] = ("DownEncoderBlock2D",) * levels
    if case == "autoencoder_kl":
        fields["up_block_types"] = ("UpDecoderBlock2D",) * levels
    module = (AutoencoderKL if case == "autoencoder_kl" else AutoencoderKLTemporalDecoder)(**fields).eval()
    load_seeded(module)
    return module


def load_seeded(module, seed: int = 0) -> None:
    import torch

    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict({key: torch.from_numpy(value) for key, value in seeded_weights(shapes, seed).items()})


def inputs(config: dict[str, Any], *, batch: int = 2, num_frames: int = 3, size: tuple[int, int] = (6, 10)):
    """Video, raw latents and the inputs of blocks, for latents of `size`: unequal sides, an odd number of frames."""
    widths, levels = config["block_out_channels"], len(config["block_out_channels"])
    height, width = (side * 2 ** (levels - 1) for side in size)
    latent = (batch, num_frames, *size)
    return {
        "video": seeded_input("video", (batch, num_frames, height, width, 3)),
        "latents": 2 * seeded_input("latents", (*latent, config["latent_channels"])),
        "mid_input": 2 * seeded_input("mid", (*latent, widths[-1])),
        "up_input": 2 * seeded_input("up", (*latent, widths[1])),
        "direction": seeded_input("direction", (*latent, widths[-1])),
    }


def results(module, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything the tests compare.

    moments, decoded: of the whole. encoder_mid, decoder_mid, up: outputs of single blocks, `up` of the last level.
    grad_*: gradient of sum(decoder_mid * direction) with respect to its input and some of its parameters.
    """
    import torch

    batch, num_frames = given["video"].shape[:2]
    temporal = hasattr(module.decoder, "time_conv_out")
    indicator = {"image_only_indicator": torch.zeros(batch, num_frames)} if temporal else {}

    def into(x: np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(x.reshape(-1, *x.shape[2:]).transpose(0, 3, 1, 2)))

    def back(x) -> np.ndarray:
        array = x.detach().numpy().transpose(0, 2, 3, 1)
        return np.ascontiguousarray(array.reshape(batch, num_frames, *array.shape[1:]))

    with torch.no_grad():
        posterior = module.encode(into(given["video"])).latent_dist
        decoded = module.decode(into(given["latents"]), **({"num_frames": num_frames} if temporal else {})).sample
        output = {
            "moments": back(torch.cat([posterior.mode(), posterior.logvar], 1)),
            "decoded": back(decoded),
            "encoder_mid": back(module.encoder.mid_block(into(given["mid_input"]))),
            "up": back(module.decoder.up_blocks[-1](into(given["up_input"]), **indicator)),
        }
    x = into(given["mid_input"]).requires_grad_()
    mid = module.decoder.mid_block
    module.zero_grad()
    y = mid(x, **indicator)
    (y * into(given["direction"])).sum().backward()
    output |= {"decoder_mid": back(y), "grad_input": back(x.grad)}
    parameters = dict(mid.named_parameters())
    names = [name.format("spatial_res_block." if temporal else "") for name in GRADIENTS]
    names += ["resnets.0.time_mixer.mix_factor", "resnets.1.temporal_res_block.conv2.bias"] if temporal else []
    return output | {f"grad_{name}": parameters[name].grad.numpy() for name in names}


def main() -> None:
    import diffusers
    import torch
    from golden.make_unet_golden import norms

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "numpy": np.__version__}
    for case in CASES:
        module = build(case)
        config = {"_class_name": type(module).__name__, **{k: v for k, v in module.config.items() if k[0] != "_"}}
        keys = {key: list(value.shape) for key, value in module.state_dict().items()}
        about = json.dumps({"config": config, "keys": keys, "versions": versions, "norms": norms(module)})
        output = results(module, inputs(config, size=(3, 5)))
        path = FOLDER / f"{case}.npz"
        np.savez_compressed(path, about=np.array(about), **output)
        print(path.name, path.stat().st_size, {name: float(np.abs(x).std()) for name, x in output.items()})


if __name__ == "__main__":
    main()
