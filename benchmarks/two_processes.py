"""Two processes of one run on this machine: the same numbers as one, and what one does when the other is gone.

    python benchmarks/two_processes.py --only=train,stop,killed,frozen,starved

train    `train.py` by two processes, and by one with two devices: losses, models, checkpoints; one goes on for both
stop     SIGTERM to either of them; both go on later, and no step is lost
killed   one, and then the other, killed with -9: what the survivor says, with which code, and when
frozen   one, and then the other, stopped as a whole
starved  one waits for a batch that never comes

Prints one JSON line for each; a `wrong` above 0 is a failure, and the exit code 1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from checkpoint_faults import read_log, worker
from safetensors.numpy import load_file

from vdiff_jax.training.manifest import Manifest

ROOT = Path(__file__).parent.parent
KINDS = ["train", "stop", "killed", "frozen", "starved"]
RECIPE = '''"""An autoencoder of toy size on shapes."""

from vdiff_jax.recipe import default_recipe


def get_config():
    config = default_recipe("autoencoder")
    config.model.autoencoder.update(channels=(8, 8), latent_channels=4)
    config.data.update(size=16, num_frames=3, world_frames=8, batch_size=4)
    config.optimizer.update(warmup_steps=1, learning_rate=1e-3)
    config.train.update(num_steps=8, log_steps=1, checkpoint_steps=4, sample_steps=4)
    return config
'''


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Pair:
    """`fault_run.py` as two processes. second: settings of the second alone. said: what each printed, at the end."""

    def __init__(self, workdir: Path, second: dict[str, float] | None = None, **settings: float):
        self.workdir, self.said = workdir, ["", ""]
        port = free_port()
        self._before = len(read_log(workdir))
        self.runs = [
            worker(workdir, processes=2, process=number, port=port, **settings, **(second or {} if number else {}))
            for number in (0, 1)
        ]

    def logs(self) -> list[list[dict[str, Any]]]:
        return [read_log(self.workdir, number) for number in (0, 1)]

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        """Until process 0 has read the batch of that step, in this start."""
        deadline = time.monotonic() + timeout_s
        while not any(line.get("step", -1) >= step for line in read_log(self.workdir)[self._before :]):
            if time.monotonic() > deadline or self.runs[0].poll() is not None:
                raise RuntimeError(f"step {step} was not reached: {self.ended()} {self.said}")
            time.sleep(0.02)

    def ended(self) -> list[int]:
        """Exit codes."""
        self.said = [run.communicate(timeout=300)[0] for run in self.runs]
        return [run.returncode for run in self.runs]


# One run of train.py ------------------------------------------------------------------------------------------------


def train(recipe: Path, workdir: Path, *options: str, count: int = 2) -> list[tuple[int, str]]:
    """Exit code and messages of each process; count 1: one process with two devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "train.py", f"--config={recipe}", f"--workdir={workdir}", *options]
    port = free_port()
    runs = []
    for number in range(count):
        several = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
        if count == 1:
            environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        runs.append(
            subprocess.Popen(
                command + several * (count > 1), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    said = [run.communicate(timeout=900)[1] for run in runs]
    return [(run.returncode, text) for run, text in zip(runs, said, strict=True)]


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def differing(a: Path, b: Path, step: int = 8) -> dict[str, Any]:
    """How many arrays of two runs' states differ in any bit, and the furthest parameter of their models."""
    states = [Manifest.read(workdir / "checkpoints" / str(step)).arrays for workdir in (a, b)]
    models = [load_file(workdir / "model" / "autoencoder.safetensors") for workdir in (a, b)]
    return {
        "arrays": len(states[0]),
        "differing": sum(states[0][name]["digest"] != states[1][name]["digest"] for name in states[0]),
        "furthest": max(float(np.max(np.abs(models[0][name] - models[1][name]))) for name in models[0]),
    }


def compare_training(folder: Path) -> dict[str, Any]:
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE)
    two, one, mixed = folder / "two", folder / "one", folder / "mixed"
    ends = train(recipe, two) + train(recipe, one, count=1)
    ends += train(recipe, mixed, "--config.train.max_minutes=1e-9") + train(recipe, mixed, count=1)
    codes = [code for code, _ in ends]
    if codes != [0, 0, 0, 75, 75, 0]:
        return {"wrong": 1, "codes": codes, "said": [text[-1500:] for _, text in ends]}
    losses_two, losses_one = losses(two), losses(one)
    relative = max(abs(losses_two[step] / losses_one[step] - 1) for step in losses_one)
    manifest = json.loads((two / "checkpoints" / "8" / "manifest.json").read_text())["content"]
    files = {"metrics.jsonl", "tensorboard", "samples", "model", "goodput.json", "checkpoints", "recipe.json"}
    missing = sorted(files - {path.name for path in two.iterdir()})
    talk = sum("model at step" in text for _, text in ends[:2])
    result = {
        "codes": codes,
        "steps": len(losses_two),
        "losses, largest relative difference": relative,
        "two processes and one": differing(two, one),
        "two, and one that went on for two": differing(two, mixed),
        "processes of the checkpoint": manifest["processes"],
        "missing": missing,
    }
    wrong = (relative > 1e-5) + len(missing) + (manifest["processes"] != 2) + (talk != 1) + (len(losses_two) != 8)
    return {**result, "wrong": wrong + (differing(two, mixed)["furthest"] > 1e-5)}


# Stops and faults ---------------------------------------------------------------------------------------------------


def stop(folder: Path) -> dict[str, Any]:
    ends, wrong = [], 0
    for number in (0, 1):
        workdir = folder / f"stop{number}"
        workdir.mkdir()
        pair = Pair(workdir, steps=10**6, interval=1000, pause=0.02)
        pair.wait_for_step(5)
        signalled = time.monotonic()
        pair.runs[number].send_signal(signal.SIGTERM)
        codes = pair.ended()
        last = [log[-1]["step"] for log in pair.logs()]
        seconds = time.monotonic() - signalled
        again = Pair(workdir, steps=last[0] + 4)
        ended = again.ended()
        starts = [line["start"] for line in again.logs()[0] if "start" in line]
        wrong += (codes != [75, 75]) + (last[0] != last[1]) + (ended != [0, 0]) + (starts != [0, last[0] + 1])
        ends.append({"codes": codes, "last step": last, "seconds": round(seconds, 1), "then started at": starts[-1]})
    return {"SIGTERM to process 0, to process 1": ends, "wrong": wrong}


def fault(folder: Path, kind: str, number: int, heartbeat: float = 5) -> dict[str, Any]:
    """One of two is killed or frozen; the other must end within two heartbeats, with a word."""
    workdir = folder / f"{kind}{number}"
    workdir.mkdir()
    pair = Pair(workdir, steps=10**6, interval=3, heartbeat=heartbeat, pause=0.02)
    pair.wait_for_step(8)
    struck = time.monotonic()
    pair.runs[number].send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    other = pair.runs[1 - number]
    said = other.communicate(timeout=120)[0]
    seconds = time.monotonic() - struck
    pair.runs[number].kill()
    pair.runs[number].wait()
    sentences = [line for line in said.splitlines() if line.startswith("error: process")]
    steps = max(line.get("step", 0) for line in pair.logs()[0]) + 4
    again = worker(workdir, steps=steps)
    again.communicate(timeout=300)
    wrong = (other.returncode not in (76, 77)) + (len(sentences) != 1) + (seconds > 2 * heartbeat + 2)
    return {
        "process": number,
        "code of the other": other.returncode,
        "seconds": round(seconds, 1),
        "said": sentences,
        "taken up by one process": again.returncode,
        "wrong": wrong + (again.returncode != 0),
    }


def starved(folder: Path, heartbeat: float = 5) -> dict[str, Any]:
    """The second waits for its batch of step 9 for ever: it must say so, and the first end as well."""
    workdir = folder / "starved"
    workdir.mkdir()
    pair = Pair(workdir, steps=10**6, interval=3, heartbeat=heartbeat, pause=0.02, second={"stall": 9})
    pair.wait_for_step(8)
    struck = time.monotonic()
    codes = pair.ended()
    seconds = time.monotonic() - struck
    said = [[line for line in text.splitlines() if line.startswith("error: ")] for text in pair.said]
    shown = "fault_run.py" in pair.said[1] and "in batches" in pair.said[1]  # the stack of the waiting thread
    wrong = (codes[1] != 77) + (codes[0] not in (76, 77)) + (seconds > 2 * heartbeat + 2) + (not shown)
    return {
        "codes": codes,
        "seconds": round(seconds, 1),
        "said": said,
        "wrong": wrong + ("waiting for the data loader" not in "".join(said[1])),
    }


def measure(kind: str, folder: Path) -> dict[str, Any]:
    if kind in ("killed", "frozen"):
        found = [fault(folder, kind, number) for number in (1, 0)]
        return {"faults": found, "wrong": sum(one["wrong"] for one in found)}
    return {"train": compare_training, "stop": stop, "starved": starved}[kind](folder)


def main(_: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for kind in flags.FLAGS.only:
            result = measure(kind, Path(name))
            failed += result["wrong"]
            print(json.dumps({"kind": kind, **result}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    flags.DEFINE_list("only", KINDS, "Which.")
    app.run(main)
