"""The flags by which `sample.py` and `edit.py` name a model and the size it works at, and the model they name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import jax
from absl import flags

from vdiff_jax import parallel
from vdiff_jax.command import lora_updates

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion

_MODEL = flags.DEFINE_string(
    "model", "shapes", "Bundled name, run folder, saved folder, pipeline folder of diffusers, or owner/name on the hub."
)
_LORA = flags.DEFINE_list(
    "lora", [], "Low-rank updates of the model: files or run folders, each with :scale if not 1, separated by commas."
)
_SIZE = flags.DEFINE_string("size", None, "Pixels, one side or HEIGHTxWIDTH; default: as the model was trained.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices as DATAxFSDPxCONTEXT: clips over the first, weights over the second, frames over the third."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of weights and computation (pipelines of diffusers)."
)
_VARIANT = flags.DEFINE_string("variant", None, "Which weights where there are several, as fp16 (of diffusers).")
_ADAPTER = flags.DEFINE_string("motion_adapter", None, "AnimateDiff motion adapter, folder or file (of diffusers).")


def open_model() -> VideoDiffusion:
    """The model of the flags, updates merged in, on the mesh of the flags, which stays in use.

    Raises FileNotFoundError or ValueError, see `pipeline.load` and `parallel.make_mesh`.
    """
    from vdiff_jax.pipeline import load

    if _MESH.value is not None:
        sizes = _MESH.value.lower().split("x")
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            raise ValueError(f"--mesh={_MESH.value}: give three numbers of devices, DATAxFSDPxCONTEXT as 2x1x4")
        data, fsdp, context = (int(size) for size in sizes)
        jax.set_mesh(parallel.make_mesh(data, fsdp, context))
    updates = lora_updates(_LORA.value)
    named = {"dtype": _DTYPE.value, "variant": _VARIANT.value, "motion_adapter": _ADAPTER.value}
    print(f"loading {_MODEL.value}", file=sys.stderr)
    model = load(_MODEL.value, **{name: value for name, value in named.items() if value is not None})
    for path, scale in updates:
        model = model.with_lora(path, scale)
    return model


def working_size() -> int | tuple[int, int] | None:
    """What `--size` says, None = as the model was trained.

    Raises:
        ValueError: a size of another form.
    """
    text = _SIZE.value
    if text is None:
        return None
    sides = text.lower().split("x")
    if not all(side.isdigit() for side in sides) or len(sides) > 2:
        raise ValueError(f"--size={text}: give one number of pixels, or HEIGHTxWIDTH as 320x576")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
