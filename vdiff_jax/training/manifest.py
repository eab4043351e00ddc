"""`manifest.json`, what a finished checkpoint is made of: a digest of every array and of every file.

It is the last file to be written, so a step without one was never finished. It vouches for itself too: its first entry
is the SHA-256 of the rest, and the bytes must be exactly those that the rest is written as.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from vdiff_jax import __version__
from vdiff_jax.parallel import path_name

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4  # files hashed at a time; each is read in small pieces


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is not what was saved; the sentence names the file or the array."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """step: of the state. arrays: dotted path -> {"shape", "dtype", "digest"}. files: path relative to the step's
    folder -> {"size" in bytes, "sha256"}. code: version of the package, with the git revision where it is known.
    processes, mesh: how it was saved; neither matters for restoring.
    """

    step: int
    arrays: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    code: str
    processes: int
    mesh: dict[str, int]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`: whole or not at all."""
        temporary = folder / (NAME + ".tmp")
        with temporary.open("wb") as file:
            file.write(_encode(dataclasses.asdict(self)))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / NAME)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises DamagedCheckpoint where it is missing or not as it was written."""
        path = folder / NAME
        try:
            found = path.read_bytes()
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} is missing: the save was cut off, or the file deleted") from error
        except PermissionError:
            raise  # for the user to mend; nothing is damaged
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
        try:
            content = json.loads(found)["content"]
            if found != _encode(content):
                raise ValueError
            manifest = Manifest(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedCheckpoint(f"{path} is damaged: its bytes are not those that were written") from error
        if manifest.format != FORMAT:
            raise ValueError(f"{path} is of format {manifest.format}, this version reads {FORMAT}: use a newer one")
        return manifest

    def first_damage(self, folder: Path, part: int = 0, parts: int = 1) -> str | None:
        """A sentence on the first file that is not as it was saved, or None.

        part, parts: check only every `parts`-th file, so that processes share the work. Each file is read once.
        """
        names = sorted(self.files, key=lambda name: (-self.files[name]["size"], name))[part::parts]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            problems = list(pool.map(lambda name: _file_problem(folder / name, self.files[name]), names))
        return next((problem for problem in problems if problem), None)


def describe_arrays(tree: Any, digests: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The `arrays` of a manifest."""
    return {
        path_name(path): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": digests[path_name(path)],
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The `files` of a manifest: all below a folder but the manifest itself. Reads each once, in small pieces."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in (NAME, NAME + ".tmp")]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _describe_file(folder / name), names)))


def mesh_shape(tree: Any) -> dict[str, int]:
    """Axis -> size of the mesh that the leaves lie on; empty without one."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return dict(leaf.sharding.mesh.shape)
    return {}


@functools.cache
def code_version() -> str:
    """`0.1.0`, or `0.1.0 (git 1a2b3c4)` with `-dirty` after changes, where the package lies in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return f"{__version__} (git {found})" if found else __version__


def _encode(content: dict[str, Any]) -> bytes:
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({"sha256": digest, "content": content}, indent=1) + "\n").encode()


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _file_problem(path: Path, wanted: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["size"]:
            return f"{path} has {size} bytes, {wanted['size']} were written"
        found = _describe_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except PermissionError:
        raise
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if found == wanted else f"{path} is damaged: its content is not what was written"
