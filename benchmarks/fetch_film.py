"""Fetch a real film and cut it into shots: Big Buck Bunny, 10 minutes, 14,315 frames of 1280 x 720 at 24 fps.

    python benchmarks/fetch_film.py --out=FOLDER [--size=64 | --size=36x64]

The film comes inside the source archive of the `moviepy` package, fetched by pip (58 MB, checked by sha256). Shots are
found where colours or pixels jump, and written as small mp4 files to FOLDER/train and FOLDER/heldout: every tenth shot
is held out, and no shot is in both. Shots shorter than --min_frames, still ones and the rolling credits are left out:
117 shots remain, 11,049 frames. An interrupted run continues after its last finished shot. About a minute on two cores.

Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, Creative Commons Attribution 3.0. Not for committing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from vdiff_jax.data.transforms import centre_crop_resize
from vdiff_jax.data.video_io import Clip

PACKAGE = "moviepy==2.2.1"
SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
FILM = "moviepy_10_minutes/resources/bbb.mp4"
TITLES = range(11_750, 13_920)  # the rolling credits begin and end here
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"

_OUT = flags.DEFINE_string("out", None, "folder for train/ and heldout/", required=True)
_SIZE = flags.DEFINE_string("size", "64", "side of a centred square, or HEIGHTxWIDTH")
_MIN_FRAMES = flags.DEFINE_integer("min_frames", 16, "shortest shot kept", lower_bound=2)
_CACHE = flags.DEFINE_string("cache", "~/.cache/vdiff_jax/film", "where the downloaded film is kept")


def fetch(cache: Path) -> Path:
    """Path of the film, downloaded and unpacked on the first call."""
    film = cache / "bbb.mp4"
    if film.is_file():
        return film
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / "moviepy-2.2.1.tar.gz"
    if not archive.is_file():
        print(f"downloading {PACKAGE} (58 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "moviepy", PACKAGE]
        subprocess.run([*command, "-d", str(cache)], check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive} has sha256 {found}, expected {SHA256}; delete it and run again")
    temporary = cache / ".bbb.tmp"
    with tarfile.open(archive) as tar:
        inner = tar.extractfile(ARCHIVE)
        assert inner is not None
        with zipfile.ZipFile(inner) as films, films.open(FILM) as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target)
    os.replace(temporary, film)
    archive.unlink()
    return film


def decode(film: Path, size: tuple[int, int], first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(frame number, u8 [h w 3]) from frame `first` on; the film has a constant rate, so number = time x rate."""
    import av

    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        assert stream.average_rate is not None and stream.time_base is not None
        rate, start = float(stream.average_rate), float((stream.start_time or 0) * stream.time_base)
        if first:
            container.seek(int((start + first / rate) / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            number = round((frame.time - start) * rate)
            if number >= first:
                yield number, centre_crop_resize(frame.to_ndarray(format="rgb24")[None], size)[0]


def histogram(image: np.ndarray) -> np.ndarray:
    """Joint RGB histogram, 8 levels a channel, summing to 1: f64 [512]."""
    levels = (image >> 5).astype(np.int64)
    index = (levels[..., 0] * 8 + levels[..., 1]) * 8 + levels[..., 2]
    return np.bincount(index.ravel(), minlength=512) / index.size


class CutDetector:
    """A cut is a jump far above the changes just before: of the colour histogram, or of the pixels in their places."""

    def __init__(self):
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._usual: list[tuple[float, float]] = []

    def is_cut(self, image: np.ndarray) -> bool:
        """Whether this frame begins a shot; frames come one after the other. The first frame begins none."""
        colours, pixels = histogram(image), image.astype(np.float64)
        if self._last is None:
            self._last = colours, pixels
            return False
        jump = 0.5 * float(np.abs(colours - self._last[0]).sum())  # share of pixels that changed colour
        change = float(np.abs(pixels - self._last[1]).mean())  # grey levels
        usual_jump, usual_change = np.median(self._usual, axis=0) if self._usual else (0.0, 0.0)
        self._last = colours, pixels
        by_colour = jump > max(0.35, 4.0 * usual_jump)
        by_place = jump > 0.12 and change > 12.0 + 6.0 * usual_change
        cut = by_colour or by_place
        self._usual = [] if cut else [*self._usual[-11:], (jump, change)]
        return cut


def keep(frames: np.ndarray, min_frames: int) -> bool:
    """Long enough, and something moves: half a grey level a frame on average."""
    if len(frames) < min_frames:
        return False
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()) > 0.5


def main(_: list[str]) -> int:
    out, began = Path(_OUT.value), time.time()
    sides = [int(side) for side in _SIZE.value.lower().split("x")]
    size = (sides[0], sides[-1])
    film = fetch(Path(_CACHE.value).expanduser())
    notes = out / "shots.json"
    settings = {"size": list(size), "min_frames": _MIN_FRAMES.value}
    state = (
        json.loads(notes.read_text()) if notes.is_file() else {**settings, "next_frame": 0, "shots": [], "done": False}
    )
    if {key: state[key] for key in settings} != settings:
        raise ValueError(f"{out} holds shots made with other settings; choose another folder")
    out.mkdir(parents=True, exist_ok=True)

    def finish(frames: list[np.ndarray], first: int, following: int, done: bool = False) -> None:
        shot, number = np.stack(frames), len(state["shots"])
        split = "heldout" if number % 10 == 9 else "train"
        if first not in TITLES and keep(shot, _MIN_FRAMES.value):
            name = f"{split}/shot_{number:03d}.mp4"
            Clip(shot, 24.0, {"source": CREDIT, "first_frame": first}).save(out / name, crf=10)
            state["shots"].append({"file": name, "first_frame": first, "num_frames": len(shot)})
        state.update(next_frame=following, done=done)
        temporary = out / ".shots.json.tmp"
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        os.replace(temporary, notes)
        print(f"\r{following} frames, {len(state['shots'])} shots, {time.time() - began:.0f} s", end="", flush=True)

    if not state["done"]:
        detector, first, frames = CutDetector(), state["next_frame"], []
        number = first
        for number, image in decode(film, size, first):
            if detector.is_cut(image) and frames:
                finish(frames, first, number)
                first, frames = number, []
            frames.append(image)
        finish(frames, first, number + 1, done=True)
    for split in ("train", "heldout"):
        counts = [shot["num_frames"] for shot in state["shots"] if shot["file"].startswith(split)]
        windows = sum(count // 16 for count in counts)
        print(f"\n{out / split}: {len(counts)} shots, {sum(counts)} frames, {windows} windows of 16 frames", end="")
    print(f"\n{time.time() - began:.0f} s")
    return 0


if __name__ == "__main__":
    app.run(main)
