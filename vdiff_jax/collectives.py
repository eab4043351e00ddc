"""What a compiled program sends between devices, read from its HLO text: no accelerator is needed to count it.

    for c in collectives(jax.jit(step).lower(*args).compile().as_text()): print(c.kind, c.shapes, c.bytes)

Bytes are those of the results on one device, once per appearance: what stands in a loop is counted once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_LINE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: one of `KINDS`. shapes: dtype and shape of each result on one device."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        return sum(_ITEM_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled module's text, in order."""
    found = []
    for line in hlo.splitlines():
        if match := _LINE.search(line):
            arrays = [
                (dtype, tuple(int(size) for size in sizes.split(",") if size))
                for dtype, sizes in _ARRAY.findall(match[1])
            ]
            # What an asynchronous start returns are its operands, then its results.
            if match[3] and match[2] != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]
            found.append(Collective(match[2], tuple(arrays)))
    return found


def histogram(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes)}, in order of kind."""
    count, size = Counter(), Counter()
    for collective in found:
        count[collective.kind] += 1
        size[collective.kind] += collective.bytes
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}
