"""Everything that waits for an accelerator, in order of priority, in slices of a few minutes.

    python benchmarks/gpu_queue.py --workdir=runs/gpu --minutes=9      # run it again until it says that all is done
    python benchmarks/gpu_queue.py --workdir=runs/gpu --list           # how far is each item?
    python benchmarks/gpu_queue.py --dry_run                           # all items, tiny, on the CPU

Items are commands of this repository, run one after another. A training item stops at the end of the slice with a
checkpoint and goes on in the next one; other items start only if the slice has room for them. What is finished is
remembered in WORKDIR/queue.json and skipped, what failed is tried again. Exit code 0: all finished; 75: run it again;
1: an item failed. WORKDIR/export holds what is worth taking away: the model in fp16 and the reports.

The queue itself needs only Python; its items need jax, flax, optax, orbax-checkpoint, numpy, scipy, einops, absl-py,
jaxtyping, rich, safetensors, tokenizers and pillow. A machine without network gets what it lacks as wheels:

    pip download --no-deps -d wheels ml_collections tensorboardX
    python benchmarks/gpu_queue.py --workdir=runs/gpu --minutes=9 --wheels=wheels

Times are meant for one H200: about 5 minutes for the autoencoder, 10 each for the model and its control.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOPPED_EARLY = 75  # what train.py returns at its time limit
DIFFUSION_MINUTES = 10.0
BATCH_SIZE = 256
AUTOENCODER = "configs/shapes_full_autoencoder.py"
DIFFUSION = "configs/shapes_full.py"
PLAIN_ROW = {"text_to_video": 1.0, "known_frames": 0.0, "hole": 0.0, "ramp": 0.0, "independent": 0.0}

TINY_DATA = ["data.size=32", "data.batch_size=4", "train.num_steps=3", "train.log_steps=1"]
TINY_AUTOENCODER = [*TINY_DATA, "model.autoencoder.channels=(8,8,8)", "model.autoencoder.mid_attention=False"]
TINY_DIFFUSION = [
    *TINY_DATA,
    "model.unet.channels=(8,16)",
    "model.unet.attention=(False,True)",
    "model.unet.embedding_features=16",
    "model.unet.head_dim=8",
    "model.text_encoder.features=8",
    "model.text_encoder.hidden_features=8",
    "model.text_encoder.layers=1",
    "model.text_encoder.head_dim=8",
    "data.num_frames=4",
    "sample.steps=2",
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the queue works, whether it is the tiny rehearsal, and the results so far by item."""

    workdir: Path
    dry_run: bool
    results: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Item:
    """One job: `command(plan)` gives the arguments of a python process, `result(plan)` what to remember of it.

    needs: items that must be finished before. minutes: expected time. sliced: it takes `train.max_minutes` and
    returns 75 when that is over.
    """

    name: str
    about: str
    command: Callable[[Plan], list[str]]
    needs: tuple[str, ...] = ()
    minutes: float = 3.0
    sliced: bool = False
    result: Callable[[Plan], dict[str, Any]] = lambda plan: {}


# Items -----------------------------------------------------------------------------------------------------------


def training(name: str, config: str, settings: Sequence[str] = (), tiny: Sequence[str] = ()) -> Callable:
    def command(plan: Plan) -> list[str]:
        every = [*settings, f"train.num_steps={steps_of(plan)}"] if name in ("shapes", "plain") else [*settings]
        if config == DIFFUSION:
            every.append(f"model.autoencoder_from={plan.workdir / 'autoencoder'}")
        every += tiny if plan.dry_run else ()
        return ["train.py", f"--config={config}", f"--workdir={plan.workdir / name}", *(f"--config.{s}" for s in every)]

    return command


def steps_of(plan: Plan) -> int:
    """Training steps that fit into DIFFUSION_MINUTES at the measured pace; the same for the model and its control."""
    pace = plan.results.get("pace", {}).get("clips_per_s", 0.0)
    return min(max(round(pace * 60 * DIFFUSION_MINUTES / BATCH_SIZE), 1000), 40000)


def evaluation(model: str, out: str, metrics: str, split: str) -> Callable:
    def command(plan: Plan) -> list[str]:
        sizes = ["--config.data.size=32", "--num_clips=4", "--batch_size=2", "--steps=2"] if plan.dry_run else []
        return [
            "evaluate.py",
            f"--model={plan.workdir / model}",
            f"--config={DIFFUSION}",
            f"--metrics={metrics}",
            f"--split={split}",
            f"--out={report_path(plan, out)}",
            *(sizes or ["--num_clips=500", "--batch_size=100"]),
        ]

    return command


def export(plan: Plan) -> list[str]:
    source, target = str(plan.workdir / "shapes"), str(plan.workdir / "export" / "shapes")
    code = "import sys; from vdiff_jax.pipeline import load; load(sys.argv[1]).save_pretrained(sys.argv[2], 'float16')"
    return ["-c", code, source, target]


def speed(plan: Plan) -> list[str]:
    sizes = [*(f"--config.{s}" for s in TINY_DIFFUSION), "--clips=2", "--repeats=2"] if plan.dry_run else []
    return [
        "benchmarks/speed.py",
        f"--config={DIFFUSION}",
        f"--config.model.autoencoder_from={plan.workdir / 'autoencoder'}",
        f"--model={plan.workdir / 'shapes'}",
        f"--out={report_path(plan, 'speed')}",
        *sizes,
    ]


def report_path(plan: Plan, name: str) -> Path:
    return plan.workdir / "export" / f"{name}.json"


def read_report(plan: Plan, name: str) -> dict[str, Any]:
    return json.loads(report_path(plan, name).read_text(encoding="utf-8"))


def read_pace(plan: Plan) -> dict[str, Any]:
    """Clips per second of the last logged interval, which holds no compilation."""
    lines = (plan.workdir / "pace" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"clips_per_s": [row["clips_per_s"] for row in map(json.loads, lines) if "clips_per_s" in row][-1]}


def read_accuracy(name: str, split: str) -> Callable[[Plan], dict[str, Any]]:
    def result(plan: Plan) -> dict[str, Any]:
        figures = read_report(plan, name)["results"]["alignment"][split]["model"]
        return {key: figures[key]["value"] for key in figures}

    return result


def read_known_frames(plan: Plan) -> dict[str, Any]:
    results = read_report(plan, "known_frames")["results"]
    return {metric: results[metric]["with prompt"]["gain"]["value"] for metric in ("prediction", "interpolation")}


def read_control(plan: Plan) -> dict[str, Any]:
    """Accuracy of the control, and by how much the mixture is better (points of 100)."""
    plain = read_accuracy("plain", "iid")(plan)["all"]
    return {"all": plain, "mixture_gain_points": 100 * (plan.results["alignment_iid"]["all"] - plain)}


ITEMS = (
    Item("autoencoder", "autoencoder of the full world", training("autoencoder", AUTOENCODER, tiny=TINY_AUTOENCODER),
         minutes=5, sliced=True),
    Item("pace", "clips per second of the diffusion training, to size it",
         training("pace", DIFFUSION, ["train.num_steps=150", "train.log_steps=50"], TINY_DIFFUSION),
         ("autoencoder",), 2, True, read_pace),
    Item("shapes", "the model of the full world", training("shapes", DIFFUSION, tiny=TINY_DIFFUSION),
         ("autoencoder", "pace"), DIFFUSION_MINUTES, True),
    Item("export", "its fp16 copy", export, ("shapes",), 1),
    Item("alignment_iid", "prompt following", evaluation("shapes", "alignment_iid", "alignment", "iid"),
         ("shapes",), 4, result=read_accuracy("alignment_iid", "iid")),
    Item("alignment_combo", "prompt following, combinations never seen",
         evaluation("shapes", "alignment_combo", "alignment", "combo"),
         ("shapes",), 4, result=read_accuracy("alignment_combo", "combo")),
    Item("known_frames", "prediction, interpolation, codec",
         evaluation("shapes", "known_frames", "prediction,interpolation,codec", "iid"),
         ("shapes",), 5, result=read_known_frames),
    Item("plain", "control: the same budget on text-to-video alone",
         training("plain", DIFFUSION, [f"diffusion.mixture.{k}={v}" for k, v in PLAIN_ROW.items()], TINY_DIFFUSION),
         ("autoencoder", "pace"), DIFFUSION_MINUTES, True),
    Item("plain_alignment", "prompt following of the control", evaluation("plain", "plain", "alignment", "iid"),
         ("plain", "alignment_iid"), 4, result=read_control),
    Item("speed", "training step and sampler: clips/s, TFLOP/s, share of peak", speed, ("shapes",), 3,
         result=lambda plan: read_report(plan, "speed")),
)  # fmt: skip


# The queue -------------------------------------------------------------------------------------------------------


def read_state(workdir: Path) -> dict[str, dict[str, Any]]:
    path = workdir / "queue.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_state(workdir: Path, state: dict[str, dict[str, Any]]) -> None:
    temporary = workdir / f".queue.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, workdir / "queue.json")


def run_queue(
    items: Sequence[Item],
    workdir: Path,
    minutes: float,
    run: Callable[[Item, list[str], float], int],
    *,
    dry_run: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """One slice: run what is next until `minutes` are over; returns 0, 75 or 1, see the module docstring.

    run(item, arguments, minutes left) -> exit code; 75 from a sliced item means that it has more to do.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    state = read_state(workdir)
    started = clock()
    ran, failed = 0, False
    for item in items:
        entry = state.setdefault(item.name, {"status": "waiting", "slices": 0, "seconds": 0.0})
        if entry["status"] == "finished":
            continue
        if any(state.get(need, {}).get("status") != "finished" for need in item.needs):
            continue
        left = minutes - (clock() - started) / 60
        if ran and left < (1.0 if item.sliced else item.minutes):
            break
        results = {name: row["result"] for name, row in state.items() if "result" in row}
        begun = clock()
        code = run(item, item.command(Plan(workdir, dry_run, results)), left)
        ran += 1
        entry["slices"] += 1
        entry["seconds"] = round(entry["seconds"] + clock() - begun, 1)
        if code == 0:
            entry |= {"status": "finished", "result": item.result(Plan(workdir, dry_run, results))}
        else:
            entry["status"] = "unfinished" if code == STOPPED_EARLY else f"failed with exit code {code}"
            failed |= code != STOPPED_EARLY
        write_state(workdir, state)
        if code == STOPPED_EARLY:
            break
    if failed:
        return 1
    return 0 if all(state.get(item.name, {}).get("status") == "finished" for item in items) else STOPPED_EARLY


def run_item(item: Item, arguments: list[str], minutes: float, environment: Mapping[str, str]) -> int:
    """The item as a process; a sliced one is told to stop a minute before the end, for its last checkpoint."""
    if item.sliced:
        arguments = [*arguments, f"--config.train.max_minutes={max(minutes - 1.0, 0.0001):g}"]
    print(f"== {item.name}: {' '.join(arguments)}", file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=dict(environment), check=False).returncode


def rehearse(workdir: Path) -> int:
    """All items, tiny, on the CPU; a sliced item is stopped after its first step and resumed."""
    quick_compile = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = child_environment(None, workdir) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compile}

    def run(item: Item, arguments: list[str], minutes: float) -> int:
        first = read_state(workdir).get(item.name, {"slices": 0})["slices"] == 0
        return run_item(item, arguments, 0.0 if item.sliced and first else 60.0, environment)

    code = STOPPED_EARLY
    while code == STOPPED_EARLY:
        code = run_queue(ITEMS, workdir, 60.0, run, dry_run=True)
    print(table(ITEMS, workdir))
    return code


def child_environment(wheels: Path | None, workdir: Path) -> dict[str, str]:
    """The environment of the items: our code, and the wheels unpacked once under WORKDIR/site."""
    site = workdir / "site"
    if wheels is not None and not site.is_dir():
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        if not files:
            raise SystemExit(f"error: {wheels} holds no .whl files: fill it with `pip download --no-deps`")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *files]
        subprocess.run(pip, check=True)
    paths = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def table(items: Sequence[Item], workdir: Path) -> str:
    state = read_state(workdir)
    lines = []
    for item in items:
        entry = state.get(item.name, {"status": "waiting", "slices": 0, "seconds": 0.0})
        result = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.get("result", {}).items()}
        spent = f"{entry['slices']} slices, {entry['seconds'] / 60:.1f} min"
        lines.append(f"{item.name:<16} {entry['status']:<12} {spent:<20} {result or item.about}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="folder of the queue; default runs/gpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this slice")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack for the items")
    parser.add_argument("--list", action="store_true", help="print the state of the items and stop")
    parser.add_argument("--dry_run", action="store_true", help="run every item in tiny size on the CPU")
    flags = parser.parse_args()
    if flags.dry_run:
        with tempfile.TemporaryDirectory(prefix="gpu_queue_") as folder:
            return rehearse((flags.workdir or Path(folder)).resolve())
    workdir = (flags.workdir or ROOT / "runs" / "gpu").resolve()
    if flags.list:
        print(table(ITEMS, workdir))
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    environment = child_environment(flags.wheels, workdir)

    def run(item: Item, arguments: list[str], minutes: float) -> int:
        return run_item(item, arguments, minutes, environment)

    code = run_queue(ITEMS, workdir, flags.minutes, run)
    print(table(ITEMS, workdir))
    return code


if __name__ == "__main__":
    sys.exit(main())
