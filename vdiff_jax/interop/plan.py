"""What converting a public model does, told before it is done: every tensor's name on both sides, and the memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vdiff_jax.interop import hub
from vdiff_jax.interop.pipelines import download, is_pipeline, load_pipeline
from vdiff_jax.interop.weights import Binding


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mapping of every part of a pipeline: `(part, binding)` of each tensor."""

    source: str
    tensors: list[tuple[str, Binding]]

    def bytes(self, itemsize: int = 4) -> int:
        """What the parameters take in memory with `itemsize` bytes a number."""
        return itemsize * sum(math.prod(binding.our_shape) for _, binding in self.tensors)


def is_public(source: str | Path) -> bool:
    """Whether `source` is a pipeline folder of diffusers."""
    return is_pipeline(source)


def read(source: str | Path, **options: Any) -> Plan:
    """The plan of a pipeline folder, or of one on the hub, which is fetched. options: those of `load_pipeline`.

    Reads names and shapes only. Raises as `load_pipeline` does, for what does not fit, and FileNotFoundError for a
    folder that is no pipeline.
    """
    folder = Path(source)
    if is_pipeline(folder / "model"):
        folder = folder / "model"
    if not is_pipeline(folder) and hub.is_hub_name(source):
        folder = download(str(source), variant=options.get("variant"))
    if not is_pipeline(folder):
        raise FileNotFoundError(f"{folder} is no pipeline of diffusers: it has no model_index.json")
    mapping: dict[str, list[Binding]] = {}
    load_pipeline(folder, plan=mapping, **options)
    return Plan(str(source), [(part, binding) for part, bindings in mapping.items() for binding in bindings])


def show(plan: Plan, file: TextIO) -> None:
    """A line per tensor, then the sizes."""
    width = max(len(binding.theirs) for _, binding in plan.tensors)
    for part, binding in plan.tensors:
        theirs = f"{binding.theirs:{width}} {_shape(binding.their_shape):>18}"
        print(f"{part:13} {theirs} -> {binding.ours} {_shape(binding.our_shape)}", file=file)
    for part in dict.fromkeys(part for part, _ in plan.tensors):
        count = sum(math.prod(binding.our_shape) for name, binding in plan.tensors if name == part)
        print(f"{part}: {count / 1e6:.1f} million parameters", file=file)
    largest = max(math.prod(binding.our_shape) for _, binding in plan.tensors)
    print(
        f"memory: {plan.bytes() / 2**30:.2f} GiB in float32, {plan.bytes(2) / 2**30:.2f} GiB in bfloat16 or float16, "
        f"over all devices; while reading {4 * largest / 2**30:.2f} GiB more on the host, the largest tensor",
        file=file,
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "number"


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its name once all is written; a failure leaves nothing."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rmdir()  # empty: anything else was refused
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
