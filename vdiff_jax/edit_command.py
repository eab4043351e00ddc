"""What `edit.py` does with its flags: a task's flags to the editor's arguments, and the sheet of before and after."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vdiff_jax.command import prompts_over_time
from vdiff_jax.data.transforms import resize_frames
from vdiff_jax.data.video_io import Clip, contact_sheet, read_video

if TYPE_CHECKING:
    from vdiff_jax.editor import Editor


def run_task(editor: Editor, task: str, values: Mapping[str, Any], mask: np.ndarray | None) -> Clip:
    """The clip that `edit.py --task=...` makes. values: the flags by name, None = not given. mask: `[f h w]` or None.

    Raises:
        ValueError: a flag that the task needs is missing or of the wrong form.
    """

    def given(*names: str) -> dict[str, Any]:
        return {name: values[name] for name in names if values[name] is not None}

    def needed(name: str) -> Any:
        if values[name] is None:
            raise ValueError(f"--task={task} needs --{name}")
        return values[name]

    prompt, plain = values["prompt"], given("seed", "steps")
    guided = plain | given("guidance_scale")
    masked = guided | given("negative_prompt")
    if task == "edit":
        how = given("method", "strength", "structure") | ({} if mask is None else {"mask": mask})
        return editor.edit(prompt, values["source_prompt"], **how, **masked)
    if task == "inpaint":
        needed("mask")
        return editor.inpaint(np.asarray(mask), prompt, **masked)
    if task == "outpaint":
        left, top, right, bottom = (int(side) for side in numbers("sides", needed("sides"), 4))
        return editor.outpaint(left, top, right, bottom, prompt, **masked)
    if task == "camera":
        pan = numbers("pan", values["pan"] or ["0", "0"], 2)
        return editor.move_camera((pan[0], pan[1]), prompt=prompt, **given("zoom"), **masked)
    if task == "restore":
        how = given("method", "noise_std", "factor", "blur", "block", "n_candidates", "mean_of")
        return editor.restore(values["restore"], prompt, mask=mask, **how, **plain)
    if task == "extend":
        over_time = prompts_over_time(values["prompt_at"]) if values["prompt_at"] else prompt
        return editor.extend(needed("num_frames"), over_time, **guided)
    if task == "interpolate":
        return editor.interpolate(prompt=prompt, **given("factor"), **guided)
    if task == "join":
        other = read_video(needed("second"), sound=True)
        return editor.join(other, prompt=prompt, **given("num_frames"), **guided)
    if task == "loop":
        return editor.loop(prompt=prompt, **given("num_frames"), **guided)
    if task == "from_ends":
        return editor.from_ends(needed("num_frames"), prompt, **guided)
    if task == "harmonise":
        return editor.harmonise(prompt=prompt, **given("strength"), **plain)
    if task == "stylize":
        style = read_video(needed("style"), num_frames=1)
        source = values["source_prompt"] or None
        return editor.stylize(style, prompt, source, **given("strength"), **guided)
    if task == "anomaly":
        score = editor.anomaly(prompt=prompt)
        for frame, value in enumerate(score.score):
            print(f"frame {frame}: {value:.2f}", file=sys.stderr)
        return dataclasses.replace(editor.clip, frames=score.sheet(editor.clip))
    raise ValueError(f"task {task!r} is unknown")


def numbers(name: str, texts: Sequence[str], count: int) -> list[float]:
    """The numbers of a list flag. Raises ValueError for another count or something that is no number."""
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = []
    if len(found) != count:
        raise ValueError(f"--{name}={','.join(texts)}: give {count} numbers")
    return found


def before_and_after(before: Clip, after: Clip, columns: int = 8) -> np.ndarray:
    """A contact sheet u8 `[h w 3]`: frames of one clip above frames of the other, at the second one's size."""
    columns = min(columns, before.num_frames, after.num_frames)
    rows = [resize_frames(before.frames, *after.frames.shape[1:3]), after.frames]
    picked = [frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)] for frames in rows]
    return contact_sheet(picked, columns=columns)
