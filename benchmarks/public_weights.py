"""Do public weights give what diffusers gives at full size, how fast do they sample, what does loading them take?

    python benchmarks/public_weights.py --out=weights_report.json [--only=parity,load,speed,perturb] [--families=svd]

No weights are downloaded: networks of the published sizes get random ones. Torch and JAX run one after the other in
processes of their own; --torch_python names an interpreter with torch, diffusers and transformers (the extra `oracle`)
where this one has none. Parity and load need about 6 GB of disk and 12 GB of memory and take minutes for each family.

parity   prediction of full-size UNets, the largest difference relative to the largest value, in float32
load     memory of reading 1.4 B parameters to one device and split over four, beside what they are
speed    narrow whole pipelines from prompt, or picture, to frames: seconds of theirs over seconds of ours
perturb  200 times one tensor of a tiny pipeline is dropped, renamed or transposed: is it reported?
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from weights_cases import FULL, PIPELINES
from weights_perturbed import perturb

from vdiff_jax.command import run_script
from vdiff_jax.interop.pretrained import save_json

HERE = Path(__file__).resolve().parent
FASTER = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
_ONLY = flags.DEFINE_list("only", ["parity", "load", "speed", "perturb"], "Parts to run.")
_FAMILIES = flags.DEFINE_list("families", list(FULL), "Families of parity and speed; load takes the first.")
_TORCH = flags.DEFINE_string("torch_python", sys.executable, "Interpreter with torch and diffusers.")
_OUT = flags.DEFINE_string("out", "weights_report.json", "Report; parts that are not run keep what it holds.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder for weights, emptied afterwards; default: a temporary one.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Speed: how often each side's process is started.")
_STEPS = flags.DEFINE_integer("steps", 10, "Speed: denoising steps.")
_FRAMES = flags.DEFINE_integer("num_frames", 8, "Speed: frames.")
_SIZE = flags.DEFINE_integer("size", 128, "Speed: pixels of a side.")
_CORES = flags.DEFINE_integer(
    "cores", 0, "Speed: cores of either side, 0 = all; with 1, processor time hides no waiting."
)
_CHANGES = flags.DEFINE_integer("changes", 200, "Perturb: how many.")


def main(_: list[str]) -> int:
    parts = {"parity": parity, "load": load, "speed": speed, "perturb": lambda folder: perturb(folder, _CHANGES.value)}
    if unknown := set(_ONLY.value) - set(parts):
        raise ValueError(f"--only={','.join(sorted(unknown))}: choose from {', '.join(parts)}")
    if unknown := set(_FAMILIES.value) - set(FULL):
        raise ValueError(f"--families={','.join(sorted(unknown))}: choose from {', '.join(FULL)}")
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    for part in _ONLY.value:
        with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as scratch:
            results = parts[part](Path(scratch))
        report[part] = report.get(part, {}) | results if isinstance(results, dict) else results
        save_json(out, report)
        print(json.dumps({part: results}, indent=2), flush=True)
    return 0


def worker(side: str, task: str, flags: str = "", cores: int = 0, cache: str = "", **settings: Any) -> dict[str, Any]:
    """Run one task in a process of its own.

    side: "torch" or "jax". flags: of XLA. cores: how many of this process's, 0 = all. cache: of compiled programs.
    """
    python = _TORCH.value if side == "torch" else sys.executable
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent, HERE.parent / "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "TRANSFORMERS_VERBOSITY": "error"}
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    # Threads are counted from what a process may use, so the limit must be there before it starts.
    allowed = sorted(os.sched_getaffinity(0))[: cores or None]
    command = [python, str(HERE / f"weights_{side}.py"), json.dumps({"task": task, **settings})]
    print(f"{side} {task} {settings.get('family', '')}", file=sys.stderr, flush=True)
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, allowed)), *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{side} {task} failed: {done.stderr.strip()[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"    {result}", file=sys.stderr, flush=True)
    return result


def parity(scratch: Path) -> dict[str, Any]:
    results = {}
    for family in _FAMILIES.value:
        folder = scratch / family
        folder.mkdir()
        written = worker("torch", "write_unet", family=family, folder=str(folder))
        asked = dict(family=family, folder=str(folder), num_frames=3, height=8, width=16)
        sides = {
            side: worker(side, "predict", out=str(scratch / f"{family}_{side}.npy"), **asked)
            for side in ("torch", "jax")
        }
        shutil.rmtree(folder)
        theirs, ours = (np.load(scratch / f"{family}_{side}.npy") for side in ("torch", "jax"))
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        results[family] = {"class": FULL[family]["_class_name"], "parameters": written["parameters"], "error": error}
        results[family] |= sides
        print(f"{family}: {error:.2g}", file=sys.stderr, flush=True)
    return results


def load(scratch: Path) -> dict[str, Any]:
    family = _FAMILIES.value[0]
    worker("torch", "write_unet", family=family, folder=str(scratch))
    four = "--xla_force_host_platform_device_count=4"
    runs = [("host", "", "float32"), ("one_device", "", "float32"), ("all_devices", four, "float32")]
    runs += [("one_device", "", "bfloat16"), ("all_devices", four, "bfloat16")]
    return {"family": family} | {
        f"{place}_{dtype}": worker("jax", "load_memory", flags, folder=str(scratch), place=place, dtype=dtype)
        for place, flags, dtype in runs
    }


def speed(scratch: Path) -> dict[str, Any]:
    """Both sides in turn, so that what else the machine does meets both."""
    results: dict[str, Any] = {}
    asked = dict(steps=_STEPS.value, num_frames=_FRAMES.value, size=_SIZE.value, repeats=1)
    process = dict(cores=_CORES.value, cache=str(scratch / "compiled"))
    for family in (family for family in _FAMILIES.value if family in PIPELINES):
        folder = str(scratch / family)
        written = worker("torch", "write_pipeline", family=family, folder=folder)
        runs: dict[str, list[dict[str, Any]]] = {"torch": [], "jax": [], "jax_with_flags": []}
        for _ in range(_ROUNDS.value):
            for name, found in runs.items():
                flags = FASTER if name == "jax_with_flags" else ""
                side = name.partition("_")[0]
                found.append(worker(side, "sample", flags, family=family, folder=folder, **process, **asked))
        results[family] = (
            asked
            | {"cores": _CORES.value or os.cpu_count()}
            | written
            | {name: _medians(found) for name, found in runs.items()}
        )
        for name in ("jax", "jax_with_flags"):
            for unit in ("wall_s", "processor_s"):
                ratio = results[family]["torch"][unit] / results[family][name][unit]
                results[family][f"torch_over_{name}_{unit.removesuffix('_s')}"] = round(ratio, 3)
        print(json.dumps(results[family]), file=sys.stderr, flush=True)
    return {f"{_CORES.value or 'all'}_cores": results}


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    wall, processor = zip(*(run for found in runs for run in found["runs"]))
    return {
        "first_s": runs[0]["first_s"],
        "wall_s": statistics.median(wall),
        "processor_s": statistics.median(processor),
        "all_wall_s": [round(value, 3) for value in wall],
        "peak_resident_gb": max(found["peak_resident_gb"] for found in runs),
    }


if __name__ == "__main__":
    run_script(main)
