"""How well a model of the shapes world edits: every figure of docs/editing.md.

    python benchmarks/editing_report.py --model=shapes --out=editing.json
    python benchmarks/editing_report.py --only=text,curves --num_clips=60

Parts: text (the default edit on --num_clips clips), curves (success and preservation over strength for every method),
inversion, inpaint, restore, motion, long, memory (peak of sample.py by length), session (first and second edit). Each
part is written to --out as soon as it is done, and a part that stands there already is not made again. On two CPU cores
the whole takes about two hours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from vdiff_jax.command import run_script

_MODEL = flags.DEFINE_string("model", "shapes", "Bundled name, run folder or saved folder.")
_OUT = flags.DEFINE_string("out", "editing.json", "The report.")
_ONLY = flags.DEFINE_list("only", None, "Parts to make; default: all.")
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 200, "Clips of the text edits.", lower_bound=1)
_CURVE_CLIPS = flags.DEFINE_integer("curve_clips", 60, "Clips of every point of the curves.", lower_bound=1)
_RESTORE_CLIPS = flags.DEFINE_integer("restore_clips", 12, "Clips of every restoration.", lower_bound=1)
_RESTORE_STEPS = flags.DEFINE_integer("restore_steps", 20, "Denoising steps of restorations.", lower_bound=1)
_LONG_CLIPS = flags.DEFINE_integer("long_clips", 20, "Clips of 160 frames.", lower_bound=1)

STRENGTHS = {
    "flow": (0.2, 0.3, 0.4, 0.55, 0.7, 0.85),
    "sdedit": (0.2, 0.3, 0.4, 0.55, 0.7, 0.85),
    "ddpm": (0.2, 0.3, 0.4, 0.55, 0.7, 0.85),
    "inversion": (0.55, 0.7, 0.85, 1.0),
}


def main(_: list[str]) -> int:
    from vdiff_jax.data.shapes import make_world
    from vdiff_jax.evaluation.report import rounded
    from vdiff_jax.evaluation.shapes_tasks import Evaluation
    from vdiff_jax.interop.pretrained import load_json, save_json
    from vdiff_jax.pipeline import load

    model = load(_MODEL.value)
    world = make_world("small", size=model.settings.size, num_frames=16, sizes=("large",), speeds=("fast",))
    ev = Evaluation(model, world, _NUM_CLIPS.value, batch_size=20, num_frames=16)
    parts = _parts(ev)
    if unknown := sorted(set(_ONLY.value or ()) - {name.split(" ")[0] for name in parts}):
        raise ValueError(
            f"--only={','.join(unknown)}: choose from {', '.join(sorted({n.split(' ')[0] for n in parts}))}"
        )
    out = Path(_OUT.value)
    report: dict[str, Any] = load_json(out) if out.is_file() else {}
    if report.get("model", model.digest) != model.digest:
        raise ValueError(f"{out} is the report of another model; give another --out")
    report["model"] = model.digest
    for name, make in parts.items():
        if (_ONLY.value and name.split(" ")[0] not in _ONLY.value) or name in report:
            continue
        started = time.monotonic()
        report[name] = rounded(make(), 4)
        report[name]["seconds"] = round(time.monotonic() - started, 1)
        save_json(out, report)
        print(name, json.dumps(_short(report[name])), flush=True)
    print(out, file=sys.stderr)
    return 0


def _parts(ev: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """The measurements by name; the first word is the part."""
    import dataclasses

    from vdiff_jax.evaluation import shapes_edits, shapes_restoration
    from vdiff_jax.rollout import RollOut
    from vdiff_jax.tasks import EditOptions

    curve = dataclasses.replace(ev, num_clips=_CURVE_CLIPS.value)
    count = _RESTORE_CLIPS.value  # of 8 frames: every step differentiates decoder and network many times
    restore = dataclasses.replace(ev, num_clips=count, batch_size=min(4, count), num_frames=8)
    long = dataclasses.replace(ev, num_clips=_LONG_CLIPS.value)
    few = dataclasses.replace(ev, num_clips=min(40, ev.num_clips))
    parts: dict[str, Callable[[], dict[str, Any]]] = {"text": lambda: shapes_edits.text_edit(ev, EditOptions())}
    parts["inpaint"] = lambda: shapes_edits.inpainting(dataclasses.replace(ev, num_clips=min(100, ev.num_clips)))
    parts["inversion"] = lambda: shapes_edits.inversion(few)
    parts["motion slow"] = lambda: shapes_edits.slow_motion(few)
    parts["motion slow, no prompt"] = lambda: shapes_edits.slow_motion(few, prompted=False)
    parts["motion loops"] = lambda: shapes_edits.loops(few)
    for name, options in (
        ("as it is", RollOut()),
        ("context 1", RollOut(context=1)),
        ("no anchor", RollOut(anchor=False, statistics=0.0)),
        ("context 1, no anchor", RollOut(context=1, anchor=False, statistics=0.0)),
    ):
        parts[f"long 160, {name}"] = lambda options=options: shapes_edits.long_clips(long, 160, options)
        parts[f"long 40, told once, {name}"] = lambda options=options: shapes_edits.long_clips(
            long, 40, options, told_once=True
        )
    longest = dataclasses.replace(long, num_clips=4, batch_size=4)
    parts["long 1600"] = lambda: shapes_edits.long_clips(longest, 1600)
    parts["memory"] = lambda: _peak_memory((16, 160, 1600))
    parts["session"] = lambda: _session_times(ev.model)
    for task in shapes_restoration.TASKS:
        parts[f"restore {task}"] = lambda task=task: shapes_restoration.restoration(
            restore, task, steps=_RESTORE_STEPS.value
        )
    for method, strengths in STRENGTHS.items():
        for strength in strengths:
            options = EditOptions(method, strength)
            parts[f"curves {method} {strength}"] = lambda options=options: shapes_edits.text_edit(curve, options)
    return parts


REPORT_PEAK = """
import atexit, runpy, sys

def report():
    status = open("/proc/self/status").read()
    open(target, "w").write(status.split("VmHWM:")[1].split()[0])

target, sys.argv = sys.argv[1], sys.argv[2:]
atexit.register(report)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A process that writes its peak memory in kB when it ends. What the parent sees of it begins with the parent's own."""


def _peak_memory(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Peak resident memory in MB of `sample.py --num_frames=...`, each in a process of its own, and the ratio."""
    root = Path(__file__).parent.parent
    prompt = "a red circle standing still on a grey background"
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            command = [sys.executable, "-c", REPORT_PEAK, f"{folder}/peak", "sample.py", f"--model={_MODEL.value}"]
            command += [f"--num_frames={length}", f"--prompt={prompt}", f"--out={folder}/{length}.mp4"]
            environment = {**os.environ, "PYTHONPATH": str(root)}
            subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True)
            peaks[f"mb_{length}"] = int(Path(folder, "peak").read_text()) / 1024
    first, *_, last = peaks.values()
    return {**peaks, "ratio": last / first}


def _session_times(model: Any) -> dict[str, Any]:
    """Seconds of the first and the second edit in a session on one clip; compiling, or reading what was, included."""
    clip = model.generate("a red circle moving right on a grey background")
    editor, times = model.editor(clip), []
    for colour in ("blue", "green"):
        started = time.monotonic()
        prompt = f"a {colour} square moving right on a grey background"
        editor.edit(prompt, "a red circle moving right on a grey background")
        times.append(time.monotonic() - started)
    return {"first_s": times[0], "second_s": times[1], "ratio": times[0] / times[1]}


def _short(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value["value"] if isinstance(value, dict) and "value" in value else value
            for name, value in result.items()}  # fmt: skip


if __name__ == "__main__":
    run_script(main)
