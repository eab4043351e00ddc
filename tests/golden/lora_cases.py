"""The low-rank updates of the parity tests, as files of other libraries, made from names. Numpy only.

Each is for the tiny AnimateDiff pipeline (`pipeline_cases`), in torch's layouts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from golden.seeded_weights import seeded_input, seeded_tensor

SCALE = 0.8
"""How strongly the updates are merged."""
ALPHA = 2.0
FRAMES, HEIGHT, WIDTH = 5, 4, 6
TOKENS = np.array([[526, 5, 77, 130, 527, 527, 527, 527]], np.int64)
_SHAPES = Path(__file__).parent / "pipeline_animatediff" / "shapes.json"
_IMAGE = (
    r"unet\..*attentions\..*(to_[qkv]|to_out\.0|proj_in|ff\.net\.2)$",
    r"unet\..*(resnets\.\d\.(conv1|conv_shortcut|time_emb_proj)|(up|down)samplers\.0\.conv)$",
    r"unet\.(conv_in|conv_out|time_embedding\.linear_\d)$",
)
_TEXT = (r"text_encoder\..*(_proj|mlp\.fc1)$",)
_MOTION = (r"unet\..*motion_modules\..*(to_[qkv]|to_out\.0)$",)
_ATTENTION = (r"unet\..*attentions\..*(to_[qkv]|to_out\.0)$", r"text_encoder\..*_proj$")

CASES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "peft": (_IMAGE + _ATTENTION, "peft", False),
    "older": (_ATTENTION, "older", False),
    "kohya": (_IMAGE + _TEXT, "kohya", True),
    "motion": (_MOTION, "bare", False),
}
"""Name -> (patterns of layers, names of keys, whether layers have an alpha)."""


def layers(patterns: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """`unet.mid_block...to_q` -> shape of its weight, for every layer that a pattern matches."""
    found = {}
    for part, shapes in json.loads(_SHAPES.read_text()).items():
        prefix = "text_encoder.text_model." if part == "text_encoder" else f"{part}."
        for key, shape in shapes.items():
            name = prefix + key.removesuffix(".weight")
            if part in ("unet", "text_encoder") and key.endswith(".weight") and len(shape) >= 2:
                if any(re.match(pattern, name) for pattern in patterns):
                    found[name] = tuple(shape)
    return found


def rank_of(name: str) -> int:
    """Ranks differ from layer to layer, the motion modules' do not."""
    return 4 if "motion" in name or "attentions" in name or "text" in name else 2


def factors(name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`down [rank in ...]`, `up [out rank 1 ...]` of a layer."""
    rank = rank_of(name)
    down = seeded_tensor(f"{name}/down", (rank, *shape[1:]))
    up = seeded_tensor(f"{name}/up", (shape[0], rank, *(1,) * (len(shape) - 2)))
    return down, up


def kohya_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + rest.replace(".", "_")


def _keys(name: str, form: str) -> tuple[str, str]:
    if form == "kohya":
        return f"{kohya_name(name)}.lora_down.weight", f"{kohya_name(name)}.lora_up.weight"
    if form == "bare":
        name = name.removeprefix("unet.")
    if form == "older":
        if name.startswith("text_encoder"):
            return f"{name}.lora_linear_layer.down.weight", f"{name}.lora_linear_layer.up.weight"
        layer = re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1_lora", name)
        return f"{layer}.down.weight", f"{layer}.up.weight"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def tensors(case: str) -> dict[str, np.ndarray]:
    """The file of a case."""
    patterns, form, has_alpha = CASES[case]
    file = {}
    for name, shape in layers(patterns).items():
        file |= dict(zip(_keys(name, form), factors(name, shape)))
        if has_alpha:
            file[f"{kohya_name(name)}.alpha"] = np.array(ALPHA, np.float32)
    return file


def unet_inputs() -> dict[str, np.ndarray]:
    """Latents `[b f h w c]` and text `[b n d]`."""
    return dict(z=seeded_input("lora z", (1, FRAMES, HEIGHT, WIDTH, 4)), text=seeded_input("lora text", (1, 8, 24)))
