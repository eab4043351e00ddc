"""Writing frames to files: one function, the container chosen by the path's suffix.

| suffix    | what is written                                                       |
|-----------|-----------------------------------------------------------------------|
| `.mp4`    | H.264, yuv420p, BT.709: plays everywhere; sound as AAC                |
| `.webm`   | VP9, yuv420p, BT.709; sound as Opus                                   |
| `.gif`    | one palette for the clip, frame times rounded to 10 ms as gif demands |
| `.png`    | a contact sheet: the frames in a grid                                 |
| no suffix | a folder: `00000.png`, `00001.png`, ... and `clip.json` (fps, metadata) |

Metadata is a JSON dictionary in the container's comment. A file appears whole or not at all: it is written
under a temporary name in the same folder and renamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.sound import Sound, add_sound

SUFFIXES = (".mp4", ".webm", ".gif", ".png", "")
CLIP_JSON = "clip.json"
_BT709 = 1  # ffmpeg's number for the BT.709 matrix, primaries and transfer alike


class VideoError(ValueError):
    """A video cannot be read or written; the message names the file and the way out."""


def check_frames(frames: np.ndarray) -> None:
    """Raise VideoError unless `frames` is u8 [f h w 3] with at least one frame and one pixel."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        raise VideoError(f"frames must be a numpy uint8 array, got {getattr(frames, 'dtype', type(frames).__name__)}")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise VideoError(f"frames must be [frames height width 3] and not empty, got shape {frames.shape}")


def write_video(
    frames: np.ndarray,
    fps: float,
    metadata: dict[str, Any],
    path: str | os.PathLike,
    crf: int = 18,
    sound: Sound | None = None,
) -> Path:
    """Write `frames` u8 [f h w 3] at `fps` frames per second to `path`; returns the path.

    crf: constant rate factor of mp4 (0..51) and webm (0..63), lower is better and larger; 18 is visually lossless.
    sound: goes into .mp4 and .webm, cut where the frames end; .gif, .png and folders have no place for it and leave
    it out.
    An odd height or width is padded by one repeated row or column in .mp4 and .webm (their chroma is halved);
    `metadata["padded_from"] = [h, w]` notes it in the file.
    Raises VideoError for an unknown suffix, wrong frames or a place that cannot be written.
    """
    path = Path(path)
    check_frames(frames)
    suffix = _known_suffix(path)
    if suffix == ".gif" and fps > 50:
        raise VideoError(f"cannot write {path}: players show a gif at 50 frames per second at most, got {fps}")
    writers: dict[str, Callable[[Path], None]] = {
        ".mp4": lambda to: _write_encoded(frames, fps, metadata, to, "mp4", crf, sound),
        ".webm": lambda to: _write_encoded(frames, fps, metadata, to, "webm", crf, sound),
        ".gif": lambda to: _write_gif(frames, fps, metadata, to),
        ".png": lambda to: _write_png(contact_sheet(frames), metadata, to),
        "": lambda to: _write_folder(frames, fps, metadata, to),
    }
    return _write_whole(path, writers[suffix])


def save_image(path: str | os.PathLike, image: np.ndarray, metadata: dict[str, Any] | None = None) -> Path:
    """Write one image u8 [h w 3] as png; raises VideoError as `write_video`."""
    check_frames(image[None])
    if Path(path).suffix.lower() != ".png":
        raise VideoError(f"cannot write {path}: images are written as .png; use that suffix")
    return _write_whole(Path(path), lambda to: _write_png(image, metadata or {}, to))


def check_writable(path: str | os.PathLike) -> None:
    """Raise VideoError now, before any work is spent, if `Clip.save(path)` could not succeed later."""
    path = Path(path)
    _known_suffix(path)
    if path.is_dir() and (path.suffix or (any(path.iterdir()) and not (path / CLIP_JSON).is_file())):
        raise VideoError(f"cannot write {path}: it is a folder that holds other things; choose another name")
    place = path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise VideoError(f"cannot write {path}: {place} is not a writable folder; choose a place that is writable")


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(s for s in SUFFIXES if s)
        raise VideoError(f"cannot write {path}: unknown suffix {suffix!r}; use one of {known} or a folder name")
    return suffix


def _write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary name beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VideoError(f"cannot write {path}: {reason}; choose a place that is writable") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.is_file():
            temporary.unlink()
    return path


def contact_sheet(frames: np.ndarray | Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """One image from one clip or several: u8 [h w 3], white gaps of `gap` pixels.

    frames: u8 [f h w 3] (its frames fill a grid row by row, nearly square unless `columns` is given), or a list
        of such clips of one size, or [n f h w 3] (one row a clip, at most `columns` evenly spaced frames each).
    """
    several = isinstance(frames, (list, tuple)) or np.ndim(frames) == 5
    if several:
        clips = [np.asarray(getattr(clip, "frames", clip)) for clip in frames]
        if len({clip.shape[1:] for clip in clips}) != 1:
            raise VideoError(f"a contact sheet needs clips of one size, got {sorted({c.shape[1:] for c in clips})}")
        width = min(columns or 16, max(len(clip) for clip in clips))
        rows = [clip[np.linspace(0, len(clip) - 1, min(width, len(clip))).round().astype(int)] for clip in clips]
    else:
        clip = np.asarray(frames)
        width = columns or math.ceil(math.sqrt(len(clip)))
        rows = [clip[start : start + width] for start in range(0, len(clip), width)]
    for row in rows:
        check_frames(row)
    h, w = rows[0].shape[1:3]
    sheet = np.full((len(rows) * (h + gap) - gap, width * (w + gap) - gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return sheet


def _replace(temporary: Path, path: Path) -> None:
    """Rename over `path`; an older clip folder is moved away first, any other folder is left alone."""
    if not path.is_dir():
        os.replace(temporary, path)
        return
    if temporary.is_file() or (any(path.iterdir()) and not (path / CLIP_JSON).is_file()):
        raise VideoError(f"cannot write {path}: it is a folder that holds other things; choose another name")
    old = path.with_name(temporary.name + ".old")
    os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old)


def _comment(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, ensure_ascii=True)  # ASCII survives every container's tag encoding


def _write_encoded(
    frames: np.ndarray, fps: float, metadata: dict[str, Any], path: Path, kind: str, crf: int, sound: Sound | None
) -> None:
    import av

    h, w = frames.shape[1:3]
    if h % 2 or w % 2:
        frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        metadata = {**metadata, "padded_from": [h, w]}
    codec, options = {
        "mp4": ("libx264", {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0:weightp=0"}),
        "webm": ("libvpx-vp9", {"crf": str(crf), "b:v": "0", "cpu-used": "4", "row-mt": "0"}),
    }[kind]
    # No dates or random ids ("bitexact"), no multi-threaded rate control, no look-ahead weights (they differ from
    # run to run): the file depends on the frames.
    muxer = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if kind == "mp4" else {})
    with av.open(str(path), "w", format=kind, options=muxer) as container:
        container.metadata["comment"] = _comment(metadata)
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # the number of threads changes the bits
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # limited ("tv"), what players expect
        sound = None if sound is None else sound.cut(0, len(frames) / fps)
        heard = add_sound(container, sound, kind) if sound and len(sound.samples) else []
        for i, image in enumerate(frames):
            while heard and heard[0].pts * heard[0].time_base <= i / fps:  # sound lies beside its picture
                container.mux(heard.pop(0))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=_BT709)))
        container.mux(stream.encode())
        container.mux(heard)


def _write_gif(frames: np.ndarray, fps: float, metadata: dict[str, Any], path: Path) -> None:
    """Through ffmpeg's palette filters: one palette made for the clip, frames that repeat stay frames."""
    import av
    import av.filter

    graph = av.filter.Graph()
    h, w = frames.shape[1:3]
    pixels: Any = "rgb24"  # the stub asks for an object, the function takes the name
    source = graph.add_buffer(width=w, height=h, format=pixels, time_base=Fraction(1, 100))
    split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=bayer:bayer_scale=4:diff_mode=rectangle"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    times = np.round(np.arange(len(frames) + 1) * 100.0 / fps).astype(int)
    with av.open(str(path), "w", format="gif", options={"loop": "0"}) as container:
        stream: Any = container.add_stream("gif", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = w, h, "pal8"
        stream.codec_context.time_base = Fraction(1, 100)
        for pts, image in zip(times, frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(pts), Fraction(1, 100)
            source.push(frame)
        source.push(None)
        for pts, step in zip(times, np.diff(times)):
            frame = sink.pull()
            frame.pts, frame.duration = int(pts), int(step)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _insert_gif_comment(path, _comment(metadata))


def _insert_gif_comment(path: Path, text: str) -> None:
    """Put a comment extension (GIF89a, section 24) behind the global palette; the muxer has no way to ask for one."""
    data = path.read_bytes()
    packed = data[10]
    at = 13 + (3 << ((packed & 7) + 1) if packed & 0x80 else 0)
    blocks = [text[i : i + 255].encode("ascii") for i in range(0, len(text), 255)]
    comment = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\x00"
    path.write_bytes(data[:at] + comment + data[at:])


def _write_png(image: np.ndarray, metadata: dict[str, Any], path: Path) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", _comment(metadata))
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


def _write_folder(frames: np.ndarray, fps: float, metadata: dict[str, Any], path: Path) -> None:
    path.mkdir()
    for i, image in enumerate(frames):
        _write_png(image, metadata, path / f"{i:05d}.png")
    (path / CLIP_JSON).write_text(json.dumps({"fps": fps, "metadata": metadata}, indent=2) + "\n")
