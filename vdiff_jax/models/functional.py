"""From a module to two pure functions: `init(key) -> params` and `apply(params, ...) -> output`.

Modules declare every parameter with `parameter(shape, std=..., fill=...)` and never draw random numbers
themselves. `init` draws ONE flat normal vector and cuts it up, because each distinct random shape costs up to
a second of compile time, and a network has dozens of them.

Parameters are a plain nested dict whose paths equal the attribute paths of the module (`blocks.0.conv.kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vdiff_jax.types import Array, Params


def parameter(shape: tuple[int, ...], *, std: float = 0.0, fill: float = 0.0) -> nnx.Param:
    """A fp32 parameter initialised as `fill + std * normal`; `std=0` makes a constant."""
    return nnx.Param(jnp.full(shape, fill, jnp.float32), std=std, fill=fill)


def functional(make: Callable[[], nnx.Module]) -> tuple[Callable[[Array], Params], Callable[..., Any]]:
    """(init, apply) of the module that `make()` builds; no memory is spent until `init` runs.

    init: PRNG key -> params. Pure, so `jax.jit(init, out_shardings=...)` makes parameters be born sharded.
    apply: (params, *args, method="__call__", **kwargs) -> the module's output; merges inside whatever jit calls it.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    variables, treedef = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    shapes = [tuple(variable.get_value().shape) for variable in variables]
    stds = [float(variable.get_metadata()["std"]) for variable in variables]
    fills = [float(variable.get_metadata()["fill"]) for variable in variables]
    total = sum(math.prod(shape) for shape, std in zip(shapes, stds) if std)

    def init(key: Array) -> Params:
        flat = jax.random.normal(key, (max(total, 1),), jnp.float32)
        leaves, offset = [], 0
        for shape, std, fill in zip(shapes, stds, fills):
            if std:
                size = math.prod(shape)
                leaves.append(fill + std * flat[offset : offset + size].reshape(shape))
                offset += size
            else:
                leaves.append(jnp.full(shape, fill, jnp.float32))
        return nnx.to_pure_dict(jax.tree.unflatten(treedef, leaves))

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

    return init, apply


def parameter_count(params: Params) -> int:
    """Number of scalars in a parameter tree (works on abstract trees too)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
