"""Parameter trees taken apart by the names of their leaves, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vdiff_jax.types import Params


def split(params: Params, chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """The leaves whose dotted path is chosen, and the others; branches that are left without leaves are left out.

    params: a tree of arrays or of their shapes.
    """
    return _part(params, chosen, True, ""), _part(params, chosen, False, "")


def joined(first: Params, second: Params) -> Params:
    """One tree of two that share branches and no leaves: `joined(*split(params, ...))` holds what `params` holds."""
    result: dict[Any, Any] = dict(first)
    for name, branch in second.items():
        result[name] = joined(result[name], branch) if isinstance(result.get(name), dict) else branch
    return result


def _part(tree: Params, chosen: Callable[[str], bool], wanted: bool, prefix: str) -> Params:
    result: Params = {}
    for name, branch in tree.items():
        path = f"{prefix}{name}"
        if isinstance(branch, dict):
            if part := _part(branch, chosen, wanted, f"{path}."):
                result[name] = part
        elif chosen(path) == wanted:
            result[name] = branch
    return result
