"""Training some of a model's parameters while the others stay, chosen by patterns on their paths.

trainable  the chosen leaves, in the tree they come from
base       the other leaves, given to the loss beside them: no gradient, no optimizer state, not in checkpoints
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax

from vdiff_jax.parallel import path_name
from vdiff_jax.training.step import LossFn
from vdiff_jax.trees import joined, split
from vdiff_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class TrainedPart:
    """Some parameters in training. start, base: the chosen leaves and the others, by component."""

    start: Params
    base: Params

    def complete(self, trainable: Params, base: Params) -> Params:
        """All parameters of the networks that are trained in part."""
        return joined(base, trainable)

    def loss(self, loss_fn: LossFn) -> LossFn:
        """A loss of all parameters as a loss of the chosen ones, with the others as its fourth argument."""

        def loss(trainable: Params, batch: Batch, keys: Array, base: Params) -> tuple[Array, dict[str, Array]]:
            return loss_fn(self.complete(trainable, base), batch, keys)

        return loss


def trained_part(params: Params, patterns: Sequence[str]) -> TrainedPart | None:
    """The leaves in whose dotted path (`unet.mid.temporal.proj_in.kernel`) one of the patterns is found; None for all.

    params: by component. Raises ValueError for a pattern that is no regular expression or is found in no path.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise ValueError(f"model.trainable: {pattern!r} is not a regular expression ({error})") from error
        if not found:
            raise ValueError(f"model.trainable: {pattern!r} is found in no parameter; they are named like {paths[:3]}")
        chosen |= found
    if not patterns or len(chosen) == len(paths):
        return None
    return TrainedPart(*split(params, lambda path: path in chosen))
