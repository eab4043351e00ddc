"""Foreign checkpoints into our parameter trees, by rule tables kept as data.

A rule is `(pattern, path, transform)`: a regex that must match a whole checkpoint key, our dotted path (with `\\1` for
groups), and what to do with the tensor: "same", or "dense" (torch `[out in]` -> our `[in out]`). A path of None drops
the tensor on purpose. Everything else must match, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from vdiff_jax.interop.pretrained import unflatten_like
from vdiff_jax.types import Params

Rule = tuple[str, str | None, str]
TRANSFORMS = {"same": lambda tensor: tensor, "dense": lambda tensor: tensor.T}


def convert_tensors(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], abstract: Params, source: str) -> Params:
    """The tree of `abstract` filled from a checkpoint's tensors.

    Raises ValueError listing every key that no rule matches, and every parameter that is missing or of another shape.
    """
    flat: dict[str, np.ndarray] = {}
    unmatched = []
    for key, tensor in tensors.items():
        for pattern, path, transform in rules:
            match = re.fullmatch(pattern, key)
            if match:
                if path is not None:
                    flat[match.expand(path)] = TRANSFORMS[transform](tensor)
                break
        else:
            unmatched.append(f"{key} {tensor.shape}")
    if unmatched:
        raise ValueError(f"{source} has keys that no rule knows: {'; '.join(sorted(unmatched))}")
    return unflatten_like(flat, abstract, source)
