"""Async, sharded checkpoints of a `TrainState` and the run's data position, by orbax, verified end to end.

A checkpoint holds `state` (step, params, optimizer, EMA, counters), `meta` (the config and the data position) and
`manifest.json` (digests). Because the order of the data is a pure function of (seed, step), the step is the data
position. The digest of each array is taken from the device when it is saved, and compared on the device when it is
restored: whatever happens between, on whatever mesh, is noticed. See `docs/checkpoints.md`.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vdiff_jax.parallel import path_name
from vdiff_jax.training import step_folders
from vdiff_jax.training.agreement import first_message, from_first
from vdiff_jax.training.digests import tree_digests
from vdiff_jax.training.manifest import (
    DamagedCheckpoint,
    Manifest,
    code_version,
    describe_arrays,
    describe_files,
    mesh_shape,
)
from vdiff_jax.training.partial_restore import filled, read_arrays
from vdiff_jax.training.step import TrainState
from vdiff_jax.training.storage_log import log_storage_errors_once

_STORAGE_ERRORS = (OSError, ValueError, RuntimeError)  # tensorstore reports a full disk as ValueError
_DENIED = "no right to read"


class SaveFailed(OSError):
    """The last checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of one run folder, `<workdir>/checkpoints/<step>`.

    keep: how many of the newest to keep. keep_every: those at multiples of so many steps are kept as well; 0 = off.

    Every method is called by all processes, with the same arguments. Writes are atomic and asynchronous: `save` returns
    once the arrays are copied to the host. timeout_s: how long processes wait for one whose part is not written.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 3, keep_every: int = 0, timeout_s: float = 1000.0):
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"train.keep_checkpoints={keep} must be at least 1, keep_every_steps={keep_every} at least 0"
            )
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._keep, self._keep_every = keep, keep_every
        log_storage_errors_once()
        self._steps: list[int] = from_first(self._found() if jax.process_index() == 0 else None)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()),
            # Made in the background, a folder that cannot be made would leave threads that wait for it for minutes.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, timeout_secs=max(round(timeout_s), 1)
            ),
        )
        self._save: _Save | None = None
        self.failure: str | None = None
        """Why the last save failed; None if it did not."""

    def begin(self) -> None:
        """Make the folder and remove what a killed run left half-written. Only for the one run that trains here."""
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                step_folders.clear_leftovers(self.folder)
            except OSError as error:
                warnings.warn(f"leftovers in {self.folder} cannot be removed: {error}", stacklevel=2)
        self._steps = from_first(self._found() if jax.process_index() == 0 else None)

    @property
    def latest_step(self) -> int | None:
        """The newest step, one being written included."""
        if self._save is not None and self._save.error is None:
            return self._save.step
        return self._steps[-1] if self._steps else None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Save under `state.step`; a step that is there already is left alone.

        meta: what JSON can hold. A save that fails ends in a warning and in `failure`, its remains are removed and the
        older checkpoints stay; it may only be known at the next call. Waits for the save before, if it still goes on.
        """
        step = int(state.step)
        self._settle()
        if step in self._steps:
            return
        digests = tree_digests(state)  # also waits for the step, so that its own errors arise here
        self._save = _Save(self, step, describe_arrays(state, digests), mesh_shape(state))
        # Told before orbax begins, which would wait for the process that cannot write.
        problem = first_message(self._try_to(lambda: step_folders.mark_begun(self.folder, step, jax.process_index())))
        if problem is None:
            contents = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            error = self._try_to(lambda: self._checkpointer.save(self.folder / str(step), args=contents))
            if error is None:
                self._save.start()
            problem = first_message(error)
        if problem:
            self._save.error = problem
            self._settle()

    def restore(
        self, abstract: TrainState, shardings: Any, step: int | None = None, *, fresh: TrainState | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint that is as it was saved (or `step`) onto `shardings`, whatever mesh wrote it.

        abstract: a tree of ShapeDtypeStructs. fresh: if given, leaves that the checkpoint has in another shape, or
        lacks, are those of this state, with a warning that lists them.

        A damaged checkpoint is passed over with a warning that names the file or array, and set aside once an older
        one is restored. Raises DamagedCheckpoint with every reason where none is left; ValueError naming every leaf
        that is missing or of another shape, unless `fresh` is given; FileNotFoundError without any checkpoint.
        """
        self._settle()
        wanted = self._steps[::-1] if step is None else [step]
        if not wanted:
            raise FileNotFoundError(f"{self.folder} holds no finished checkpoint: train first, or give another workdir")
        damage: dict[int, str] = {}
        for candidate in wanted:
            try:
                restored = self._restore_verified(candidate, abstract, shardings, fresh)
            except DamagedCheckpoint as error:
                damage[candidate] = str(error)
                continue
            self._set_aside(damage, candidate)
            return restored
        raise DamagedCheckpoint(
            f"no checkpoint in {self.folder} is as it was saved: {'; '.join(damage.values())}; "
            "bring back a copy of one, or give another workdir"
        )

    def check(self, abstract: TrainState) -> None:
        """Whether the newest checkpoint is of this config, by its manifest alone; nothing if there is none.

        Raises ValueError naming every leaf that is missing or of another shape. Damage is left to `restore`.
        """
        if not self._steps:
            return
        folder = self.folder / str(self._steps[-1])
        try:
            manifest = Manifest.read(folder)
        except (DamagedCheckpoint, OSError):
            return
        _refuse(folder, _differences(manifest, abstract))

    def wait(self) -> None:
        """Until what is being written is finished. Raises SaveFailed if the last save was not."""
        self._settle()
        if self.failure:
            raise SaveFailed(self.failure)

    def close(self, *, agree: bool = True) -> None:
        """Finish writing; a failure is only warned of.

        agree: False while an error ends this process. With several processes nothing is waited for then: the others do
        not come here, and the error must be told at once.
        """
        if not agree and jax.process_count() > 1:
            return
        self._settle()
        try:
            self._checkpointer.close()
        except _STORAGE_ERRORS as error:  # what of a failed save it had still to tell
            if not self.failure:
                warnings.warn(f"{self.folder}: {_sentence(error)}", stacklevel=2)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(agree=kind is None)

    def _found(self) -> list[int]:
        return step_folders.list_steps(self.folder) if self.folder.exists() else []

    def _settle(self) -> None:
        """Wait for the save in progress, and agree with the other processes on how it ended."""
        save, self._save = self._save, None
        if save is None:
            return
        if save.ident is not None:
            save.join()
        problem = first_message(save.error)
        self.failure = None
        if problem is None:
            self._steps = step_folders.kept_steps([*self._steps, save.step], self._keep, self._keep_every)
            return
        if jax.process_index() == 0:
            step_folders.discard_unfinished(self.folder, save.step)
        newest = f"the newest is step {self._steps[-1]}" if self._steps else "there is none yet"
        self.failure = f"the checkpoint of step {save.step} could not be written in {self.folder} ({newest}): {problem}"
        warnings.warn(self.failure, stacklevel=3)

    @staticmethod
    def _try_to(act: Callable[[], None]) -> str | None:
        """Why it failed, if storage is the reason."""
        try:
            act()
        except _STORAGE_ERRORS as error:
            return _sentence(error)
        return None

    def finish(self, save: _Save) -> None:
        """In the background, once all processes have written: the manifest, then the old ones go."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        folder = self.folder / str(save.step)
        Manifest(
            step=save.step,
            arrays=save.arrays,
            files=describe_files(folder),
            code=code_version(),
            processes=jax.process_count(),
            mesh=save.mesh,
        ).write(folder)
        step_folders.mark_finished(self.folder, save.step)
        steps = [*self._steps, save.step]
        for old in sorted(set(steps) - set(step_folders.kept_steps(steps, self._keep, self._keep_every))):
            try:
                step_folders.remove(self.folder, old)
            except OSError as error:  # the new one is safe, which is what counts
                warnings.warn(f"the old checkpoint of step {old} cannot be removed: {error}", stacklevel=2)

    def _restore_verified(
        self, step: int, abstract: TrainState, shardings: Any, fresh: TrainState | None
    ) -> tuple[TrainState, dict[str, Any]]:
        folder = self.folder / str(step)
        manifest = self._verified_manifest(folder)
        differing = _differences(manifest, abstract)
        if fresh is None:
            _refuse(folder, differing)
        targets = {
            path_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
            )
        }
        fitting = {name: leaf for name, leaf in targets.items() if _fits(manifest, name, leaf)}
        arrays, meta = self._read(folder, manifest, fitting)
        if not differing:
            return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in targets]), meta
        warnings.warn(f"checkpoint {folder} is restored in part: {'; '.join(differing)}", stacklevel=4)
        return filled(fresh, arrays), meta

    def _verified_manifest(self, folder: Path) -> Manifest:
        """Every process reads the manifest and its share of the files. All processes raise the same, or none does."""
        manifest, problem = None, None
        try:
            manifest = Manifest.read(folder)
            problem = manifest.first_damage(folder, jax.process_index(), jax.process_count())
        except DamagedCheckpoint as error:
            problem = str(error)
        except PermissionError as error:  # nothing is damaged; but all processes must hear of it
            problem = f"{_DENIED} {error.filename}"
        problem = first_message(problem)
        if problem and problem.startswith(_DENIED):
            raise PermissionError(f"{problem}: make it readable, or give another workdir")
        if problem or manifest is None:
            raise DamagedCheckpoint(problem)
        return manifest

    def _read(
        self, folder: Path, manifest: Manifest, targets: dict[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays by name, meta); the arrays on their devices are compared with their digests.

        Read by orbax's handlers, without its checkpointer: that waits for the other processes, which is in vain where
        one cannot read. All processes raise the same, or none does.
        """
        arrays, meta, problem = {}, {}, None
        try:
            arrays = read_arrays(folder / "state", targets)
            meta = ocp.JsonCheckpointHandler().restore(epath.Path(folder / "meta"))
        except Exception as error:  # orbax wraps what does not decompress in a bare Exception
            problem = f"{folder} cannot be read: {_sentence(error)}"
        if problem := first_message(problem):
            raise DamagedCheckpoint(problem)
        digests = tree_digests(arrays)
        wrong = [name for name in arrays if digests[name] != manifest.arrays[name]["digest"]]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise DamagedCheckpoint(f"{folder}: the array {wrong[0]}{more} is not what was saved")
        return arrays, dict(meta)

    def _set_aside(self, damage: dict[int, str], restored: int) -> None:
        """Warn of the damaged checkpoints that were passed over, and rename them."""
        self._steps = [step for step in self._steps if step not in damage]
        for step, reason in damage.items():
            if jax.process_index() == 0:
                try:
                    reason += f"; kept as {step_folders.set_aside(self.folder, step).name}"
                except OSError as error:
                    reason += f"; it cannot be set aside ({error.strerror})"
            warnings.warn(f"{reason}. Falling back to step {restored}", stacklevel=4)


class _Save(threading.Thread):
    """A save in progress. `error`: why it failed; known once the thread has ended."""

    def __init__(self, owner: Checkpoints, step: int, arrays: dict[str, Any], mesh: dict[str, int]):
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self._owner, self.step, self.arrays, self.mesh = owner, step, arrays, mesh
        self.error: str | None = None

    def run(self) -> None:
        try:
            self._owner.finish(self)
        except Exception as error:
            self.error = _sentence(error)


def _fits(manifest: Manifest, name: str, leaf: jax.ShapeDtypeStruct) -> bool:
    stored = manifest.arrays.get(name)
    return stored is not None and tuple(stored["shape"]) == leaf.shape and stored["dtype"] == str(leaf.dtype)


def _differences(manifest: Manifest, abstract: TrainState) -> list[str]:
    """`name: checkpoint (130, 128), this config (130, 64)`; the type is told where only that differs."""
    wanted = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    found = []
    for name in sorted(manifest.arrays.keys() | wanted.keys()):
        stored, leaf = manifest.arrays.get(name), wanted.get(name)
        there = "has none" if stored is None else tuple(stored["shape"])
        here = "has none" if leaf is None else tuple(leaf.shape)
        if stored is not None and leaf is not None and there == here:
            there, here = stored["dtype"], str(leaf.dtype)
        if there != here:
            found.append(f"{name}: checkpoint {there}, this config {here}")
    return found


def _refuse(folder: Path, differing: list[str]) -> None:
    """Raises ValueError if anything differs."""
    if differing:
        shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise ValueError(
            f"checkpoint {folder} is of another config ({shown}): use the config it was made with, or another "
            "workdir, or train.partial_restore=True to take what fits"
        )


def _sentence(error: BaseException) -> str:
    """What an error says; of the storage library's long texts, the reason that the system gave."""
    text = " ".join(str(error).split()) or type(error).__name__
    reason = re.search(r"os_error_code=\W*(\d+)", text)
    if reason:
        return os.strerror(int(reason[1]))
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
