"""Several processes as one run: how they find each other, and what one does when another is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PEER_LOST = 76
"""Exit code: another process of the run ended or cannot be reached."""
_START_TIMEOUT_S = 300
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE: |CoordinationService|coordination service")
_kept: list = []  # a handler must outlive the call that sets it


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_s: float = 100.0,
    timeout_s: int = _START_TIMEOUT_S,
) -> None:
    """`jax.distributed.initialize()`; call it before any other use of JAX.

    Without a coordinator everything comes from the environment: a TPU pod, SLURM, Kubernetes (GKE), Open MPI.
    coordinator: `host:port` of process 0, then with the other two. heartbeat_s: after so long without a sign of life a
    process counts as dead, and the others end. timeout_s: how long to wait for the others.

    Raises ValueError for settings that do not fit, RuntimeError where the others cannot be found; where JAX aborts
    instead, a sentence is printed and the exit code is `PEER_LOST`.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: give {', '.join(given)}, or none of them with --distributed"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}")
    if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
        raise ValueError(f"--coordinator={coordinator}: give host:port, as 10.0.0.1:1234")
    where = f"through {coordinator}" if coordinator else "found by --distributed"
    late = (
        f"the processes {where} did not all start within {timeout_s} s: start every one, with the same --coordinator "
        "and --num_processes"
    )
    _end_on_abort(lambda: f"error: {late}")
    options: dict = {"cluster_detection_method": "deactivate"} if coordinator else {}
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=max(round(heartbeat_s), 1),
            **options,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed finds no TPU pod, SLURM, Kubernetes or Open MPI here "
            f"({error}): give --coordinator=HOST:PORT --num_processes=N --process_id=I to each process"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"{late} ({reason})") from error
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


@contextlib.contextmanager
def one_ends_all(where: Callable[[], str]) -> Iterator[None]:
    """With several processes, an error in one ends it at once, so that the others hear of it at once.

    JAX would wait for them at the exit, and they for it in the next step. where: what to add to a message about a lost
    process, as `after step 12`. With one process errors pass.
    """
    if jax.process_count() == 1:
        yield
        return
    _end_on_abort(lambda: _lost(where(), "JAX has aborted this one, see the lines above"))
    try:
        yield
    except KeyboardInterrupt:
        _leave(f"error: process {jax.process_index()} of {jax.process_count()}: interrupted", 130)
    except Exception as error:
        text = " ".join(str(error).split())
        if _LOST.search(text):
            _leave(_lost(where(), text[:300]), PEER_LOST)
        if not isinstance(error, (ValueError, OSError, RuntimeError)) or os.environ.get("VDIFF_TRACEBACK"):
            traceback.print_exc()
        _leave(f"error: process {jax.process_index()} of {jax.process_count()}: {text}", 1)


def wait_for_all() -> None:
    """Until every process is here: at its exit JAX waits for the others, but not for as long as a model may take."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("done")


def _lost(where: str, reason: str) -> str:
    return (
        f"error: process {jax.process_index()} of {jax.process_count()}: another process of this run ended or cannot "
        f"be reached, {where} ({reason}). Look at its log, then start all again to go on from the newest checkpoint"
    )


def _leave(sentence: str, code: int) -> None:
    """Without waiting for anything; one write, so that lines of several processes do not mix."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\n{sentence}\n".encode())
    os._exit(code)


def _end_on_abort(sentence: Callable[[], str]) -> None:
    """A sentence and `PEER_LOST` where JAX aborts the process because the coordinator is gone or a peer is silent.

    It aborts in C++, often from a thread of its own, where no exception is raised and no handler of Python's is run:
    Python only runs those in the main thread, later, and there is no later.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def ended(_number: int) -> None:
        _leave(sentence(), PEER_LOST)

    _kept.append(ended)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), ended)
