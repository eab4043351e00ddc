"""Sources of training clips: anything with a length whose `read(index, rng)` gives one record.

A record is a dictionary of one clip's window, on the host:

    frames   u8  [f h w 3]   (or `moments` f32 [f h w 2c], from the latent cache)
    times    f32 [f]         time stamps in native frame intervals, 0 at the window's start
    anchor   bool            frame 0 comes from far before the window
    fps      float           native frames per second
    caption  str             "" where there is none
    name     str             which clip

All chance comes in through `rng`: equal (index, rng state), equal record. `source[index]` is the record of a fixed rng.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from vdiff_jax.data.buckets import Bucket, assign, filled, parse_buckets
from vdiff_jax.data.clip_folder import captions_of, find_clips, read_captions
from vdiff_jax.data.paths import make_path
from vdiff_jax.data.video_decode import VIDEO_SUFFIXES, Limits, VideoInfo, probe
from vdiff_jax.data.video_io import read_video

Record: TypeAlias = dict[str, Any]
_DIRECTIONS = ("right", "left", "down", "up")
SPLITS = ("all", "train", "heldout")


@runtime_checkable
class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def read(self, index: int, rng: np.random.Generator) -> Record: ...

    def captions(self) -> list[str]: ...


@dataclasses.dataclass
class SkipReport:
    """Clips left out and why: `reasons[name] = sentence`; `count` counts every time one had to be left out."""

    count: int = 0
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        self.reasons.setdefault(name, reason)

    def __str__(self) -> str:
        if not self.count:
            return "no clip was skipped"
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:3])
        more = f" and {len(self.reasons) - 3} more clips" if len(self.reasons) > 3 else ""
        names = f"{len(self.reasons)} clips were" if len(self.reasons) > 1 else "1 clip was"
        times = f" ({self.count} times)" if self.count > len(self.reasons) else ""
        return f"{names} skipped{times}: {shown}{more}"


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a window of `num_frames` is drawn from a clip.

    strides, stride_weights: distances between frames in native intervals and how often each is drawn, among those the
        clip is long enough for. anchor_rate: share of windows whose frame 0 is replaced by an anchor, a frame
        `anchor_range` intervals before the window; clips without such a frame get none.
    fill: windows of clips that are too short have fewer frames, those at the smallest stride, and are filled up later.
    """

    num_frames: int
    strides: tuple[int, ...] = (1,)
    stride_weights: tuple[float, ...] = (1.0,)
    anchor_rate: float = 0.0
    anchor_range: tuple[int, int] = (8, 64)
    fill: bool = False

    def __post_init__(self):
        if self.num_frames < 1 or not self.strides or min(self.strides) < 1:
            raise ValueError(f"windows need num_frames >= 1 and strides >= 1, got {self.num_frames}, {self.strides}")
        if (
            len(self.strides) != len(self.stride_weights)
            or min(self.stride_weights) < 0
            or not sum(self.stride_weights)
        ):
            raise ValueError(f"stride_weights {self.stride_weights} must be one weight >= 0 for each of {self.strides}")

    @property
    def shortest(self) -> int:
        """Frames a clip needs at least."""
        return 1 if self.fill else (self.num_frames - 1) * self.smallest_stride + 1

    @property
    def smallest_stride(self) -> int:
        return min(s for s, w in zip(self.strides, self.stride_weights) if w)

    def draw(self, available: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        """Frame numbers i64 [f], time stamps f32 [f] and the anchor flag, for a clip of `available` frames."""
        num_frames = self.num_frames
        if self.fill:
            num_frames = min(num_frames, (available - 1) // self.smallest_stride + 1)
        fits = [(num_frames - 1) * s < available for s in self.strides]
        weights = np.where(fits, self.stride_weights, 0.0)
        if not weights.sum():
            raise ValueError(f"a window needs {self.shortest} frames, the clip has {available}; use fewer frames")
        stride = int(rng.choice(self.strides, p=weights / weights.sum()))
        times = stride * np.arange(num_frames)
        start = int(rng.integers(available - times[-1]))
        anchor = bool(rng.random() < self.anchor_rate) and num_frames > 1 and start >= self.anchor_range[0]
        if anchor:
            times[0] = -rng.integers(self.anchor_range[0], min(self.anchor_range[1], start) + 1)
        return start + times, times.astype(np.float32), anchor


def all_too_short(folder: Any, lengths: list[int], windows: Windows) -> str:
    """The sentence for a folder whose readable clips of `lengths` frames all lack the frames of a window."""
    return (
        f"all {len(lengths)} clips of {folder} are too short: the longest has {max(lengths)} frames, and a window of "
        f"num_frames={windows.num_frames} at stride {windows.smallest_stride} needs {windows.shortest}; lower "
        "num_frames or the strides, or give longer clips"
    )


@dataclasses.dataclass(frozen=True)
class _ClipFile:
    path: Any
    name: str
    num_frames: int
    height: int
    width: int
    captions: tuple[str, ...]


class FolderSource:
    """Clips of a folder and its subfolders: video files, animated images and folders of numbered frames.

    Captions come from `NAME.txt` beside `NAME.mp4` (each line is an alternative), else from `captions.jsonl`, else
    from `captions.csv` at the top of the folder (columns or keys `file` and `caption`; several rows are alternatives),
    else they are "". With `num_frames` 1 every image is a clip of its own (but not inside a folder with clip.json).

    split, holdout: a subfolder named like the split is taken whole. Otherwise "train" leaves out the share `holdout` of
        clips, "heldout" is that share, "all" is everything; a clip's name decides, so adding clips moves none across.
    fps: resample every clip to this rate before drawing windows; None keeps each file's own.
    folder: here or far away, see `paths.py`. Headers are read by `num_threads` threads.
    Clips that cannot be opened or are too short are left out and listed in `skipped`.
    Raises FileNotFoundError for a missing folder and ValueError, saying why, if no clip is left.
    """

    def __init__(
        self,
        folder: str | Path,
        windows: Windows,
        size: int | tuple[int, int] | None,
        split: str = "all",
        holdout: float = 0.0,
        fps: float | None = None,
        limits: Limits | None = None,
        num_threads: int = 16,
    ):
        self.folder, self.windows, self.size, self.fps, self.split = make_path(folder), windows, size, fps, split
        self.limits, self.skipped = limits or Limits(), SkipReport()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give a folder of clips")
        if split != "all" and (self.folder / split).is_dir():
            self.folder, split = self.folder / split, "all"
        paths = sorted(find_clips(self.folder, single_images=windows.num_frames == 1))
        names = {path: path.relative_to(self.folder).as_posix() for path in paths}
        chosen = [path for path in paths if in_split(names[path], split, holdout)]
        table = read_captions(self.folder, set(names.values()))
        with ThreadPoolExecutor(num_threads) as pool:  # waiting for storage, most of the time
            opened = list(pool.map(lambda path: self._open(path, names[path], table), chosen))
        lengths = [length for _, length, _ in opened]
        for path, (clip, _, reason) in zip(chosen, opened):
            if clip is None:
                self.skipped.add(names[path], reason)
        self._clips = [clip for clip, _, _ in opened if clip is not None]
        if not self._clips:
            raise ValueError(self._why_none(len(paths), lengths, split, holdout))

    def bucketed(self, buckets: Sequence[Bucket], windows: Windows) -> list[FolderSource]:
        """The clips of each bucket as a source of their own, see `buckets.assign`; some may be empty.

        windows: as they are drawn in all buckets, but for the number of frames.
        """
        where = assign([(clip.num_frames, clip.height, clip.width) for clip in self._clips], buckets)
        parts = []
        for index, bucket in enumerate(buckets):
            part = copy.copy(self)
            part.windows = dataclasses.replace(windows, num_frames=bucket.num_frames, fill=True)
            part.size = (bucket.height, bucket.width)
            part._clips = [clip for clip, place in zip(self._clips, where) if place == index]
            parts.append(part)
        return parts

    def _open(self, path: Any, name: str, table: dict[str, tuple[str, ...]]) -> tuple[_ClipFile | None, int, str]:
        """The clip, or None; its number of frames, or 0 if it cannot be read; and why it cannot be used."""
        try:
            info = probe(path, self.limits)
            num_frames = self._length(info)
            if num_frames < self.windows.shortest:
                return None, num_frames, f"{num_frames} frames, {self.windows.shortest} needed"
            captions = captions_of(path, name, table)
            return _ClipFile(path, name, num_frames, info.height, info.width, captions), num_frames, ""
        except (OSError, ValueError) as error:
            return None, 0, str(error)

    def _length(self, info: VideoInfo) -> int:
        return int(info.duration_s * self.fps + 1e-6) if self.fps and info.num_frames > 1 else info.num_frames

    def _why_none(self, found: int, lengths: list[int], split: str, holdout: float) -> str:
        if not found:
            return (
                f"{self.folder} holds no clips (looked for {' '.join(VIDEO_SUFFIXES)} and folders of images); add some"
            )
        if not lengths:
            return f"split {split!r} with holdout {holdout} holds none of the {found} clips of {self.folder}; change it"
        if all(lengths):
            return all_too_short(self.folder, lengths, self.windows)
        return f"none of the {len(lengths)} clips of {self.folder} is usable; {self.skipped}"

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Record:
        return self.read(index, np.random.default_rng([index]))

    def name(self, index: int) -> str:
        return self._clips[index].name

    def frame_size(self, index: int) -> tuple[int, int]:
        """(height, width) as stored, by the header."""
        return self._clips[index].height, self._clips[index].width

    def captions(self) -> list[str]:
        """All captions of all clips, for fitting a tokenizer."""
        return [caption for clip in self._clips for caption in clip.captions]

    def read(self, index: int, rng: np.random.Generator) -> Record:
        """One random window. Raises VideoError when the file turns out to be unreadable."""
        clip = self._clips[index]
        numbers, times, anchor = self.windows.draw(clip.num_frames, rng)
        caption = clip.captions[int(rng.integers(len(clip.captions)))]
        first = 1 if anchor else 0
        start, count = int(numbers[first]), len(numbers) - first
        stride = int(numbers[-1] - numbers[-2]) if count > 1 else 1
        window = self._read(clip, count, start, stride)
        frames = window.frames
        if anchor:
            frames = np.concatenate([self._read(clip, 1, int(numbers[0]), 1).frames, frames])
        record = {
            "frames": frames,
            "times": times,
            "anchor": anchor,
            "fps": window.fps * stride,
            "caption": caption,
            "name": clip.name,
        }
        return filled(record, self.windows.num_frames) if self.windows.fill else record

    def read_whole(self, index: int) -> Record:
        """Every frame of a clip: `frames`, `fps`, `name` and `captions`, the tuple of all alternatives."""
        clip = self._clips[index]
        whole = self._read(clip, None, 0, 1)
        return {"frames": whole.frames, "fps": whole.fps, "name": clip.name, "captions": clip.captions}

    def _read(self, clip: _ClipFile, count: int | None, start: int, stride: int) -> Any:
        return read_video(clip.path, self.size, count, start, stride, self.fps, self.limits)


class SyntheticSource:
    """Clips made of arithmetic, no decoding: for benchmarks and tests.

    kind: "gradient" (a moving colour gradient, its direction told by the caption) or "noise".
    """

    def __init__(self, length: int, windows: Windows, size: int | tuple[int, int] = 32, kind: str = "gradient"):
        if length < 1:
            raise ValueError(f"a source needs at least one clip, got length {length}")
        if kind not in ("gradient", "noise"):
            raise ValueError(f'kind must be "gradient" or "noise", got {kind!r}')
        self.length, self.windows, self.kind = length, windows, kind
        self.size = (size, size) if isinstance(size, int) else size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        return self.read(index, np.random.default_rng([index]))

    def captions(self) -> list[str]:
        return [f"a gradient moving {direction}" for direction in _DIRECTIONS]

    def read(self, index: int, rng: np.random.Generator) -> Record:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        numbers, times, anchor = self.windows.draw(4 * self.windows.shortest, rng)
        direction = index % len(_DIRECTIONS)
        if self.kind == "noise":
            frames = rng.integers(0, 256, (len(numbers), *self.size, 3), np.uint8)
        else:
            y, x = np.mgrid[0 : self.size[0], 0 : self.size[1]]
            shift = numbers[:, None, None]
            along = [x - shift, x + shift, y - shift, y + shift][direction]
            frames = np.stack([(along * 4 + 37 * index + channel * 85) % 256 for channel in range(3)], -1).astype(
                np.uint8
            )
        return {
            "frames": frames,
            "times": times,
            "anchor": anchor,
            "fps": 8.0,
            "caption": self.captions()[direction],
            "name": f"synthetic {index}",
        }


def make_source(data: Any, split: str = "train", digest: str | None = None, anchor_rate: float = 0.0) -> Source:
    """The source a data configuration asks for.

    data: has the fields `source` ("folder", "tfds" or "synthetic"), `folder`, `size`, `num_frames`, `native_fps`,
        `strides`, `stride_weights`, `video_key`, `captions_key` and `latent_cache` (a folder of encoded
        clips to read instead, or ""); optional `holdout`, the share of clips kept out of "train" (default 0.1), and
        `buckets`: with them, single frames of all clips and images of a folder, see `make_bucket_sources`.
    digest: the autoencoder in use; a latent cache of another one is refused.
    anchor_rate: share of windows that open with an anchor frame.
    """
    from vdiff_jax.data.latent_cache import LatentCache
    from vdiff_jax.data.tfds_source import TfdsSource

    windows = Windows(data.num_frames, tuple(data.strides), tuple(data.stride_weights), anchor_rate)
    holdout = getattr(data, "holdout", 0.1)
    if data.latent_cache:
        return LatentCache(data.latent_cache, windows, digest, split, holdout)
    if data.source == "folder":
        windows = Windows(1) if getattr(data, "buckets", ()) else windows
        return FolderSource(data.folder, windows, data.size, split, holdout, data.native_fps)
    if data.source == "tfds":
        keys = {"frames_key": data.video_key or None, "caption_key": data.captions_key or None}
        return TfdsSource(windows, data.folder, split=split, size=data.size, fps=data.native_fps, **keys)
    if data.source == "synthetic":
        return SyntheticSource(256, windows, data.size)
    raise ValueError(f'unknown source {data.source!r}; use "folder", "tfds" or "synthetic"')


def make_bucket_sources(
    data: Any, split: str = "train", anchor_rate: float = 0.0
) -> tuple[FolderSource, list[tuple[Bucket, FolderSource]]]:
    """All clips of a folder, and those of each of `data.buckets` that has any."""
    source = make_source(data, split)
    assert isinstance(source, FolderSource)
    buckets = parse_buckets(data.buckets, data.batch_size)
    windows = Windows(1, tuple(data.strides), tuple(data.stride_weights), anchor_rate)
    parts = zip(buckets, source.bucketed(buckets, windows))
    return source, [(bucket, part) for bucket, part in parts if len(part)]


def in_split(name: str, split: str, holdout: float) -> bool:
    """Whether a clip belongs to the split: a hash of its name, uniform in [0, 1), is compared with `holdout`."""
    if split not in SPLITS or not 0.0 <= holdout <= 1.0:
        raise ValueError(f"split must be one of {SPLITS} and holdout within 0..1, got {split!r} and {holdout}")
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return split == "all" or (place < holdout) == (split == "heldout")
