"""Video files and clips: `Clip` in memory, `read_video` and `probe` from disk, `Clip.save` to disk.

A clip is `frames` u8 [f h w 3] in RGB, a frame rate in frames per second and a dictionary of metadata. Reading
goes through ffmpeg (PyAV, one thread a clip, which is fastest for short clips) and, for gif, webp, png and other
images, through Pillow. Which of the two is decided by the first bytes of the file, not by its name.

A clip may carry its sound (`sound.py`), read when asked for, on the clock of the frames.

Files may come from anybody: sizes are judged from the header before anything is decoded (`Limits`), the same limits
hold while decoding, and only container formats that hold their own video are opened (no playlists, no network).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.sound import Sound, read_sound
from vdiff_jax.data.video_write import (
    CLIP_JSON,
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

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".apng", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,ivf,m4v,h264,hevc"
_IMAGE_MAGIC = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may cost; a file that asks for more raises VideoError.

    max_pixels: height x width of one frame as stored. max_frames: frames decoded, skipped ones included.
    max_duration_s: seconds decoded. max_bytes: bytes of the frames returned.
    """

    max_pixels: int = 4096 * 4096
    max_frames: int = 36_000
    max_duration_s: float = 1800.0
    max_bytes: int = 2 << 30


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the header says. `num_frames` and `duration_s` are estimates where the container does not count frames."""

    path: str
    height: int
    width: int
    fps: float
    num_frames: int
    duration_s: float
    metadata: dict[str, Any]


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


def probe(path: str | os.PathLike, limits: Limits | None = None) -> VideoInfo:
    """Header of a video file, an image or a folder of frames; decodes nothing. Raises VideoError as `read_video`."""
    path, limits = check_path(path), limits or Limits()
    if path.is_dir():
        return _probe_folder(path, limits)
    return _probe_image(path, limits) if is_image(path) else _probe_av(path, limits)


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
    seek_s = _seek_time(info, start, fps)
    skip = start if seek_s else 0
    decoded = _decode(path, info, limits, seek_s)
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


def check_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise VideoError(f"{path} does not exist; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); copy or make the file again")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path} cannot be read; check its permissions")
    return path


def too_large(path: Path, what: str) -> str:
    return f"{path} is too large: {what}; read fewer or smaller frames, or raise the limit"


def _check_pixels(path: Path, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.max_pixels:
        raise VideoError(too_large(path, f"frames of {height} x {width} exceed {limits.max_pixels} pixels"))


def _check_cost(
    path: Path,
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


def _decode(path: Path, info: VideoInfo, limits: Limits, seek_s: float) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds from the first frame, u8 [h w 3]) of every frame from the key frame before `seek_s` on."""
    if path.is_dir():
        frames = _decode_folder(path, info)
    else:
        frames = _decode_image(path) if is_image(path) else _decode_av(path, info, limits, seek_s)
    for count, (time, image) in enumerate(frames):
        if count >= limits.max_frames:
            raise VideoError(too_large(path, f"more than {limits.max_frames} frames"))
        if time > seek_s + limits.max_duration_s:
            raise VideoError(too_large(path, f"more than {limits.max_duration_s:.0f} s"))
        _check_pixels(path, image.shape[0], image.shape[1], limits)
        yield time, image


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


# ---- ffmpeg -----------------------------------------------------------------------------------------------------


def open_container(path: Path) -> Any:
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        return av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path} is not a video this library can open ({reason}); give an mp4, webm, mkv, mov, avi, "
                         "gif, webp or png file") from error  # fmt: skip


def _probe_av(path: Path, limits: Limits) -> VideoInfo:
    with open_container(path) as container:
        if not container.streams.video:
            raise VideoError(f"{path} holds no video stream (it has only sound, or it is cut off); give a whole file")
        stream = container.streams.video[0]
        context = stream.codec_context
        _check_pixels(path, context.height, context.width, limits)
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        duration = stream.duration and float(stream.duration * stream.time_base)
        duration = duration or (container.duration or 0) / 1e6
        num_frames = stream.frames or round(duration * fps)
        return VideoInfo(
            str(path), context.height, context.width, fps, num_frames, num_frames / fps, _metadata(container.metadata)
        )


def _metadata(tags: dict[str, str]) -> dict[str, Any]:
    comment = {key.lower(): value for key, value in tags.items()}.get("comment", "")
    try:
        found = json.loads(comment)
    except ValueError:
        return {"comment": comment} if comment else {}
    return found if isinstance(found, dict) else {"comment": comment}


def _seek_time(info: VideoInfo, start: int, fps: float | None) -> float:
    """Where decoding may begin, in seconds; 0 = at the beginning (short ways, images, and wherever counting
    frames by their time would not be exact)."""
    path, seconds = Path(info.path), start / (fps or info.fps)
    if seconds < 4.0 or path.is_dir() or is_image(path):
        return 0.0
    with open_container(path) as container:
        stream = container.streams.video[0]
        constant = stream.average_rate and stream.average_rate == stream.base_rate
        return seconds if fps or (constant and stream.frames > start) else 0.0


def _decode_av(path: Path, info: VideoInfo, limits: Limits, seek_s: float) -> Iterator[tuple[float, np.ndarray]]:
    import av

    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        first = float((stream.start_time or 0) * stream.time_base)
        count = 0
        try:
            if seek_s:
                container.seek(int((first + seek_s) / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                _check_pixels(path, frame.height, frame.width, limits)
                time = frame.time - first if frame.time is not None else count / info.fps
                image = frame.to_ndarray(format="rgb24")
                if frame.rotation % 90 == 0 and frame.rotation:
                    image = np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
                yield time, image
                count += 1
        except av.FFmpegError as error:
            reason = error.strerror or str(error)
            raise VideoError(f"{path} is damaged after {count} frames ({reason}); make or copy it again") from error
        if not count and not seek_s:
            raise VideoError(f"{path} holds no frames; make or copy it again")


# ---- Pillow -----------------------------------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _open_image(path: Path) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is judged next
            return Image.open(path)
    except Image.DecompressionBombError as error:
        raise VideoError(too_large(path, f"the header declares it ({error})")) from error
    except OSError as error:
        raise VideoError(f"{path} is a damaged image ({error}); make or copy it again") from error


def _probe_image(path: Path, limits: Limits) -> VideoInfo:
    with _open_image(path) as image:
        _check_pixels(path, image.height, image.width, limits)
        try:
            count = getattr(image, "n_frames", 1)
            durations = []
            for i in range(min(count, limits.max_frames + 1) if count > 1 else 0):
                image.seek(i)
                if image.format == "WEBP":
                    image.load()  # only then does Pillow know this frame's duration
                durations.append(_duration(image))
        except (OSError, EOFError, SyntaxError) as error:
            raise VideoError(f"{path} is a damaged image ({error}); make or copy it again") from error
        total = sum(durations) or 1.0
        comment = image.info.get("comment", "")
        comment = comment.decode("latin-1") if isinstance(comment, bytes) else str(comment)
        metadata = _metadata({"comment": comment})
        return VideoInfo(str(path), image.height, image.width, count / total, count, total, metadata)


def _duration(image: Any) -> float:
    """Seconds this frame is shown; like browsers, no time or almost none means 0.1 s."""
    milliseconds = float(image.info.get("duration", 0) or 0)
    return milliseconds / 1000.0 if milliseconds > 10 else 0.1


def _decode_image(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    from PIL import Image

    with _open_image(path) as image:
        time = 0.0
        for i in range(getattr(image, "n_frames", 1)):
            try:
                image.seek(i)
                rgba = image.convert("RGBA")
            except (OSError, EOFError, SyntaxError) as error:
                raise VideoError(f"{path} is damaged after {i} frames ({error}); make or copy it again") from error
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            yield time, np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            time += _duration(image)


def _frame_files(path: Path) -> list[Path]:
    """Images of a folder in natural order: 2.png comes before 10.png."""
    files = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda p: (int(p.stem) if p.stem.isdigit() else 0, p.name))


def _probe_folder(path: Path, limits: Limits) -> VideoInfo:
    files = _frame_files(path)
    if not files:
        raise VideoError(f"{path} is a folder without images; give a video file or a folder of numbered frames")
    first = probe(files[0], limits)
    note = path / CLIP_JSON
    try:
        told = json.loads(note.read_text()) if note.is_file() else {}
        fps, metadata = float(told.get("fps", 8.0)), dict(told.get("metadata", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise VideoError(f'{note} is not readable ({error}); it should hold {{"fps": 8}} or be removed') from error
    return VideoInfo(str(path), first.height, first.width, fps, len(files), len(files) / fps, metadata)


def _decode_folder(path: Path, info: VideoInfo) -> Iterator[tuple[float, np.ndarray]]:
    for i, file in enumerate(_frame_files(path)):
        yield i / info.fps, next(_decode_image(file))[1]
