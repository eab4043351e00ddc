"""Video files and clips: `Clip` in memory, `read_video` and `probe` from disk, `Clip.save` to disk.

A clip is `frames` u8 [f h w 3] in RGB, a frame rate in frames per second and a dictionary of metadata. Reading
goes through ffmpeg (PyAV, one thread a clip, which is fastest for short clips) and, for gif, webp, png and other
images, through Pillow (`video_decode.py`). Videos are also read from storage far away, see `paths.py`.

A clip may carry its sound (`sound.py`), read when asked for, on the clock of the frames.

Files may come from anybody: what a request would cost is judged from the header before anything is decoded
(`Limits`).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.sound import Sound, read_sound
from vdiff_jax.data.video_decode import (
    Limits,
    VideoInfo,
    check_path,
    decode,
    probe,
    seek_time,
    too_large,
)
from vdiff_jax.data.video_write import (
    VideoError,
    check_frames,
    check_writable,
    contact_sheet,
    save_image,
    write_video,
)

__all__ = [
    "Clip",
    "Limits",
    "VideoError",
    "VideoInfo",
    "check_writable",
    "contact_sheet",
    "probe",
    "read_video",
    "save_image",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """frames: u8 [f h w 3] RGB. fps: frames per second. metadata: JSON-able provenance, kept inside saved files.

    sound: what is heard from the first frame on, or None; it may be shorter or longer than the frames.
    """

    frames: np.ndarray
    fps: float
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    sound: Sound | None = None

    def __post_init__(self):
        check_frames(self.frames)
        if not 0 < self.fps < float("inf"):
            raise VideoError(f"a clip's fps must be a positive number, got {self.fps}")

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    def save(self, path: str | os.PathLike, crf: int = 18) -> Path:
        """Write by suffix: .mp4 .webm .gif .png (contact sheet) or a folder of frames; see `write_video`."""
        return write_video(self.frames, self.fps, self.metadata, path, crf=crf, sound=self.sound)


def read_video(
    path: str | os.PathLike,
    size: int | tuple[int, int] | None = None,
    num_frames: int | None = None,
    start: int = 0,
    stride: int = 1,
    fps: float | None = None,
    limits: Limits | None = None,
    sound: bool = False,
) -> Clip:
    """Read a video, an animated image, one image (a clip of one frame) or a folder of frames.

    size: int = centre-cropped square of that side, `(h, w)` = centre crop of that shape; None = as stored.
    num_frames: how many frames to return; None = all. start, stride: first frame and step between frames, counted
        on the file's frames, or on the resampled ones when `fps` is given (each shows the newest frame at its time).
    sound: whether the clip carries the sound of the part that was read (None where the file has none).
    The clip's fps is that of the returned frames. Transparent pixels become white.
    Raises VideoError (one sentence) for a missing, foreign, empty, damaged, too short or too large file.
    """
    from vdiff_jax.data.transforms import centre_crop_resize

    path, limits = check_path(path), limits or Limits()
    if start < 0 or stride < 1 or (num_frames is not None and num_frames < 1) or (fps is not None and fps <= 0):
        raise VideoError(
            f"cannot read {path}: need start >= 0, stride >= 1, num_frames >= 1 and fps > 0, "
            f"got start={start}, stride={stride}, num_frames={num_frames}, fps={fps}"
        )
    info = probe(path, limits)
    rate = fps or info.fps
    _check_cost(path, info, limits, size, num_frames, start, stride, rate)
    stop = None if num_frames is None else start + (num_frames - 1) * stride + 1
    seek_s = seek_time(info, start, fps)
    skip = start if seek_s else 0
    decoded = decode(path, info, limits, seek_s)
    if fps:
        timed = _resample(decoded, fps, info.fps, first=skip)
    else:
        timed = (image for time, image in decoded if not skip or time > (skip - 0.5) / info.fps)
    frames: list[np.ndarray] = []
    total = 0
    for image in itertools.islice(timed, start - skip, None if stop is None else stop - skip, stride):
        image = image if size is None else centre_crop_resize(image[None], size)[0]
        if frames and image.shape != frames[0].shape:
            raise VideoError(f"cannot read {path}: its frames change size; give a size to bring them to one")
        frames.append(image)
        total += image.nbytes
        if total > limits.max_bytes:
            raise VideoError(too_large(path, f"more than {limits.max_bytes} bytes of frames"))
    if not frames or (num_frames is not None and len(frames) < num_frames):
        wanted = f"{num_frames or 1} from frame {start} at stride {stride}"
        raise VideoError(f"{path} is too short: {wanted} asked, {len(frames)} found; ask for fewer frames")
    heard = read_sound(path, start / rate, len(frames) * stride / rate, limits) if sound else None
    return Clip(np.stack(frames), rate / stride, info.metadata, heard)


def _check_cost(
    path: Any,
    info: VideoInfo,
    limits: Limits,
    size: int | tuple[int, int] | None,
    num_frames: int | None,
    start: int,
    stride: int,
    rate: float,
) -> None:
    """Judge from the header what the request would decode and return."""
    seconds = info.duration_s if num_frames is None else (start + num_frames * stride) / rate
    seconds = min(seconds, info.duration_s) if info.duration_s else seconds
    if seconds > limits.max_duration_s:
        raise VideoError(too_large(path, f"{seconds:.0f} s exceed {limits.max_duration_s:.0f} s"))
    if seconds * info.fps > limits.max_frames + 1:
        raise VideoError(too_large(path, f"{seconds * info.fps:.0f} frames exceed {limits.max_frames}"))
    count = num_frames or max(1, int((info.duration_s * rate - start) / stride))
    height, width = (info.height, info.width) if size is None else (size, size) if isinstance(size, int) else size
    if count * height * width * 3 > limits.max_bytes:
        wanted = f"{count} frames of {height} x {width} exceed {limits.max_bytes} bytes"
        raise VideoError(too_large(path, wanted))


def _resample(
    decoded: Iterator[tuple[float, np.ndarray]], fps: float, native: float, first: int
) -> Iterator[np.ndarray]:
    """Samples `first`, `first` + 1, ... at a constant rate: sample j shows the newest frame of time at most j / fps."""
    slack = 1e-3 / fps  # container clocks round times by up to a millisecond
    held, time, sample = None, 0.0, first
    for time, image in decoded:
        while held is not None and sample / fps + slack < time:
            yield held
            sample += 1
        held = image
    while held is not None and sample / fps + slack < time + 1.0 / native:
        yield held
        sample += 1
