"""Damage to checkpoints and to the runs that write them: what is noticed, what is lost. Prints one JSON line per kind.

    python benchmarks/checkpoint_faults.py --only=bits,truncate,kill,resume,full,processes

bits       200 single flipped bits, over every file of a checkpoint; 20 more before the files were digested
truncate   every file deleted, emptied and cut in half
kill       30 runs with continuous async saves, each killed with -9 at a random moment and taken up by the next
resume     a run of 12 steps, taken up at each of its steps
full       a small file system that fills up (needs the right to mount one), and one that turns read-only
processes  two processes save, one takes up the run, and the other way round; damage is agreed on

A `silent`, `unnamed` or `wrong` above 0 is a failure, and the exit code 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from checkpoint_damage import Saved, bits, early_bits, equal, flip_bit, truncate
from fault_run import make_loader, start, train

from vdiff_jax import parallel
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.manifest import Manifest

ROOT = Path(__file__).parent.parent
FAILURES = ("silent", "unnamed", "wrong")
KINDS = ["bits", "truncate", "kill", "resume", "full", "processes"]


# Runs that are cut off ---------------------------------------------------------------------------------------------


def worker(workdir: Path, **settings: float) -> subprocess.Popen:
    """A run in a process of its own, with one device."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    given = json.dumps({"workdir": str(workdir), **settings})
    command = [sys.executable, str(ROOT / "benchmarks" / "fault_run.py"), given]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_log(workdir: Path, process: int = 0) -> list[dict[str, Any]]:
    path = workdir / f"clips.{process}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off


def kill(folder: Path, trials: int, rng: random.Random, interval: int = 2) -> dict[str, Any]:
    """Each run starts where the one before was killed; the last one is left to finish."""
    workdir = folder / "killed"
    workdir.mkdir()
    unfinished = leftovers = 0
    for _ in range(trials):
        before = len(read_log(workdir))
        run = worker(workdir, steps=10**6, interval=interval)
        deadline = time.monotonic() + 120
        while len(read_log(workdir)) < before + 4 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random())
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=300)
        folders = [path for path in (workdir / "checkpoints").iterdir() if "damaged" not in path.name]
        leftovers += any("tmp" in path.name for path in folders)
        unfinished += any(path.name.isdigit() and not (path / "manifest.json").exists() for path in folders)
    last = max(line.get("step", 0) for line in read_log(workdir)) + 5
    run = worker(workdir, steps=last, interval=interval)
    output = run.communicate(timeout=300)[0]
    wrong = check_order(read_log(workdir), interval) + (run.returncode != 0)
    stale = sum("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    final = Checkpoints(workdir)
    wrong += final.latest_step != last
    final.close()
    result = {"kills": trials, "steps": last, "killed in a save": leftovers, "before the manifest": unfinished}
    return {
        **result,
        **lost_steps(read_log(workdir), interval),
        "stale": stale,
        "wrong": wrong + stale,
        "said": output[-300:] if wrong else "",
    }


def sessions(log: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = []
    for line in log:
        if "start" in line:
            found.append([])
        found[-1].append(line)
    return found


def lost_steps(log: list[dict[str, Any]], interval: int) -> dict[str, int]:
    """At worst: steps that were done again, and checkpoints begun before the kill that were not restored."""
    lost, saves = [0], [0]
    for before, after in zip(sessions(log), sessions(log)[1:]):
        done = max((line["step"] for line in before[1:]), default=before[0]["start"])
        lost.append(done - after[0]["start"])
        saves.append(done // interval - after[0]["start"] // interval)
    return {"most steps lost": max(lost), "saves lost": max(saves)}


def check_order(log: list[dict[str, Any]], interval: int) -> int:
    """Mistakes: a start that goes back or loses more than the save in progress, a step left out, other clips."""
    expected, wrong, newest = make_loader(), 0, 0
    for session in sessions(log):
        first = session[0]["start"]
        wrong += first < newest
        newest = max(newest, first)
        wrong += [line["step"] for line in session[1:]] != list(range(first, first + len(session) - 1))
        wrong += sum(line["clips"] != expected.host_batch_at(line["step"]).names for line in session[1:])
    return wrong + max(0, lost_steps(log, interval)["saves lost"] - 1)


def resume(folder: Path, steps: int = 12) -> dict[str, Any]:
    """Taken up at every step; state, metrics and next batch compared bitwise with the uninterrupted run."""
    mesh, wrong = parallel.make_mesh(), 0
    with jax.set_mesh(mesh):
        state, shardings, step = start(mesh)
        checkpoints = Checkpoints(folder / "resume", keep=steps + 1)
        key, states, metrics, batches = jax.random.key(2), [], [], []
        stream = make_loader().host_batches(0)
        for _ in range(steps):
            checkpoints.save(state, {})
            states.append(jax.device_get(state))
            batches.append(next(stream).arrays["video"])
            state, measured = step(state, parallel.shard_batch({"video": batches[-1]}, mesh), key)
            metrics.append(jax.device_get(measured))
        states.append(jax.device_get(state))
        checkpoints.wait()
        abstract = jax.eval_shape(lambda tree: tree, state)
        for at in range(steps):
            state, _ = checkpoints.restore(abstract, shardings, at)
            stream = make_loader().host_batches(at)
            for number in range(at, steps):
                batch = next(stream).arrays["video"]
                wrong += not equal(state, states[number]) or not equal(batch, batches[number])
                state, measured = step(state, parallel.shard_batch({"video": batch}, mesh), key)
                wrong += not equal(measured, metrics[number])
            wrong += not equal(state, states[steps])
        checkpoints.close()
    return {"steps": steps, "resumed at": steps, "wrong": wrong}


# Storage that refuses ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A file system of its own, or None where the system does not let us."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def full(folder: Path) -> dict[str, Any]:
    """A disk that takes two checkpoints and not three, then one that turns read-only, each for a whole run."""
    result: dict[str, Any] = {}
    with small_disk(folder / "small" / "checkpoints", "2m") as disk:
        if disk is None:
            return {"skipped": "no right to mount a file system", "wrong": 0}
        run = worker(folder / "small", steps=4)
        run.communicate(timeout=300)
        good = manifests(disk)
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()
        run = worker(folder / "small", steps=9)
        said = run.communicate(timeout=300)[0]
        # Training went on through two failed saves; the last one ends the run; what was good is untouched.
        reached = max(line.get("step", 0) for line in read_log(folder / "small"))
        result["full"] = {"code": run.returncode, "reached": reached, "said": said.count("could not be written")}
        wrong = (
            (run.returncode == 0)
            + (reached != 8)
            + (said.count("could not be written") < 3)
            + (manifests(disk) != good)
        )
        ballast.unlink()
        run = worker(folder / "small", steps=9)
        wrong += run.wait() != 0 or 9 not in manifests(disk)
        good = manifests(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = worker(folder / "small", steps=12)
        said = run.communicate(timeout=300)[0]
        reached = max(line.get("step", 0) for line in read_log(folder / "small"))
        wrong += (
            (run.returncode == 0) + (reached != 11) + ("could not be written" not in said) + (manifests(disk) != good)
        )
        result["read-only"] = {"code": run.returncode, "reached": reached, "said": said.count("could not be written")}
        return {**result, "wrong": wrong, "output": said[-600:] if wrong else ""}


def manifests(folder: Path) -> dict[int, bytes]:
    """Step -> manifest, of the checkpoints whose every file is as it was saved."""
    found = {}
    for path in sorted(folder.glob("[0-9]*/manifest.json")):
        if path.parent.name.isdigit() and Manifest.read(path.parent).first_damage(path.parent) is None:
            found[int(path.parent.name)] = path.read_bytes()
    return found


# Several processes -------------------------------------------------------------------------------------------------


def together(workdir: Path, steps: int, count: int = 2) -> list[str]:
    """A run of `count` processes to `steps`; what each said. Raises RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [worker(workdir, steps=steps, processes=count, process=number, port=port) for number in range(count)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    if any(run.returncode for run in runs):
        raise RuntimeError(f"codes {[run.returncode for run in runs]}: {said}")
    return said


def processes(folder: Path) -> dict[str, Any]:
    """Two processes, one, two again, and two after damage; compared with one process all the way."""
    mixed, alone = folder / "mixed", folder / "alone"
    mixed.mkdir()
    alone.mkdir()
    together(mixed, 4)
    train(mixed, 8, 2)
    together(mixed, 12)
    newest = mixed / "checkpoints" / "12"
    flip_bit(max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file()), 4321)
    said = together(mixed, 12)
    state, expected = train(mixed, 13, 2), train(alone, 13, 2)
    starts = [[line["start"] for line in read_log(mixed, process) if "start" in line] for process in (0, 1)]
    furthest = max(
        float(np.max(np.abs(np.asarray(a) - b))) for a, b in zip(*map(jax.tree.leaves, (state.params, expected.params)))
    )
    wrong = (
        (starts != [[0, 4, 8, 10, 12], [0, 8, 10]])
        + (furthest > 1e-5)
        + sum("Falling back to step 10" not in one for one in said)
    )
    return {"starts": starts, "furthest parameter": furthest, "wrong": wrong}


def main(_: list[str]) -> int:
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    rng, failed = random.Random(values.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in values.only:
            started = time.monotonic()
            result = measure(kind, folder, values.trials, rng)
            failed += sum(found.get(word, 0) for found in (result, result.get("before", {})) for word in FAILURES)
            print(json.dumps({"kind": kind, **result, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    return int(failed > 0)


def measure(kind: str, folder: Path, trials: int, rng: random.Random) -> dict[str, Any]:
    if kind == "bits":
        saved = Saved(folder)
        return {**bits(saved, trials or 200, rng), "before": early_bits(saved, trials // 10 or 20, rng)}
    if kind == "truncate":
        saved = Saved(folder)
        return truncate(saved, saved.files())
    if kind == "kill":
        return kill(folder, trials or 30, rng)
    return {"resume": resume, "full": full, "processes": processes}[kind](folder)


if __name__ == "__main__":
    flags.DEFINE_list("only", KINDS, "Which faults.")
    flags.DEFINE_integer("trials", 0, "Flips or kills; default 200 and 30.")
    flags.DEFINE_integer("seed", 0, "Of the random choices.")
    app.run(main)
