"""Does any damaged video file crash, hang or swell the reading of a folder? A fuzz of the real path, no stand-ins.

    python benchmarks/mutated_videos.py --count=1000 --out=mutated_videos.json

Small clips are made in place in eleven containers and codecs and mutated: flipped bits, cut ends, foreign headers,
splices, giant declared sizes, durations and counts, runs of zeros, repeated parts, letters named .mp4. A child process
first probes and reads every file on its own, so that a crash or a hang is put down to one file; a second one opens
them all with the whole clips as one `FolderSource` and reads an epoch through the `Loader`, as training does.
The exit code is 0 only if nothing crashed or hung, every file was either read or left out with a reason, every whole
clip was read, and memory stayed within `--max_gib`.
"""

from __future__ import annotations

import collections
import json
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from absl import flags
from PIL import Image

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
CODECS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "av1.mp4": ("libsvtav1", "yuv420p"),
    "hevc.mkv": ("libx265", "yuv420p"),
    "ffv1.mkv": ("ffv1", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
    "mpeg2.ts": ("mpeg2video", "yuv420p"),
    "sorenson.flv": ("flv", "yuv420p"),
}
IMAGES = {"palette.gif": {}, "apng.png": {}, "animated.webp": {"quality": 80}}


# ---- whole clips and their mutations ------------------------------------------------------------------------------


def make_originals(folder: Path) -> list[Path]:
    """Twelve moving frames of 64 x 64 in every container; those whose encoder is missing are left out."""
    t, y, x = np.mgrid[0:12, 0:64, 0:64].astype(np.float64)
    waves = [np.sin((x + 2 * t) / 9), np.cos((y - 3 * t) / 11), np.sin((x + y) / 25 + t / 5)]
    frames = (127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, pixels) in CODECS.items():
        if codec in av.codecs_available:
            _encode(folder / name, frames, codec, pixels)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    for name, options in IMAGES.items():
        target = folder / name.replace(".png", ".apng")
        kind = "PNG" if name.endswith(".png") else None
        first.save(target, format=kind, save_all=True, append_images=rest, duration=80, loop=0, **options)
    return sorted(folder.iterdir())


def _encode(path: Path, frames: np.ndarray, codec: str, pixels: str) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.gop_size = 6
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


Bytes = np.ndarray  # u8 [n]


def flip_bits(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    """1 to 64 bits, in half of the cases all within the first 512 bytes, where the headers are."""
    end = min(len(data), 512) if rng.random() < 0.5 else len(data)
    places = rng.integers(end, size=int(2 ** rng.integers(7)))
    data[places] ^= np.uint8(1) << rng.integers(8, size=len(places)).astype(np.uint8)
    return data


def cut(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    return data[: int(rng.integers(len(data)))]


def foreign_header(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    length = int(rng.choice([4, 12, 64, 256]))
    data[:length] = np.resize(other[:length], len(data[:length]))
    return data


def splice(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    return np.concatenate([data[: int(rng.integers(len(data)))], other[int(rng.integers(len(other))) :]])


def giant_size(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    """Every 64 that looks like a declared width or height becomes a giant."""
    raw = bytes(data)
    for form in (">H", "<H", ">I", "<I"):
        giant = int(rng.choice([4097, 16384, 65500] + ([2**24, 2**31 - 1] if form[1] == "I" else [])))
        pair = struct.pack(form, 64) * 2
        raw = raw.replace(pair, struct.pack(form, giant) * 2)
        alone = struct.pack(form, 64)
        if form[1] == "I" or rng.random() < 0.5:
            raw = raw[:1024].replace(alone, struct.pack(form, giant)) + raw[1024:]
    return np.frombuffer(raw, np.uint8).copy()


COUNTERS = (b"mvhd", b"mdhd", b"tkhd", b"stts", b"stsz", b"stco", b"stsc", b"ctts", b"elst", b"acTL", b"fcTL",
            b"\x44\x89", b"avih", b"strh", b"idx1", b"duration", b"ANMF", b"VP8X")  # fmt: skip


def giant_count(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    """All ones, or half of them, where a container keeps its durations, time scales and counts of frames."""
    raw = bytes(data)
    found = [raw.find(name) + len(name) for name in COUNTERS if name in raw]
    for start in found or [0]:
        at = start + 4 * int(rng.integers(8)) + (0 if rng.random() < 0.7 else int(rng.integers(4)))
        value = np.frombuffer(struct.pack(">I", int(rng.choice([2**32 - 1, 2**31 - 1, 2**30, 1, 0]))), np.uint8)
        data[at : at + 4] = value[: len(data[at : at + 4])]
    return data


def zeros(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    start = int(rng.integers(len(data)))
    data[start : start + int(2 ** rng.integers(2, 13))] = 0
    return data


def repeat_part(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    start, stop = sorted(int(place) for place in rng.integers(len(data), size=2))
    return np.concatenate([data[:stop]] + [data[start:stop]] * int(rng.integers(1, 9)) + [data[stop:]])


def foreign(data: Bytes, other: Bytes, rng: np.random.Generator) -> Bytes:
    """Nothing, zeros, noise or a letter."""
    kinds = (b"", bytes(4096), rng.bytes(4096), b"Dear reader,\n" * 200, b"#EXTM3U\nfile:///etc/hostname\n")
    return np.frombuffer(kinds[int(rng.integers(len(kinds)))], np.uint8).copy()


MUTATIONS: tuple[Callable[[Bytes, Bytes, np.random.Generator], Bytes], ...] = (
    flip_bits, flip_bits, cut, foreign_header, splice, giant_size, giant_count, giant_count, zeros, repeat_part,
    foreign,
)  # fmt: skip


def mutate(originals: list[Path], folder: Path, count: int, seed: int) -> list[str]:
    """Write `count` mutated files into `folder`; returns their names, which tell number, mutation and original."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        mutation, path = MUTATIONS[number % len(MUTATIONS)], originals[int(rng.integers(len(originals)))]
        other = originals[int(rng.integers(len(originals)))]
        first, second = (np.frombuffer(each.read_bytes(), np.uint8).copy() for each in (path, other))
        names.append(f"{number:05d}_{mutation.__name__}_{path.name}")
        (folder / names[-1]).write_bytes(mutation(first, second, rng).tobytes())
    return names


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
