"""Small whole clips in a dozen formats, and the ways to damage them; used by `mutated_videos.py` and the tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

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
IMAGES = {"palette.gif": {}, "animated.apng": {}, "animated.webp": {"quality": 80}}


def make_originals(folder: Path, names: Container[str] = (*CODECS, *IMAGES)) -> list[Path]:
    """Twelve moving frames of 64 x 64 in every format; those whose encoder is missing are left out."""
    t, y, x = np.mgrid[0:12, 0:64, 0:64].astype(np.float64)
    waves = [np.sin((x + 2 * t) / 9), np.cos((y - 3 * t) / 11), np.sin((x + y) / 25 + t / 5)]
    frames = (127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, pixels) in CODECS.items():
        if name in names and codec in av.codecs_available:
            _encode(folder / name, frames, codec, pixels)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    for name, options in IMAGES.items():
        if name in names:
            kind = "PNG" if name.endswith(".apng") else None
            first.save(folder / name, format=kind, save_all=True, append_images=rest, duration=80, loop=0, **options)
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
