"""Files of weights: safetensors, one or several with an index, read lazily; never a pickle."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclasses.dataclass(frozen=True)
class Weights(Mapping[str, tuple[int, ...]]):
    """The tensors of a checkpoint by name: a mapping to their shapes; `read` loads one at a time.

    source: the file, or the index of the files, for messages. files: where each tensor is.
    """

    source: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    files: dict[str, Path]

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored. Raises ValueError if the file has a checksum of it and it is another."""
        with safe_open(self.files[name], "numpy") as file:
            tensor = file.get_tensor(name)
        wanted = self.checksums.get(name)
        if wanted is not None and checksum(tensor) != wanted:
            raise ValueError(
                f"{self.files[name]}: {name} is not the tensor that was saved: its checksum is {checksum(tensor)}, the "
                f"file says {wanted}; get the file anew"
            )
        return tensor

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """What the files say of their tensors; only those that `save_weights` wrote say anything."""
        found: dict[str, str] = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, "numpy") as file:
                found |= json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
        return found

    @property
    def metadata(self) -> dict[str, str]:
        """What the (first) file says of itself."""
        with safe_open(next(iter(self.files.values())), "numpy") as file:
            return file.metadata() or {}


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""What diffusers and transformers call the weights of a component."""


def open_weights(path: str | Path, variant: str | None = None) -> Weights:
    """The weights at `path`: a safetensors file, an index of several, or the folder of a component.

    variant: "fp16" and the like, as in `diffusion_pytorch_model.fp16.safetensors`; None takes the plain file, or the
        only variant there is.
    Raises FileNotFoundError if there are none; ValueError for a pickle, which is never opened, a file that is cut
    short, or an index that names a file which lacks what the index promises.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_file(path, variant)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no weights to read")
    refuse_pickle(path)
    if path.suffix == ".json":
        return _open_index(path)
    return _collect(path, [path])


def _weights_file(folder: Path, variant: str | None) -> Path:
    names = [f"{stem}{kind}" for stem in STEMS for kind in (".safetensors", ".safetensors.index.json")]
    if variant:
        # The two libraries, and their versions, place the variant's name differently in that of an index.
        ends = ("{}.safetensors", "{}.safetensors.index.json", "safetensors.index.{}.json")
        names = [f"{stem}.{end.format(variant)}" for stem in STEMS for end in ends]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p for p in folder.glob("*.safetensors") if not re.search(r"-\d{5}-of-\d{5}", p.name))
    if len(others) == 1 and variant is None:
        return others[0]
    if pickles := sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        refuse_pickle(pickles[0])
    had = ", ".join(p.name for p in others) or "none"
    raise FileNotFoundError(f"{folder} has no {names[0]}; safetensors files there: {had}")


def refuse_pickle(path: Path) -> None:
    """Raises ValueError if the first bytes are those of a pickle, bare or in a zip archive as torch writes it."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: before its json stands the json's length, whose bytes can look like a pickle's
        return
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is opened, so it is not read: convert it once where torch "
            'is installed, safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors"), or '
            "take the safetensors file that the model's authors give"
        )


def _open_index(path: Path) -> Weights:
    try:
        placed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not an index of weights ({error})") from error
    files = [path.parent / name for name in sorted(set(placed.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {path.name} names: the download is incomplete")
        refuse_pickle(file)
    weights = _collect(path, files)
    wrong = sorted(
        name for name in placed.keys() | weights.keys() if weights.files.get(name) != path.parent / placed.get(name, "")
    )
    if wrong:
        raise ValueError(f"{path} and its files disagree about {', '.join(wrong[:8])}")
    return weights


def _collect(source: Path, files: Sequence[Path]) -> Weights:
    weights = Weights(source, {}, {}, {})
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    weights.shapes[name] = tuple(entry.get_shape())
                    weights.dtypes[name] = entry.get_dtype()
                    weights.files[name] = path
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    return weights


CHECKSUMS = "crc32"
"""In the metadata of files that we write: the checksum of every tensor. A square matrix that was transposed, or any
other change that keeps the shape, cannot be told otherwise."""


def checksum(tensor: np.ndarray) -> str:
    return f"{zlib.crc32(tensor.tobytes()):08x}"


STALE = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def dtype_of(name: str) -> np.dtype:
    """float32, float16, or bfloat16, which numpy alone does not know."""
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {name!r} is unknown: use float32, float16 or bfloat16")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """One safetensors file, by a temporary name in the same folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
