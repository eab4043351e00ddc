"""The pictures of docs/editing.md: every task on clips of the shapes world, input above output.

    python benchmarks/editing_sheets.py --out=docs/editing [--only=flow,remove]

Each sheet shows 8 frames of a clip, twice as large as the model works. About five minutes on two CPU cores, most of it
compiling. `python edit.py --sheet=...` makes such a sheet of any edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from vdiff_jax.command import run_script

if TYPE_CHECKING:
    from vdiff_jax.data.video_io import Clip

_MODEL = flags.DEFINE_string("model", "shapes", "A model of the small shapes world.")
_OUT = flags.DEFINE_string("out", "docs/editing", "Folder of the pictures.")
_ONLY = flags.DEFINE_list("only", None, "Names of the sheets to make; default: all.")

SCENES = {
    "circle": dict(colour="red", shape="circle", direction="right", background="grey", place=(0.3, 0.5)),
    "cross": dict(colour="cyan", shape="cross", direction="down", background="dark", place=(0.5, 0.25)),
    "square": dict(colour="yellow", shape="square", direction="left", background="black", place=(0.72, 0.4)),
}


def scene(name: str, num_frames: int = 16) -> tuple[Clip, str, np.ndarray]:
    """(clip, caption, true coverage of the object `[f h w]`) of one of SCENES, rendered."""
    from vdiff_jax.data.shapes import captions, draw_records, edit_records, make_world, masks, render, split_rng
    from vdiff_jax.data.transforms import to_uint8
    from vdiff_jax.data.video_io import Clip

    world = make_world("small", size=32, num_frames=16, sizes=("large",), speeds=("fast",))
    drawn = draw_records(split_rng("iid", 0), world, "iid", 64)
    first = np.flatnonzero((drawn["count"] == 1) & (drawn["speed"][:, 0] >= 0))[:1]
    words: dict[str, Any] = dict(SCENES[name])
    place = words.pop("place")
    records = edit_records({key: value[first] for key, value in drawn.items()}, world, motion="moving", **words)
    records["position"][0, 0] = place
    times: Any = np.arange(num_frames, dtype=np.float32)[None]
    frames = to_uint8(np.asarray(render(records, times, world)))[0]
    return Clip(frames, 8.0), captions(records)[0], np.asarray(masks(records, times, world))[0, ..., 0]


def sheets(model: Any) -> dict[str, Callable[[], tuple[Clip, Clip]]]:
    """(before, after) by name, made when called."""
    from scipy import ndimage

    from vdiff_jax.data.effects import apply_effects
    from vdiff_jax.data.video_io import Clip
    from vdiff_jax.editing.classical import LUMA
    from vdiff_jax.editing.degradations import block_mask

    circle, red, cover = scene("circle")
    cross, _, _ = scene("cross")
    square, yellow, _ = scene("square")
    rng = np.random.default_rng(0)
    hole = np.asarray(ndimage.maximum_filter(cover > 0.01, size=(1, 3, 3)), np.float32)
    room = np.asarray(ndimage.maximum_filter(cover > 0.01, size=(16, 13, 13)), np.float32)
    blue = red.replace("red circle", "blue square")

    def with_frames(clip: Clip, frames: np.ndarray) -> Clip:
        return dataclasses.replace(clip, frames=np.clip(np.rint(frames), 0, 255).astype(np.uint8))

    def text(method: str, strength: float) -> Callable[[], tuple[Clip, Clip]]:
        return lambda: (circle, model.edit(circle, blue, red, method=method, strength=strength))

    noisy = with_frames(circle, circle.frames + 51 * rng.standard_normal(circle.frames.shape))
    lost = 1 - np.asarray(block_mask(circle.frames.shape[:3], 8, 0.3).parameters[0])[0, ..., 0]
    broken = with_frames(circle, circle.frames * (1 - lost[..., None]))
    small = with_frames(circle, circle.frames.reshape(16, 8, 4, 8, 4, 3).mean((2, 4)))
    soft = with_frames(circle, ndimage.gaussian_filter(circle.frames.astype(np.float32), (0, 1.5, 1.5, 0)))
    gray = with_frames(circle, np.repeat((circle.frames @ np.asarray(LUMA))[..., None], 3, axis=-1))
    every_fourth = Clip(circle.frames[:13:4], 2.0)
    empty = with_frames(circle, np.full(circle.frames.shape, 76.5))
    graded = apply_effects(circle, "hue=120;saturation=1.3;lens_blur=1.2")
    return {
        "flow": text("flow", 0.7),
        "inversion": text("inversion", 1.0),
        "ddpm": text("ddpm", 0.7),
        "sdedit": text("sdedit", 0.7),
        "background": lambda: (circle, model.edit(circle, red.replace("grey", "black"), red)),
        "remove": lambda: (circle, model.inpaint(circle, hole, "an empty grey background")),
        "add": lambda: (empty, model.inpaint(empty, room, red.replace("red circle", "green ring"))),
        "outpaint": lambda: (circle, model.outpaint(circle, "", left=8, right=8, guidance_scale=1.0)),
        "camera": lambda: (circle, model.move_camera(circle, "", pan=(10.0, 0.0), guidance_scale=1.0)),
        "denoise": lambda: (noisy, model.restore(noisy, "denoise", noise_std=0.2)),
        "superres": lambda: (small, model.restore(small, "superres", factor=4)),
        "fill": lambda: (broken, model.restore(broken, "fill", mask=lost)),
        "deblur": lambda: (soft, model.restore(soft, "deblur", blur=1.5)),
        "colorize": lambda: (gray, model.restore(gray, "colorize")),
        "interpolate": lambda: (every_fourth, model.editor(every_fourth, stride=4.0).interpolate(4, red)),
        "join": lambda: (Clip(circle.frames[:5], 8.0), model.join(Clip(circle.frames[:5], 8.0),
                                                                  Clip(circle.frames[11:], 8.0), 6, red)),
        "loop": lambda: (Clip(circle.frames[:9], 8.0), model.loop(Clip(circle.frames[:9], 8.0), 7, red)),
        "extend": lambda: (Clip(square.frames[:4], 8.0), model.extend(Clip(square.frames[:4], 8.0), 16, yellow)),
        "long": lambda: (cross, model.generate_long({
            0: "a magenta ring moving right on a dark background",
            12: "a magenta ring moving left on a dark background",
        }, 160)),
        "effects": lambda: (circle, graded),
    }  # fmt: skip


def main(_: list[str]) -> int:
    from vdiff_jax.data.transforms import resize_frames
    from vdiff_jax.data.video_io import contact_sheet, save_image
    from vdiff_jax.pipeline import load

    folder = Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in sheets(load(_MODEL.value)).items():
        if _ONLY.value and name not in _ONLY.value:
            continue
        before, after = make()
        height, width = (2 * side for side in after.frames.shape[1:3])
        rows = [resize_frames(_evenly(clip.frames), height, width) for clip in (before, after)]
        save_image(folder / f"{name}.png", contact_sheet(rows, columns=8))
        print(folder / f"{name}.png", flush=True)
    return 0


def _evenly(frames: np.ndarray, count: int = 8) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


if __name__ == "__main__":
    run_script(main)
