"""Folders here and far away: `gs://bucket/clips` is as good a place for data as a folder of this machine.

A path with a scheme becomes an `etils.epath.Path`, which opens gs://, s3://, az:// and hf:// through fsspec and the
plugin that the user installs for it (gcsfs, s3fs, ...), or through TensorFlow where that is installed. Any other path
is a plain `pathlib.Path`. Both have the same methods.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

SCHEMES = ("gs", "s3", "az", "hf")


def make_path(path: str | os.PathLike) -> Any:
    """A `pathlib.Path`, or an `epath.Path` for a path such as "s3://bucket/clips".

    Raises ValueError for a scheme that nothing here can open, ImportError where its plugin is missing.
    """
    text = os.fspath(path)
    if "://" not in text:
        return path if isinstance(path, Path) else Path(text)
    scheme = text.split("://", 1)[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{text}: no storage is known by {scheme}://; use a folder of this machine or one of {known}")
    _check_plugin(text, scheme)
    from etils import epath

    return epath.Path(text)


@functools.cache
def _check_plugin(text: str, scheme: str) -> None:
    if importlib.util.find_spec("tensorflow") is not None:
        return  # then epath goes through it
    import fsspec
    from fsspec.config import conf

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ImportError(f"{text}: {scheme}:// needs a plugin of fsspec ({error}); install it") from error
    # What other processes write has to be seen: plugins remember the listings of folders otherwise.
    for name in (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol:
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def is_remote(path: Any) -> bool:
    return "://" in os.fspath(path)


def size_of(path: Any) -> int:
    """Bytes of a file. Raises OSError if there is none."""
    stat = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def entries(folder: Any) -> list[Any]:
    """What a folder holds; nothing where there is none, for object storage knows no empty folders."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def write_whole(path: Any, data: bytes) -> None:
    """Write a file that appears whole or not at all, whoever is stopped when.

    Here by a temporary name that is renamed; in object storage by one upload, which shows nothing before its end.
    """
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
