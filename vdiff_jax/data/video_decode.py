"""Pictures out of files: what a header says, and its frames one by one, by ffmpeg (PyAV) or Pillow.

Which of the two is decided by the first bytes of the file, not by its name. Files may come from anybody: sizes are
judged from the header before anything is decoded (`Limits`), the same limits hold while decoding, and only container
formats that hold their own video are opened (no playlists, no network).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from vdiff_jax.data.paths import is_remote, make_path, size_of
from vdiff_jax.data.video_write import CLIP_JSON, VideoError

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


def probe(path: str | os.PathLike, limits: Limits | None = None) -> VideoInfo:
    """Header of a video file, an image or a folder of frames; decodes nothing. Raises VideoError as `read_video`."""
    place, limits = check_path(path), limits or Limits()
    try:
        if place.is_dir():
            return _probe_folder(place, limits)
        return _probe_image(place, limits) if is_image(place) else _probe_av(place, limits)
    except Exception as error:
        raise _damage(path, "", error) from error


def _damage(path: Any, after: str, error: Exception) -> VideoError:
    """What to say of an error while reading; damaged files make decoders raise nearly every kind of exception."""
    if isinstance(error, VideoError):
        return error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return VideoError(f"{path} is damaged{after} ({' '.join(reason.split())}); make or copy it again")


def check_path(path: str | os.PathLike) -> Any:
    """The path, see `make_path`. Raises VideoError if nothing can be read there."""
    place: Any = make_path(path)
    try:
        if not place.exists():
            raise VideoError(f"{path} does not exist; check the path")
        if not place.is_dir() and size_of(place) == 0:
            raise VideoError(f"{path} is empty (0 bytes); copy or make the file again")
    except OSError as error:
        raise VideoError(f"{path} cannot be read ({error}); check the path and its permissions") from error
    if not is_remote(place) and not os.access(place, os.R_OK):
        raise VideoError(f"{path} cannot be read; check its permissions")
    return place


def too_large(path: Any, what: str) -> str:
    return f"{path} is too large: {what}; read fewer or smaller frames, or raise the limit"


def _check_pixels(path: Any, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.max_pixels:
        raise VideoError(too_large(path, f"frames of {height} x {width} exceed {limits.max_pixels} pixels"))


def decode(path: Any, info: VideoInfo, limits: Limits, seek_s: float) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds from the first frame, u8 [h w 3]) of every frame from the key frame before `seek_s` on."""
    if path.is_dir():
        frames = _decode_folder(path, info, limits)
    else:
        frames = _decode_image(path, limits) if is_image(path) else _decode_av(path, info, limits, seek_s)
    count = 0
    try:
        for time, image in frames:
            if count >= limits.max_frames:
                raise VideoError(too_large(path, f"more than {limits.max_frames} frames"))
            if time > seek_s + limits.max_duration_s:
                raise VideoError(too_large(path, f"more than {limits.max_duration_s:.0f} s"))
            yield time, image
            count += 1
    except Exception as error:
        raise _damage(path, f" after {count} frames", error) from error


# ---- ffmpeg -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_container(path: Any) -> Iterator[Any]:
    """The container of a file, closed at the end. Raises VideoError for a file that is no video."""
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb")) if is_remote(path) else f"file:{path}"
            container = stack.enter_context(av.open(file, options=options, metadata_errors="ignore"))
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"{path} is not a video this library can open ({reason}); give an mp4, webm, mkv, mov, "
                             "avi, gif, webp or png file") from error  # fmt: skip
        yield container


def _probe_av(path: Any, limits: Limits) -> VideoInfo:
    with open_container(path) as container:
        if not container.streams.video:
            raise VideoError(f"{path} holds no video stream (it has only sound, or it is cut off); give a whole file")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{path} holds video of a codec that is not known here; convert it, to mp4 for example")
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


def seek_time(info: VideoInfo, start: int, fps: float | None) -> float:
    """Where decoding may begin, in seconds; 0 = at the beginning (short ways, images, and wherever counting
    frames by their time would not be exact)."""
    path, seconds = make_path(info.path), start / (fps or info.fps)
    if seconds < 4.0 or path.is_dir() or is_image(path):
        return 0.0
    with open_container(path) as container:
        stream = container.streams.video[0]
        constant = stream.average_rate and stream.average_rate == stream.base_rate
        return seconds if fps or (constant and stream.frames > start) else 0.0


def _decode_av(path: Any, info: VideoInfo, limits: Limits, seek_s: float) -> Iterator[tuple[float, np.ndarray]]:
    with open_container(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}  # before ffmpeg makes room for a frame
        stream.thread_type = "NONE"
        first = float((stream.start_time or 0) * stream.time_base)
        count = 0
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
        if not count and not seek_s:
            raise VideoError(f"{path} holds no frames; make or copy it again")


# ---- Pillow -----------------------------------------------------------------------------------------------------


def is_image(path: Any) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _open_image(path: Any) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is judged next
            return Image.open(io.BytesIO(path.read_bytes()) if is_remote(path) else path)
    except Image.DecompressionBombError as error:
        raise VideoError(too_large(path, f"the header declares it ({error})")) from error
    except OSError as error:
        raise VideoError(f"{path} is a damaged image ({error}); make or copy it again") from error


def _probe_image(path: Any, limits: Limits) -> VideoInfo:
    with _open_image(path) as image:
        _check_pixels(path, image.height, image.width, limits)
        count = getattr(image, "n_frames", 1)
        durations = []
        for i in range(min(count, limits.max_frames + 1) if count > 1 else 0):
            image.seek(i)
            if image.format == "WEBP":
                image.load()  # only then does Pillow know this frame's duration
            durations.append(_duration(image))
        total = sum(durations) or 1.0
        comment = image.info.get("comment", "")
        comment = comment.decode("latin-1") if isinstance(comment, bytes) else str(comment)
        metadata = _metadata({"comment": comment})
        return VideoInfo(str(path), image.height, image.width, count / total, count, total, metadata)


def _duration(image: Any) -> float:
    """Seconds this frame is shown; like browsers, no time or almost none means 0.1 s."""
    milliseconds = float(image.info.get("duration", 0) or 0)
    return milliseconds / 1000.0 if milliseconds > 10 else 0.1


def _decode_image(path: Any, limits: Limits) -> Iterator[tuple[float, np.ndarray]]:
    from PIL import Image

    with _open_image(path) as image:
        time = 0.0
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            _check_pixels(path, image.height, image.width, limits)
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            yield time, np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            time += _duration(image)


def _frame_files(path: Any) -> list[Any]:
    """Images of a folder in natural order: 2.png comes before 10.png."""
    files = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda p: (int(p.stem) if p.stem.isdigit() else 0, p.name))


def _probe_folder(path: Any, limits: Limits) -> VideoInfo:
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


def _decode_folder(path: Any, info: VideoInfo, limits: Limits) -> Iterator[tuple[float, np.ndarray]]:
    for i, file in enumerate(_frame_files(path)):
        yield i / info.fps, next(_decode_image(file, limits))[1]
