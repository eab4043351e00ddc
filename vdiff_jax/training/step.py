"""The training step: `train_step(state, batch, key) -> (state, metrics)`, pure, donated, one `jit`.

Randomness is owned by the step: it folds `state.step` into a constant key, so nothing random is carried or saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.training.spikes import History, judge
from vdiff_jax.types import Array, Batch, Params

LossFn = Callable[..., tuple[Array, dict[str, Array]]]
"""(params, batch, keys [b]) -> (scalar loss, metrics); one key per sample, metrics are scalars or small vectors. Where
a step is made with `frozen` parameters, they come as a fourth argument."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on: all leaves are arrays.

    step: i32, updates tried so far. skipped: i32, updates refused for non-finite gradients; skipped_in_row: of which
    without a finite one in between. ema: exponential moving average of params, fp32. history: see `spikes.History`.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params
    skipped: Array
    skipped_in_row: Array
    history: History


def create_state(init: Callable[[Array], Params], optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """A fresh state; pure, so `jax.jit(create_state, out_shardings=...)` makes it be born sharded."""
    return _first_state(init(key), optimizer)


def _first_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, optimizer.init(params), ema, zero, zero, History.empty())


def abstract_state(
    init: Callable[[Array], Params], optimizer: optax.GradientTransformation, mesh: Mesh, rules: tuple = ()
) -> TrainState:
    """The shapes of a state, each with its sharding; no memory is spent."""
    shapes = jax.eval_shape(lambda key: create_state(init, optimizer, key), jax.random.key(0))
    shardings = parallel.tree_shardings(shapes, mesh, rules)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def init_sharded_state(
    init: Callable[[Array], Params],
    optimizer: optax.GradientTransformation,
    key: Array,
    mesh: Mesh,
    rules: tuple = (),
    start: Params | None = None,
) -> tuple[TrainState, Any]:
    """(state, shardings): shapes first, then memory; no unsharded copy ever exists.

    start: parameters to begin with in the place of `init(key)`. They are sent to their devices as they are, and become
    part of the state: the first step takes their memory.
    """

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, optimizer, mesh, rules))
    if start is None:
        return jax.jit(lambda key: create_state(init, optimizer, key), out_shardings=shardings)(key), shardings
    # As an argument, because what a jitted function closes over would be written into its program.
    params = jax.device_put(start, shardings.params)
    rest = jax.jit(lambda params: _first_state(params, optimizer), out_shardings=shardings)(params)
    return dataclasses.replace(rest, params=params), shardings


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: Any,
    *,
    ema_decay: float = 0.999,
    accumulation_steps: int = 1,
    spike_sigmas: float = 0.0,
    frozen: Params | None = None,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]:
    """The jitted step. A non-finite loss or gradient leaves params, optimizer and EMA bitwise untouched and is counted.

    spike_sigmas: so is one whose finite loss or gradient norm stands that many standard deviations above the mean of
    the last 128 steps, and it is counted as a spike; 0 = off.
    accumulation_steps: the batch is cut in that many parts whose gradients are averaged, at the memory of one part.
    ema: decay is min(ema_decay, (1 + step) / (10 + step)).
    frozen: parameters the loss reads but nothing changes: no gradient, no optimizer state, not in the checkpoints.
    """

    def train_step(state: TrainState, batch: Batch, key: Array, *frozen: Params) -> tuple[TrainState, dict[str, Array]]:
        def gradients(params: Params, batch: Batch, keys: Array):
            whole, *fixed = parallel.gather((params, *frozen), mesh)
            return jax.value_and_grad(loss_fn, has_aux=True)(whole, batch, keys, *fixed)

        batch_size = jax.tree.leaves(batch)[0].shape[0]
        keys = sample_keys(jax.random.fold_in(key, state.step), batch_size)
        (loss, metrics), grads = _accumulate(gradients, state.params, batch, keys, accumulation_steps)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike, history = judge(state.history, state.step, loss, grad_norm, spike_sigmas)
        good = finite & ~spike

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        bad = (~finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            skipped=state.skipped + bad,
            skipped_in_row=(state.skipped_in_row + 1) * bad,
            history=history,
        )
        metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped": new_state.skipped, "spikes": history.spikes}
        recent = jnp.sum(history.spiked)
        return new_state, {**metrics, "skipped_in_row": new_state.skipped_in_row, "recent_spikes": recent}

    step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh)))
    # As an argument, because what a jitted function closes over would be written into its program.
    return step if frozen is None else _WithFrozen(step, frozen)


@dataclasses.dataclass(frozen=True)
class _WithFrozen:
    """A jitted step with its last argument given."""

    step: Any
    frozen: Params

    def __call__(self, state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        return self.step(state, batch, key, self.frozen)

    def lower(self, state: TrainState, batch: Batch, key: Array) -> Any:
        return self.step.lower(state, batch, key, self.frozen)


def sample_keys(key: Array, batch_size: int) -> Array:
    """One key per sample, a function of its index alone: independent of neighbours and of the number of devices."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch_size))


def _accumulate(gradients: Callable, params: Params, batch: Batch, keys: Array, parts: int):
    """Mean over `parts` equal cuts of the batch of ((loss, metrics), grads)."""
    if parts == 1:
        return gradients(params, batch, keys)
    if keys.shape[0] % parts:
        raise ValueError(f"data.batch_size={keys.shape[0]} is not a multiple of train.accumulation_steps={parts}")
    # [b] -> [b/parts parts] keeps each device's rows on it; the scanned axis comes second.
    cut = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), (batch, keys))

    def body(total, part):
        return jax.tree.map(jnp.add, total, gradients(params, *part)), None

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradients, params, *_first(cut)))
    total, _ = jax.lax.scan(body, zeros, cut)
    return jax.tree.map(lambda a: a / parts, total)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda a: a[0], tree)
