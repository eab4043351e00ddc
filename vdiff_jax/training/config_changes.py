"""What changed in a recipe between the run that wrote a checkpoint and the one that goes on from it."""

from __future__ import annotations

import json
import re
from typing import Any

# Settings that change no parameter, no gradient and no clip.
_SILENT = re.compile(
    r"train\.(log|checkpoint|sample|model|keep_every)_steps|train\.(max_minutes|max_skipped_in_row|keep_checkpoints"
    r"|partial_restore|heartbeat_s)|data\.num_workers|sample(\..*)?"
)
# Settings that one changes to go on: longer, or on other devices (equal up to rounding).
_EXPECTED = re.compile(r"train\.num_steps|parallel\..*")
_ABSENT = "absent"


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every setting that differs; "absent" where one of them lacks it.

    old, new: recipes as nested dictionaries; tuples and lists are the same.
    """
    before, after = _flat(json.loads(json.dumps(old))), _flat(json.loads(json.dumps(new)))
    pairs = {name: (before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in sorted({*before, *after})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[str | None, str | None]:
    """(warning, notice): changes after which the run is not the one it would have been, and those made to go on.

    Each a list as `optimizer.learning_rate 0.0003 -> 0.001`, or None. Intervals, logs and previews are in neither.
    Settings that only one side knows count as notice: they came or went with the version of the code.
    """
    serious, mild = [], []
    for name, (before, after) in changed_settings(old, new).items():
        if _SILENT.fullmatch(name):
            continue
        known = _ABSENT not in (before, after)
        (serious if known and not _EXPECTED.fullmatch(name) else mild).append(f"{name} {before} -> {after}")
    return ", ".join(serious) or None, ", ".join(mild) or None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found
