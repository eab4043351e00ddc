"""The work folder of a run: a folder here, seen by all processes, and used by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from vdiff_jax.training.agreement import first_message, from_first

LOCK_NAME = ".lock"
_PATIENCE_S = 10.0  # network file systems show a new file late
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def local_folder(workdir: str) -> Path:
    """The folder that `--workdir` names. Raises ValueError for an address, NotADirectoryError for a file."""
    if "://" in workdir:
        raise ValueError(f"--workdir={workdir} is an address: give a folder of this machine, or one mounted on it")
    path = Path(workdir)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--workdir={path} is a file: give a folder")
    return path


def make_shared(workdir: Path) -> None:
    """Make the folder, and see that all processes have the same one: the first leaves a file that the others look for.

    Called by all processes. Raises OSError, on all of them, where it cannot be written or one does not see it.
    """
    path, problem = workdir, None
    if jax.process_index() == 0:
        path = workdir / f".shared-{secrets.token_hex(8)}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_count() > 1:
                path.touch()
        except OSError as error:
            problem = f"--workdir={workdir} cannot be written ({error.strerror}): make it writable, or give another"
    if jax.process_count() > 1:
        path = workdir / from_first(path.name)
        if (problem := first_message(problem)) is None:
            problem = first_message(None if _appears(path) else _not_shared(workdir))
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)
    if problem:
        raise OSError(problem)


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """No other run trains in this folder meanwhile; the system lifts the lock of a process that is killed.

    Called by all processes. Raises OSError, on all of them, where another run is at work.
    """
    problem, file = None, None
    if jax.process_index() == 0:
        try:
            file = (workdir / LOCK_NAME).open("w")
            # Of this kind, as the other would be kept by a loader's process that outlives this one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if file is not None and error.errno in (errno.EACCES, errno.EAGAIN):
                problem = f"another run is training in {workdir}: wait for its end, or give another --workdir"
            elif error.errno not in _NO_LOCKS:
                problem = f"{workdir / LOCK_NAME} cannot be written ({error.strerror}): make it writable"
    try:
        if problem := first_message(problem):
            raise OSError(problem)
        yield
    finally:
        if file is not None:
            file.close()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _not_shared(workdir: Path) -> str:
    return (
        f"--workdir={workdir} of process {jax.process_index()} is not that of process 0: give a folder that all "
        "processes see"
    )
