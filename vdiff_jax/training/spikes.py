"""Spikes: updates whose loss or gradient norm stands far above those of the steps before, told inside the jitted step.

What is remembered is part of the `TrainState`, so a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vdiff_jax.types import Array

WINDOW = 128
"""Steps that are remembered."""
_ENOUGH = WINDOW // 2  # values from which a deviation is worth something
_LEAST = 0.01  # of the mean: a smaller deviation counts as this, or a loss that hardly moves would spike all the time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What the last steps measured.

    loss, grad_norm: f32 [128], of the last finite steps, in no order. count: i32, how many were ever written. spiked:
    bool [128], which of the last steps were spikes. spikes: i32, all of them.
    """

    loss: Array
    grad_norm: Array
    count: Array
    spiked: Array
    spikes: Array

    @classmethod
    def empty(cls) -> History:
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros(WINDOW), jnp.zeros(WINDOW), zero, jnp.zeros(WINDOW, bool), jnp.zeros((), jnp.int32))


def judge(history: History, step: Array, loss: Array, grad_norm: Array, sigmas: float) -> tuple[Array, History]:
    """(is it a spike, the history with this step).

    sigmas: a loss or norm this many standard deviations above the mean of the window is a spike; 0 = never. None is
    seen before half a window is full. A value that is not finite is no spike, and is not remembered. A spike is
    remembered as if it had just reached the bound: one does not hide the next, and a level that has risen for good is
    accepted after some steps.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    loss, loss_bound = loss.astype(jnp.float32), _bound(history.loss, history.count, sigmas)
    norm, norm_bound = grad_norm.astype(jnp.float32), _bound(history.grad_norm, history.count, sigmas)
    spike = finite & ((loss > loss_bound) | (norm > norm_bound))
    slot = history.count % WINDOW

    def remember(values: Array, value: Array) -> Array:
        return jnp.where(finite, values.at[slot].set(value), values)

    return spike, History(
        loss=remember(history.loss, jnp.minimum(loss, loss_bound)),
        grad_norm=remember(history.grad_norm, jnp.minimum(norm, norm_bound)),
        count=history.count + finite,
        spiked=history.spiked.at[step % WINDOW].set(spike),
        spikes=history.spikes + spike,
    )


def _bound(values: Array, count: Array, sigmas: float) -> Array:
    """Infinite where nothing is to be found."""
    if not sigmas:
        return jnp.float32(jnp.inf)
    number = jnp.clip(count, 1, WINDOW).astype(jnp.float32)
    there = jnp.arange(WINDOW) < number
    mean = jnp.sum(jnp.where(there, values, 0.0)) / number
    deviation = jnp.sqrt(jnp.sum(jnp.where(there, jnp.square(values - mean), 0.0)) / number)
    bound = mean + sigmas * jnp.maximum(deviation, _LEAST * jnp.abs(mean))
    return jnp.where(count >= _ENOUGH, bound, jnp.inf)
