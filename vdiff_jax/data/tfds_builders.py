"""TFDS data sets made by this library, without TensorFlow: the shapes world, and any folder of clips.

Frames are stored as zlib-compressed uint8 tensors in array_record files, which read back at thousands of clips a
second by random access (`tfds_source.TfdsSource`). The builders live in an importable module because TFDS stores
their name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vdiff_jax.data.sources import FolderSource, Record, Windows


def _features(num_frames: int | None, size: tuple[int, int]) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Tensor(shape=(num_frames, *size, 3), dtype=np.uint8, encoding="zlib"),
            "caption": tfds.features.Text(),
            "fps": tfds.features.Scalar(dtype=np.float32),
            "name": tfds.features.Text(),
        }
    )


class FolderBuilder(tfds.core.GeneratorBasedBuilder):
    """Every window of a folder's clips: `num_frames` frames each, one after the other, at `size`.

    folder, split rule and captions: see `FolderSource`. Splits are "train" and, with a holdout, "heldout".
    """

    name = "clip_folder"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "first"}
    code_path = None  # TFDS would look beside this file for checksums of downloads; there are none

    def __init__(
        self, folder: str, num_frames: int, size: int, holdout: float = 0.0, fps: float | None = None, **kwargs
    ):
        self._folder, self._num_frames, self._size = folder, num_frames, (size, size)
        self._holdout, self._fps = holdout, fps
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(builder=self, features=_features(self._num_frames, self._size))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits = ("train", "heldout") if self._holdout else ("train",)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, Record]]:
        windows = Windows(self._num_frames)
        source = FolderSource(self._folder, windows, self._size, split, self._holdout, self._fps)
        for index in range(len(source)):
            clip = source.read_whole(index)
            for start in range(0, len(clip["frames"]) - self._num_frames + 1, self._num_frames):
                part = start // self._num_frames
                yield (
                    f"{clip['name']}#{part}",
                    {
                        "video": clip["frames"][start : start + self._num_frames],
                        "caption": clip["captions"][part % len(clip["captions"])],
                        "fps": clip["fps"],
                        "name": clip["name"],
                    },
                )


class ShapesBuilder(tfds.core.GeneratorBasedBuilder):
    """`num_clips` captioned clips of the shapes world of its training split, drawn with a fixed seed."""

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "first"}
    code_path = None  # TFDS would look beside this file for checksums of downloads; there are none

    def __init__(self, world: Any, num_clips: int, seed: int = 0, fps: float = 8.0, **kwargs):
        self._world, self._num_clips, self._seed, self._fps = world, num_clips, seed, fps
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> Any:
        size = self._world.size
        return tfds.core.DatasetInfo(builder=self, features=_features(self._world.num_frames, (size, size)))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        import jax

        from vdiff_jax.data import shapes
        from vdiff_jax.data.transforms import to_uint8

        rng = np.random.default_rng(self._seed)
        render, piece = jax.jit(shapes.render, static_argnums=2), min(16, self._num_clips)
        for start in range(0, self._num_clips, piece):
            records = shapes.draw_records(rng, self._world, "train", piece)
            frames = to_uint8(np.asarray(render(records, shapes.native_times(self._world, piece), self._world)))
            texts = shapes.captions(records, rng)
            for i in range(min(piece, self._num_clips - start)):
                name = f"shapes {start + i}"
                yield start + i, {"video": frames[i], "caption": texts[i], "fps": self._fps, "name": name}


def prepare(folder: str | Path, out: str | Path, num_frames: int = 16, size: int = 64, holdout: float = 0.0) -> Path:
    """Turn a folder of clips into a TFDS data set under `out`; returns the folder to give to `TfdsSource`.

    An interrupted preparation leaves nothing that reads as a data set. Raises as `FolderSource`.
    """
    builder = FolderBuilder(str(folder), num_frames, size, holdout, data_dir=str(out))
    builder.download_and_prepare()
    return Path(builder.data_path)
