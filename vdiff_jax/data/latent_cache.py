"""Clips encoded once: the autoencoder's raw posterior moments on disk, and a source that draws windows from them.

A cache is a folder, here or far away (`paths.py`), filled by `cache_build.py`:

    plan.json        what is being built (autoencoder digest, size, dtype); written first
    000000.npy ...   moments [f h w 2c] of one clip, all its frames: posterior mean, then log-variance
    000000.json ...  that the clip is done: name, captions, a checksum of each frame; or why it cannot be read
    checksums.npy    CRC-32 of every frame, u32 [all frames], clip after clip
    index.json       the finished list: file, name, fps, captions of each clip; written last

Raw moments, not latents: sampling the posterior and scaling to unit variance happen at training time. What is read is
compared with its checksums, so a damaged file is left out with its reason and never trained on.
"""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.paths import make_path
from vdiff_jax.data.sources import Record, SkipReport, Windows, all_too_short, in_split

PLAN, INDEX, CHECKSUMS = "plan.json", "index.json", "checksums.npy"


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
        self.folder, self.windows, self.skipped = make_path(folder), windows, SkipReport()
        index = self._index()
        self.digest, self._dtype = index["digest"], np.dtype(index["dtype"])
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{folder} was made by the autoencoder {self.digest!r}, not by {digest!r}; build a cache with this one"
            )
        chosen = self._with_checksums(index["clips"])
        if index["split"] == "all":
            chosen = [clip for clip in chosen if in_split(clip["name"], split, holdout)]
        elif split not in ("all", index["split"]):
            made = index["split"]
            raise ValueError(f"{folder} was made from the split {made!r}, not {split!r}; build a cache of {split!r}")
        for clip in chosen:
            if clip["num_frames"] < windows.shortest:
                self.skipped.add(clip["name"], f"{clip['num_frames']} frames, {windows.shortest} needed")
        self._clips = [clip for clip in chosen if clip["num_frames"] >= windows.shortest]
        if not chosen:
            raise ValueError(f"{folder} holds no clip of split {split!r}, of {len(index['clips'])}; change the split")
        if not self._clips:
            raise ValueError(all_too_short(folder, [clip["num_frames"] for clip in chosen], windows))

    def _index(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / INDEX).read_bytes())
        except FileNotFoundError as error:
            state = "an unfinished" if (self.folder / PLAN).exists() else "no"
            raise FileNotFoundError(
                f"{self.folder} holds {state} latent cache; train with data.latent_cache={self.folder} to build it"
            ) from error

    def _with_checksums(self, clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The clips, each with the place of its first frame among all checksums; older caches have none."""
        try:
            self._checksums = np.load(io.BytesIO((self.folder / CHECKSUMS).read_bytes()))
        except FileNotFoundError:
            self._checksums = None
        starts = np.cumsum([0, *(clip["num_frames"] for clip in clips)])
        return [{**clip, "first_frame": int(start)} for clip, start in zip(clips, starts)]

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
        """One random window. Raises ValueError or OSError for a file that is missing, cut off or damaged."""
        clip = self._clips[index]
        numbers, times, anchor = self.windows.draw(clip["num_frames"], rng)
        caption = clip["captions"][int(rng.integers(len(clip["captions"])))]
        moments = read_frames(self.folder / clip["file"], int(numbers.min()), int(numbers.max()) + 1)
        moments = moments[numbers - numbers.min()]
        if self._checksums is not None:
            wanted = self._checksums[clip["first_frame"] + numbers]
            if moments.dtype != self._dtype or (frame_checksums(moments) != wanted).any():
                raise ValueError(
                    f"{self.folder / clip['file']} is damaged (a checksum differs); delete {INDEX} in its folder and "
                    "train again: damaged files are encoded anew"
                )
        return {
            "moments": np.asarray(moments, np.float32),
            "times": times,
            "anchor": anchor,
            "fps": clip["fps"],
            "caption": caption,
            "name": clip["name"],
        }


def read_frames(path: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Frames start..stop of an .npy file of moments [f h w 2c]; no other is read from the storage.

    Raises ValueError, naming the file, where it does not hold them, OSError where it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # numpy parses the header as Python, which fails in many ways
            raise ValueError(f"{path} is damaged ({error}); build the latent cache again") from error
        stop = shape[0] if stop is None else stop
        frame_bytes = dtype.itemsize * int(np.prod(shape[1:]))
        if fortran_order or dtype.hasobject or len(shape) != 4 or not 0 <= start < stop <= shape[0]:
            raise ValueError(f"{path} holds {dtype} {shape}, not frames {start} to {stop}; build the cache again")
        file.seek(start * frame_bytes, 1)
        data = file.read((stop - start) * frame_bytes)
    if len(data) < (stop - start) * frame_bytes:
        raise ValueError(f"{path} is cut off; build the latent cache again")
    return np.frombuffer(data, dtype).reshape(stop - start, *shape[1:])


def frame_checksums(moments: np.ndarray) -> np.ndarray:
    """CRC-32 of each frame: u32 [f]."""
    return np.asarray([zlib.crc32(frame.tobytes()) for frame in moments], np.uint32)
