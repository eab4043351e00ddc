"""Any TFDS data set of clips as a source, read without TensorFlow (random access over array_record files).

Features stored as tensors, images or text decode without TensorFlow; `tfds.features.Video` needs it. A clip is a
[f h w 3] uint8 tensor or a sequence of images; captions are text, bytes or a class label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vdiff_jax.data.paths import make_path
from vdiff_jax.data.sources import Record, Windows
from vdiff_jax.data.transforms import centre_crop_resize

FRAMES_KEYS = ("video", "frames", "images", "image")
CAPTION_KEYS = ("caption", "text", "captions", "label")


class TfdsSource:
    """Clips of a prepared TFDS data set.

    folder: the builder's folder (the one with dataset_info.json), or use `name` and `data_dir`.
    split: TFDS split, slices such as "train[:90%]" included. size: as in `read_video`; None keeps the stored one.
    frames_key, caption_key: feature names, None finds the usual ones. fps: frames per second where records have none.
    Raises FileNotFoundError, ValueError or ImportError with the way out.
    """

    def __init__(
        self,
        windows: Windows,
        folder: str | Path | None = None,
        name: str | None = None,
        data_dir: str | None = None,
        split: str = "train",
        size: int | tuple[int, int] | None = None,
        frames_key: str | None = None,
        caption_key: str | None = None,
        fps: float = 8.0,
    ):
        self.windows, self.size, self.fps = windows, size, fps
        try:
            builder = _builder(folder, name, data_dir)
            self._records: Any = builder.as_data_source(split=split)
            self._builder, self._split = builder, split
        except ImportError as error:
            raise ImportError(
                f"the data set {name or folder} has a feature that only TensorFlow decodes ({error}); install "
                "tensorflow-cpu, or store the clips as Tensor or Image features"
            ) from error
        except NotImplementedError as error:  # how TFDS says that a file format has no random access
            raise ValueError(
                f"the data set {name or folder} is not stored as array_record, so it has no random access; prepare it "
                "with file_format='array_record'"
            ) from error
        features = dict(builder.info.features or {})
        found = _find_key(features, frames_key, FRAMES_KEYS, "frames")
        if found is None:
            raise ValueError(f"no frames among the features {sorted(features)} of {name or folder}; give frames_key")
        self._frames_key = found
        self._caption_key = _find_key(features, caption_key, CAPTION_KEYS, "caption")
        self._label_names = getattr(features.get(self._caption_key or ""), "names", None)
        if not len(self):
            raise ValueError(f"split {split!r} of {name or folder} holds no clips; choose another split")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self.read(index, np.random.default_rng([index]))

    def name(self, index: int) -> str:
        return f"record {index}"

    def captions(self) -> list[str]:
        """All captions, for fitting a tokenizer; frames are not decoded."""
        import tensorflow_datasets as tfds

        if self._label_names:
            return list(self._label_names)
        if self._caption_key is None:
            return [""]
        raw = {self._frames_key: tfds.decode.SkipDecoding()}
        return [self._caption(r) for r in self._builder.as_data_source(split=self._split, decoders=raw)]

    def read(self, index: int, rng: np.random.Generator) -> Record:
        """One random window. Raises ValueError for a record that holds no clip of enough frames."""
        record = self._records[index]
        whole = self._frames(record)
        numbers, times, anchor = self.windows.draw(len(whole), rng)
        frames = np.ascontiguousarray(whole[numbers])
        return {
            "frames": frames if self.size is None else centre_crop_resize(frames, self.size),
            "times": times,
            "anchor": anchor,
            "fps": float(record.get("fps", self.fps)),
            "caption": self._caption(record),
            "name": self.name(index),
        }

    def read_whole(self, index: int) -> Record:
        """Every frame of a record, for the latent cache."""
        record = self._records[index]
        frames = self._frames(record)
        return {
            "frames": frames if self.size is None else centre_crop_resize(frames, self.size),
            "fps": float(record.get("fps", self.fps)),
            "name": self.name(index),
            "captions": (self._caption(record),),
        }

    def _frames(self, record: dict[str, Any]) -> np.ndarray:
        frames = record[self._frames_key]
        frames = np.stack(frames) if isinstance(frames, list) else np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames  # one image
        if frames.ndim != 4 or frames.shape[-1] not in (1, 3) or frames.dtype != np.uint8:
            raise ValueError(f"feature {self._frames_key!r} is {frames.dtype} {frames.shape}, not uint8 [f h w 3]")
        return frames if frames.shape[-1] == 3 else np.repeat(frames, 3, axis=-1)

    def _caption(self, record: dict[str, Any]) -> str:
        if self._caption_key is None:
            return ""
        found = np.ravel(np.asarray(record[self._caption_key], dtype=object))  # text, or a list of alternatives
        caption: Any = found[0] if found.size else ""
        if isinstance(caption, bytes):
            return caption.decode("utf-8")
        return self._label_names[int(caption)] if self._label_names else str(caption)


def _builder(folder: str | Path | None, name: str | None, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    if (folder is None) == (name is None):
        raise ValueError("a tfds source needs either folder or name (with data_dir)")
    if folder is not None:
        if not (make_path(folder) / "dataset_info.json").exists():
            raise FileNotFoundError(f"{folder} holds no dataset_info.json; give the folder of a prepared data set")
        return tfds.builder_from_directory(str(folder))
    builder = tfds.builder(str(name), data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def _find_key(features: dict[str, Any], key: str | None, usual: tuple[str, ...], what: str) -> str | None:
    if key is not None and key not in features:
        raise ValueError(f"no feature {key!r} for the {what}; the data set has {', '.join(sorted(features))}")
    return key or next((k for k in usual if k in features), None)
