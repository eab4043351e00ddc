"""Filling a latent cache (`latent_cache.py`): by one process or by many, stopped and gone on at any moment.

Process i of n encodes the clips i, i + n, i + 2 n, ... and notes each beside its file; when every process has marked
its share as done the first one writes the index. Notes alone would not tell, as those of an earlier build are there
from the start. Nothing but the folder is shared, so the number of processes may change between an interrupted build and
its continuation, and the result is the same whoever encodes what.

While a build lasts, `.build.json` holds its name, drawn by the first process, and `.done.3.json` that name once process
3 is done; so marks left by a build that was killed count for nothing.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.latent_cache import CHECKSUMS, INDEX, PLAN, frame_checksums, read_frames
from vdiff_jax.data.paths import entries, make_path, write_whole
from vdiff_jax.data.sources import SkipReport, make_source
from vdiff_jax.data.transforms import to_video

EncodeMoments = Callable[[np.ndarray], Any]  # video f32 [b f h w 3] -> moments [b f h' w' 2c]
Progress = Callable[[int, int], None]
STALL_S = 900.0
BUILD = ".build.json"
_POLL_S = 0.5


def build_latent_cache(
    source: Any,
    encode_moments: EncodeMoments,
    folder: str | Path,
    digest: str,
    batch_size: int = 16,
    dtype: str = "float16",
    progress: Progress | None = None,
    process_index: int = 0,
    process_count: int = 1,
    stall_s: float = STALL_S,
) -> SkipReport:
    """Encode every clip of `source` into `folder`; returns the clips that could not be read.

    encode_moments: video f32 [1 batch_size h w 3] -> moments [1 batch_size h' w' 2c], frame by frame (a frame's
        moments may not depend on its neighbours); it always sees this one shape.
    digest: names the autoencoder's weights; a cache of another digest is refused. dtype: "float16" or "float32".
    source: needs `read_whole(index)` (see `FolderSource`), else `source[index]` windows are encoded.
    progress: called with the number of clips of this process that are done, and of all its clips.
    process_index, process_count: this process's share; every process returns when the whole cache is finished.
    stall_s: seconds to wait for others of whom nothing new is seen.
    Clips that are done are not encoded again, unless their file is damaged.
    Raises ValueError for a folder that holds a cache of something else, moments that are not finite, or no clips;
    TimeoutError where the share of another process does not come.
    """
    place: Any = make_path(folder)
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype must be "float16" or "float32", got {dtype!r}')
    place.mkdir(parents=True, exist_ok=True)
    size = getattr(source, "size", None)
    fps, split = getattr(source, "fps", None), getattr(source, "split", "all")
    plan = {"digest": digest, "size": size, "fps": fps, "dtype": dtype, "split": split, "clips": len(source)}
    _claim(place, json.loads(json.dumps(plan)))
    (place / INDEX).unlink(missing_ok=True)  # what it lists is about to change, and its coming is the end of this build
    build = uuid.uuid4().hex
    if process_index == 0:
        _write_json(place / BUILD, {"build": build})
    noted = _noted(place)
    share = range(process_index, len(source), process_count)
    for done, index in enumerate(share, 1):
        if index not in noted or not _is_whole(place, index, source):
            (place / _note(index)).unlink(missing_ok=True)
            _encode_clip(source, index, encode_moments, place, batch_size, dtype)
        if progress:
            progress(done, len(share))
    if process_index == 0:
        _wait(lambda: _missing_marks(place, build, process_count), place, len(source), stall_s)
        _write_index(place, plan, len(source))
        for entry in entries(place):
            if entry.name == BUILD or entry.name.startswith(".done."):
                entry.unlink(missing_ok=True)
    else:
        marked = _Mark(place, process_index)
        _wait(lambda: [] if (place / INDEX).exists() else marked.missing(), place, len(source), stall_s)
    return _skip_report(json.loads((place / INDEX).read_bytes()))


def has_latent_cache(folder: str | Path) -> bool:
    """Whether a finished cache is there, of whichever autoencoder."""
    return (make_path(folder) / INDEX).exists()


def ensure_latent_cache(
    data: Any,
    encode_moments: EncodeMoments,
    digest: str,
    split: str | None = None,
    progress: Progress | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> SkipReport | None:
    """Build the cache that `data.latent_cache` names unless a finished one is there; returns the report of a build.

    data: see `sources.make_source`; its clips are read whole. split: default `data.split`. process_index,
    process_count: see `build_latent_cache`. A finished cache is left as it is, and `LatentCache` refuses it if it
    belongs to another autoencoder.
    """
    folder = make_path(data.latent_cache)
    if has_latent_cache(folder):
        return None
    source = make_source(dataclasses.replace(data, latent_cache=""), split or data.split)
    return build_latent_cache(
        source,
        encode_moments,
        folder,
        digest,
        progress=progress,
        process_index=process_index,
        process_count=process_count,
    )


def _claim(folder: Any, plan: dict[str, Any]) -> None:
    """Write plan.json, or check that the one there asks for the same thing."""
    path = folder / PLAN
    others = [entry.name for entry in entries(folder) if not entry.name.startswith(".")]
    if others and not path.exists():  # asked in this order: another process may be writing it now
        raise ValueError(f"{folder} is not empty and holds no latent cache; choose another folder")
    if not others:
        _write_json(path, plan)
    found = json.loads(path.read_bytes())
    for key, value in plan.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder} holds a latent cache with {key} {found.get(key)!r}, not {value!r}; choose another folder"
            )


def _file(index: int) -> str:
    return f"{index:06d}.npy"


def _note(index: int) -> str:
    return f"{index:06d}.json"


def _noted(folder: Any) -> set[int]:
    """Numbers of the clips that are done or found unreadable."""
    stems = [entry.stem for entry in entries(folder) if entry.suffix == ".json"]
    return {int(stem) for stem in stems if stem.isdigit()}


def _is_whole(folder: Any, index: int, source: Any) -> bool:
    """Whether the clip that a note calls done is there to the last bit. Raises ValueError if it is another clip's."""
    try:
        note = json.loads((folder / _note(index)).read_bytes())
        name = note["name"]
    except (ValueError, KeyError, TypeError):
        return False
    if hasattr(source, "name") and source.name(index) != name:
        raise ValueError(f"{folder} holds {name!r} where the source has {source.name(index)!r}; choose another folder")
    if "unreadable" in note:
        return False  # it may be readable by now
    try:
        return note["checksums"] == frame_checksums(read_frames(folder / _file(index))).tolist()
    except (ValueError, KeyError, OSError):
        return False


def _encode_clip(
    source: Any, index: int, encode_moments: EncodeMoments, folder: Any, batch_size: int, dtype: str
) -> None:
    try:
        record = source.read_whole(index) if hasattr(source, "read_whole") else source[index]
    except (OSError, ValueError) as error:
        name = source.name(index) if hasattr(source, "name") else f"clip {index}"
        _write_json(folder / _note(index), {"name": name, "unreadable": str(error)})
        return
    with np.errstate(over="ignore"):  # judged next, in words
        moments = _encode_frames(record["frames"], encode_moments, batch_size).astype(dtype)
    if not np.isfinite(moments).all():
        raise ValueError(
            f"the moments of {record['name']} are not finite in {dtype}; check the autoencoder or use float32"
        )
    content = io.BytesIO()
    np.save(content, moments)
    write_whole(folder / _file(index), content.getvalue())
    note = {
        "file": _file(index),
        "name": record["name"],
        "num_frames": len(moments),
        "fps": float(record["fps"]),
        "captions": list(record.get("captions") or (record.get("caption", ""),)),
        "checksums": frame_checksums(moments).tolist(),
    }
    _write_json(folder / _note(index), note)  # after the .npy: this clip is done


def _encode_frames(frames: np.ndarray, encode_moments: EncodeMoments, batch_size: int) -> np.ndarray:
    """u8 [f h w 3] -> moments [f h' w' 2c], in pieces of one shape: the last is filled up with its last frame."""
    pieces = []
    for start in range(0, len(frames), batch_size):
        piece = frames[start : start + batch_size]
        missing = batch_size - len(piece)
        filled = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
        pieces.append(np.asarray(encode_moments(to_video(filled)[None]))[0, : len(piece)])
    return np.concatenate(pieces)


def _mark(process_index: int) -> str:
    return f".done.{process_index}.json"


def _named_build(path: Any) -> str:
    """The build that a mark or `.build.json` names; "" where there is none."""
    try:
        return json.loads(path.read_bytes())["build"]
    except FileNotFoundError:
        return ""


def _missing_marks(folder: Any, build: str, process_count: int) -> list[str]:
    names = [_mark(index) for index in range(1, process_count)]
    return [name for name in names if _named_build(folder / name) != build]


@dataclasses.dataclass
class _Mark:
    """That the share of a process is done, in the name of whichever build the first process has begun last."""

    folder: Any
    process_index: int
    build: str = ""

    def missing(self) -> list[str]:
        """Renew the mark, for the first process may begin later than this one; what is waited for."""
        build = _named_build(self.folder / BUILD)
        if build not in ("", self.build):
            _write_json(self.folder / _mark(self.process_index), {"build": build})
            self.build = build
        return [INDEX]


def _wait(missing: Callable[[], list[str]], folder: Any, clips: int, stall_s: float) -> None:
    """Until `missing` names no file any more, as long as the clips that are done, or the files missing, change."""
    known, deadline = None, 0.0
    while names := missing():
        noted = _noted(folder)
        if (noted, names) != known:
            known, deadline = (noted, names), time.monotonic() + stall_s
        if time.monotonic() > deadline:
            notes = [_note(index) for index in range(clips) if index not in noted]
            shown = ", ".join((notes or names)[:3])
            raise TimeoutError(
                f"{folder}: {len(notes)} of {clips} clips ({shown}) have not come from the other processes, and "
                f"nothing new for {stall_s:.0f} s; see that all run and that the folder is on storage they all share"
            )
        time.sleep(_POLL_S)


def _write_index(folder: Any, plan: dict[str, Any], clips: int) -> None:
    with ThreadPoolExecutor(16) as pool:  # waiting for storage, most of the time
        notes = list(pool.map(lambda index: json.loads((folder / _note(index)).read_bytes()), range(clips)))
    unreadable = {note["name"]: note["unreadable"] for note in notes if "unreadable" in note}
    readable = [note for note in notes if "unreadable" not in note]
    if not readable:
        raise ValueError(f"no clip could be encoded into {folder}; {_skip_report({'unreadable': unreadable})}")
    checksums = io.BytesIO()
    np.save(checksums, np.asarray([sum_ for note in readable for sum_ in note.pop("checksums")], np.uint32))
    write_whole(folder / CHECKSUMS, checksums.getvalue())
    _write_json(folder / INDEX, {**plan, "clips": readable, "unreadable": unreadable})


def _skip_report(index: dict[str, Any]) -> SkipReport:
    report = SkipReport()
    for name, reason in index.get("unreadable", {}).items():
        report.add(name, reason)
    return report


def _write_json(path: Any, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content) + "\n").encode())
