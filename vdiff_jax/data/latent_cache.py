"""Clips encoded once: the autoencoder's raw posterior moments on disk, and a source that draws windows from them.

A cache is a folder:

    plan.json        what is being built (autoencoder digest, size, dtype); written first
    000000.npy ...   moments [f h w 2c] of one clip, all its frames: posterior mean, then log-variance
    index.json       the finished list: file, name, fps, captions of each clip; written last

Clips whose file exists are not encoded again, so an interrupted build goes on where it stopped. Raw moments, not
latents: sampling the posterior and scaling to unit variance happen at training time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.sources import Record, SkipReport, Windows, in_split, make_source
from vdiff_jax.data.transforms import to_video

EncodeMoments = Callable[[np.ndarray], Any]  # video f32 [b f h w 3] -> moments [b f h' w' 2c]
_PLAN, _INDEX = "plan.json", "index.json"


def build_latent_cache(
    source: Any,
    encode_moments: EncodeMoments,
    folder: str | Path,
    digest: str,
    batch_size: int = 16,
    dtype: str = "float16",
    progress: Callable[[int, int], None] | None = None,
) -> SkipReport:
    """Encode every clip of `source` into `folder`; returns the clips that could not be read.

    encode_moments: video f32 [1 batch_size h w 3] -> moments [1 batch_size h' w' 2c], frame by frame (a frame's
        moments may not depend on its neighbours); it always sees this one shape.
    digest: names the autoencoder's weights; a cache of another digest is refused. dtype: "float16" or "float32".
    source: needs `read_whole(index)` (see `FolderSource`), else `source[index]` windows are encoded.
    Raises ValueError for a folder that holds a cache of something else, moments that are not finite, or no clips.
    """
    folder = Path(folder)
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype must be "float16" or "float32", got {dtype!r}')
    folder.mkdir(parents=True, exist_ok=True)
    size = getattr(source, "size", None)
    fps, split = getattr(source, "fps", None), getattr(source, "split", "all")
    plan = {"digest": digest, "size": size, "fps": fps, "dtype": dtype, "split": split, "clips": len(source)}
    _claim(folder, json.loads(json.dumps(plan)))
    clips, skipped = [], SkipReport()
    for index in range(len(source)):
        entry = _encode_clip(source, index, encode_moments, folder, batch_size, dtype, skipped)
        if entry is not None:
            clips.append(entry)
        if progress:
            progress(index + 1, len(source))
    if not clips:
        raise ValueError(f"no clip could be encoded into {folder}; {skipped}")
    _write_json(folder / _INDEX, {**plan, "clips": clips})
    return skipped


def ensure_latent_cache(
    data: Any,
    encode_moments: EncodeMoments,
    digest: str,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SkipReport | None:
    """Build the cache that `data.latent_cache` names unless a finished one is there; returns the report of a build.

    data: see `sources.make_source`; its clips are read whole. split: default `data.split`. A finished cache is left
    as it is, and `LatentCache` refuses it if it belongs to another autoencoder.
    """
    folder = Path(data.latent_cache)
    if (folder / _INDEX).is_file():
        return None
    source = make_source(dataclasses.replace(data, latent_cache=""), split or data.split)
    return build_latent_cache(source, encode_moments, folder, digest, progress=progress)


class LatentCache:
    """Source of windows of cached moments: records hold `moments` f32 [f h w 2c] instead of `frames`.

    digest: the autoencoder about to be used; a cache made by another one is refused. None accepts any.
    split, holdout: as in `FolderSource`, where the cache was made of all clips.
    Clips too short for a window are left out and listed in `skipped`.
    Raises FileNotFoundError for a folder without a finished cache, ValueError for another digest or no usable clip.
    """

    def __init__(
        self,
        folder: str | Path,
        windows: Windows,
        digest: str | None = None,
        split: str = "all",
        holdout: float = 0.0,
    ):
        self.folder, self.windows, self.skipped = Path(folder), windows, SkipReport()
        path = self.folder / _INDEX
        if not path.is_file():
            state = "an unfinished" if (self.folder / _PLAN).is_file() else "no"
            raise FileNotFoundError(
                f"{folder} holds {state} latent cache; train with data.latent_cache={folder} to build it"
            )
        index = json.loads(path.read_text())
        self.digest = index["digest"]
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{folder} was made by the autoencoder {self.digest!r}, not by {digest!r}; build a cache with this one"
            )
        chosen = index["clips"]
        if index["split"] == "all":
            chosen = [clip for clip in chosen if in_split(clip["name"], split, holdout)]
        elif split not in ("all", index["split"]):
            made = index["split"]
            raise ValueError(f"{folder} was made from the split {made!r}, not {split!r}; build a cache of {split!r}")
        for clip in chosen:
            if clip["num_frames"] < windows.shortest:
                self.skipped.add(clip["name"], f"{clip['num_frames']} frames, {windows.shortest} needed")
        self._clips = [clip for clip in chosen if clip["num_frames"] >= windows.shortest]
        if not self._clips:
            raise ValueError(
                f"{folder} holds no usable clip in split {split!r} of {len(index['clips'])}; {self.skipped}"
            )

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Record:
        return self.read(index, np.random.default_rng([index]))

    def name(self, index: int) -> str:
        return self._clips[index]["name"]

    def captions(self) -> list[str]:
        """All captions of all clips, for fitting a tokenizer."""
        return [caption for clip in self._clips for caption in clip["captions"]]

    def read(self, index: int, rng: np.random.Generator) -> Record:
        clip = self._clips[index]
        numbers, times, anchor = self.windows.draw(clip["num_frames"], rng)
        caption = clip["captions"][int(rng.integers(len(clip["captions"])))]
        stored = np.load(self.folder / clip["file"], mmap_mode="r")  # only the window is read from disk
        return {
            "moments": np.asarray(stored[numbers], np.float32),
            "times": times,
            "anchor": anchor,
            "fps": clip["fps"],
            "caption": caption,
            "name": clip["name"],
        }


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write plan.json, or check that the one there asks for the same thing."""
    path = folder / _PLAN
    if not path.is_file():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no latent cache; choose another folder")
        _write_json(path, plan)
        return
    found = json.loads(path.read_text())
    for key, value in plan.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder} holds a latent cache with {key} {found.get(key)!r}, not {value!r}; choose another folder"
            )


def _encode_clip(
    source: Any,
    index: int,
    encode_moments: EncodeMoments,
    folder: Path,
    batch_size: int,
    dtype: str,
    skipped: SkipReport,
) -> dict[str, Any] | None:
    file, note = f"{index:06d}.npy", folder / f"{index:06d}.json"
    if note.is_file():  # written after the .npy: this clip is done
        entry = json.loads(note.read_text())
        if hasattr(source, "name") and source.name(index) != entry["name"]:
            raise ValueError(
                f"{folder} holds {entry['name']!r} where the source has {source.name(index)!r}; choose another folder"
            )
        return entry
    try:
        record = source.read_whole(index) if hasattr(source, "read_whole") else source[index]
    except (OSError, ValueError) as error:
        skipped.add(source.name(index) if hasattr(source, "name") else f"clip {index}", str(error))
        return None
    with np.errstate(over="ignore"):  # judged next, in words
        moments = _encode_frames(record["frames"], encode_moments, batch_size).astype(dtype)
    if not np.isfinite(moments).all():
        raise ValueError(
            f"the moments of {record['name']} are not finite in {dtype}; check the autoencoder or use float32"
        )
    temporary = folder / f".{file}.{uuid.uuid4().hex[:8]}.tmp"
    with open(temporary, "wb") as stream:
        np.save(stream, moments)
    os.replace(temporary, folder / file)
    entry = {
        "file": file,
        "name": record["name"],
        "num_frames": len(moments),
        "fps": float(record["fps"]),
        "captions": list(record.get("captions") or (record.get("caption", ""),)),
    }
    _write_json(note, entry)
    return entry


def _encode_frames(frames: np.ndarray, encode_moments: EncodeMoments, batch_size: int) -> np.ndarray:
    """u8 [f h w 3] -> moments [f h' w' 2c], in pieces of one shape: the last is filled up with its last frame."""
    pieces = []
    for start in range(0, len(frames), batch_size):
        piece = frames[start : start + batch_size]
        missing = batch_size - len(piece)
        filled = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
        pieces.append(np.asarray(encode_moments(to_video(filled)[None]))[0, : len(piece)])
    return np.concatenate(pieces)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
