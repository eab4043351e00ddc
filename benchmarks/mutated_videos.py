"""Does any damaged video file crash, hang or swell the reading of a folder? A fuzz of the real path, no stand-ins.

    python benchmarks/mutated_videos.py --count=1000 --out=mutated_videos.json

Small clips are made in place in a dozen containers and codecs and mutated (`video_mutations.py`): flipped bits, cut
ends, foreign headers, splices, giant declared sizes, durations and counts, runs of zeros, repeated parts, letters
named .mp4. A child process first probes and reads every file on its own, so that a crash or a hang is put down to one
file; a second one opens them all with the whole clips as one `FolderSource` and reads an epoch through the `Loader`,
as training does.
The exit code is 0 only if nothing crashed or hung, every file was either read or left out with a reason, every whole
clip was read, and memory stayed within `--max_gib`.
"""

from __future__ import annotations

import collections
import json
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from video_mutations import make_originals, mutate

from vdiff_jax.command import run_script
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import FolderSource, Windows
from vdiff_jax.data.video_io import VideoError, probe, read_video

_COUNT = flags.DEFINE_integer("count", 1000, "Mutated files.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the mutations.")
_FOLDER = flags.DEFINE_string("folder", None, "Where the files are kept; default: a temporary folder.")
_OUT = flags.DEFINE_string("out", None, "Where the figures are written as JSON.")
_LIMIT_S = flags.DEFINE_float("limit_s", 60.0, "A single file that takes longer counts as a hang.")
_MAX_GIB = flags.DEFINE_float("max_gib", 2.0, "Most resident memory of the reading process.")
_PART = flags.DEFINE_enum("part", "", ["", "each", "epoch"], "Inner: what a child process does with --folder.")

NUM_FRAMES, SIZE = 4, 32


# ---- what the child processes do ----------------------------------------------------------------------------------


def read_each() -> None:
    """Probe and read every file whole, one at a time; a line of JSON before and after each."""
    for path in map(Path, sys.stdin.read().splitlines()):
        print(json.dumps({"begins": path.name}), flush=True)
        began = time.perf_counter()
        try:
            probe(path)
            clip = read_video(path, size=SIZE)
            reason = ""
            assert clip.frames.shape[1:] == (SIZE, SIZE, 3)
        except VideoError as error:
            reason = str(error)
        figures = {"name": path.name, "seconds": time.perf_counter() - began, "reason": reason, "peak": peak_bytes()}
        print(json.dumps(figures), flush=True)


def read_epoch(folder: Path) -> dict[str, Any]:
    """Open the folder as training does and read one epoch."""
    began = time.perf_counter()
    source = FolderSource(folder, Windows(NUM_FRAMES), SIZE)
    opened_s = time.perf_counter() - began
    loader: Any = Loader(source, None, batch_size=8, num_threads=2)
    steps = -(-len(source) // 8)
    read = set()
    batches: Any = loader.host_batches()
    for _ in range(steps):
        batch = next(batches)
        read |= set(batch.names)
        assert np.isfinite(batch.arrays["video"]).all()
    batches.close()
    return {
        "opened_s": opened_s,
        "seconds": time.perf_counter() - began,
        "usable": len(source),
        "left_out": source.skipped.reasons,
        "unread": loader.skipped.reasons,
        "read": sorted(read),
        "peak": peak_bytes(),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- the parent ---------------------------------------------------------------------------------------------------


def each_alone(paths: list[Path], limit_s: float) -> dict[str, dict[str, Any]]:
    """name -> figures of every file; a child that dies or hangs is replaced, and its file says so."""
    found: dict[str, dict[str, Any]] = {}
    while left := [path for path in paths if path.name not in found]:
        current = ""
        command = [sys.executable, __file__, "--part=each", f"--folder={left[0].parent}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
            assert child.stdin
            child.stdin.write("\n".join(map(str, left)).encode())
            child.stdin.close()
            for line in _lines(child, limit_s):
                current = line.get("begins", "")
                if not current:
                    found[line["name"]] = line
            child.kill()
        if current:
            state = "hung" if child.returncode in (0, -9) else "crashed"
            found[current] = {"name": current, "fate": state, "code": child.returncode}
            print(f"{state}: {current} ({child.returncode})", file=sys.stderr)
        elif len(left) == len([path for path in paths if path.name not in found]):
            raise RuntimeError("the child process reads nothing: run it by hand with --part=each")
    return found


def _lines(child: subprocess.Popen, limit_s: float) -> Iterator[dict[str, Any]]:
    """Lines until the end, or until none has come for `limit_s`."""
    assert child.stdout
    while select.select([child.stdout], [], [], limit_s)[0]:
        line = child.stdout.readline()
        if not line:
            child.wait()
            return
        yield json.loads(line)


def report(each: dict[str, dict[str, Any]], epoch: dict[str, Any], originals: list[Path]) -> dict[str, Any]:
    bad = {name: figures for name, figures in each.items() if "fate" in figures}
    alone = [figures for figures in each.values() if "fate" not in figures]
    slowest = max(alone, key=lambda figures: figures["seconds"])
    accounted = set(epoch["left_out"]) | set(epoch["unread"]) | set(epoch["read"])
    kinds = collections.Counter(name.split("_", 1)[1].rsplit("_", 1)[0] for name in epoch["left_out"])
    return {
        "files": len(each),
        "crashed": [name for name, figures in bad.items() if figures["fate"] == "crashed"],
        "hung": [name for name, figures in bad.items() if figures["fate"] == "hung"],
        "read_alone": sum(not figures["reason"] for figures in alone),
        "refused_alone": sum(bool(figures["reason"]) for figures in alone),
        "slowest_s": slowest["seconds"],
        "slowest": slowest["name"],
        "peak_alone_gib": max(figures["peak"] for figures in alone) / 2**30,
        "left_out": len(epoch["left_out"]),
        "left_out_by_mutation": dict(kinds),
        "unread": len(epoch["unread"]),
        "read": len(epoch["read"]),
        "opened_s": epoch["opened_s"],
        "epoch_s": epoch["seconds"],
        "peak_epoch_gib": epoch["peak"] / 2**30,
        "unaccounted": sorted(set(each) - accounted),
        "whole_clips_lost": sorted({path.name for path in originals} - set(epoch["read"])),
    }


def main(_: list[str]) -> int:
    if _PART.value == "each":
        read_each()
        return 0
    if _PART.value == "epoch":
        print(json.dumps(read_epoch(Path(_FOLDER.value or ""))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary)
        originals = make_originals(folder / "clips" / "whole")
        names = mutate(originals, folder / "clips" / "mutated", _COUNT.value, _SEED.value)
        each = each_alone([folder / "clips" / "mutated" / name for name in names], _LIMIT_S.value)
        command = [sys.executable, __file__, "--part=epoch", f"--folder={folder / 'clips'}"]
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=3600)
        if child.returncode:
            print(f"the epoch ended with {child.returncode}", file=sys.stderr)
            return 1
        epoch = json.loads(child.stdout.splitlines()[-1])
        for part in ("left_out", "unread"):
            epoch[part] = {Path(name).name: reason for name, reason in epoch[part].items()}
        epoch["read"] = [Path(name).name for name in epoch["read"]]
        figures = report(each, epoch, originals)
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:<22} {format(value, '.3g') if isinstance(value, float) else value}")
    faults = [*(figures[name] for name in ("crashed", "hung", "unaccounted", "whole_clips_lost"))]
    swollen = max(figures["peak_alone_gib"], figures["peak_epoch_gib"]) > _MAX_GIB.value
    return int(any(faults) or swollen)


if __name__ == "__main__":
    run_script(main)
