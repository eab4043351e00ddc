"""The folders of a run's checkpoints on disk: which are finished, which go, which are set aside.

    checkpoints/500                                 a step; finished if it holds manifest.json
    checkpoints/500.orbax-checkpoint-tmp            being written
    checkpoints/500.saving                          a save has begun, and its manifest is not yet written
    checkpoints/500.removing                        being removed
    checkpoints/500.damaged, 500.damaged-2, ...     set aside, never removed

Only process 0 calls what changes anything here, but for `mark_begun`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from vdiff_jax.training import manifest

_TEMPORARY = ".orbax-checkpoint-tmp"
_REMOVING = ".removing"
_SAVING = ".saving"


def list_steps(folder: Path) -> list[int]:
    """The steps that have a folder of their own, rising, whether finished or not."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def kept_steps(steps: Iterable[int], keep: int, keep_every: int = 0) -> list[int]:
    """The newest `keep`, and those divisible by `keep_every` (0 = none)."""
    rising = sorted(steps)
    newest = rising[-keep:]
    return [step for step in rising if step in newest or (keep_every and step % keep_every == 0)]


def mark_begun(folder: Path, step: int, process: int) -> None:
    """Leave a file that tells of a save in progress; where a process cannot, its storage fails before the save begins.

    A step without a manifest was never finished if this file is there, and has lost its manifest if not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}{_SAVING}" if process == 0 else folder / f"{step}{_SAVING}-{process}"
    path.write_text(f"process {process} saves step {step}\n")
    if process:
        path.unlink()


def mark_finished(folder: Path, step: int) -> None:
    """Remove that file."""
    (folder / f"{step}{_SAVING}").unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in list(folder.iterdir()):
        if path.is_dir() and (_TEMPORARY in path.name or path.name.endswith(_REMOVING)):
            shutil.rmtree(path)
        elif path.name.endswith(_SAVING):
            step = folder / path.name.removesuffix(_SAVING)
            if step.is_dir() and not (step / manifest.NAME).exists():
                remove(folder, int(step.name))
            path.unlink()
        elif f"{_SAVING}-" in path.name:
            path.unlink()


def discard_unfinished(folder: Path, step: int) -> None:
    """Remove what a failed save of `step` left; a folder with a manifest is not of that save."""
    left = [*folder.glob(f"{step}{_TEMPORARY}*")]
    if not (folder / str(step) / manifest.NAME).exists():
        left.append(folder / str(step))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        mark_finished(folder, step)


def remove(folder: Path, step: int) -> None:
    """Remove a step. Renamed first: half a folder never bears the name of a step."""
    going = folder / f"{step}{_REMOVING}"
    (folder / str(step)).rename(going)
    shutil.rmtree(going)


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged step, so that it can be looked at and does not block saving that step again."""
    for number in range(1, 1000):
        target = folder / (f"{step}.damaged" + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            return (folder / str(step)).rename(target)
    raise OSError(f"{folder} holds too many damaged copies of step {step}: remove some")
