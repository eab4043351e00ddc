"""Whether a training step fits on its devices, told before it takes their memory: by what its compiled program needs.

Data is looked at by `data.preflight`; `train.py` calls both, always, and `train.py --preflight` nothing else.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from vdiff_jax.parallel import bytes_per_device
from vdiff_jax.types import Array, Batch

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes on each device: the state, batch and frozen weights, what runs beside them, and what there is.

    available: None where the device does not tell.
    """

    state: int
    inputs: int
    temporaries: int
    available: int | None

    @property
    def needed(self) -> int:
        return self.state + self.inputs + self.temporaries

    def __str__(self) -> str:
        there = "" if self.available is None else f" of {self.available / _GB:.2f}"
        return (
            f"each device needs {self.needed / _GB:.2f} GB{there}: {self.state / _GB:.2f} for the state, "
            f"{self.inputs / _GB:.2f} for what it reads, {self.temporaries / _GB:.2f} while a step runs"
        )


def step_memory(step: Any, state: Any, batch: Batch, key: Array, available: int | None = None) -> MemoryReport:
    """What a jitted `step(state, batch, key)` needs on each device. It is compiled, and not compiled again when called.

    state, batch, key: arrays, or ShapeDtypeStructs with shardings. available: bytes; None = what the devices have.
    """
    analysis = step.lower(state, batch, key).compile().memory_analysis()
    donated = analysis.alias_size_in_bytes
    return MemoryReport(
        state=bytes_per_device(state),
        inputs=analysis.argument_size_in_bytes - bytes_per_device(state),
        temporaries=analysis.temp_size_in_bytes + analysis.output_size_in_bytes - donated,
        available=device_memory() if available is None else available,
    )


def check_memory(report: MemoryReport) -> None:
    """Raises ValueError, saying what takes most and which settings lower it, if a step does not fit."""
    if report.available is None or report.needed <= report.available:
        return
    if report.state > report.temporaries:
        remedy = "raise parallel.fsdp, which divides the state, or train a part (lora.rank, model.trainable)"
    else:
        remedy = (
            "set train.accumulation_steps=2 or more, lower data.batch_size, set model.unet.remat=full, or raise "
            "parallel.context, which divides every clip"
        )
    raise ValueError(f"the training step does not fit: {report}; {remedy}")


def device_memory() -> int | None:
    """Bytes a program may take on one device; on CPUs, an equal share of this process's memory for each device."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit")
    return host_memory() // jax.local_device_count()


def host_memory() -> int:
    """Bytes of this machine, or of the control group that the process is held in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return physical if text == "max" else min(physical, int(text))
