"""AdamW with gradient clipping and a warm-up + cosine learning rate (Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses

import jax
import optax

from vdiff_jax.types import Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: the peak; final_fraction: the floor of the cosine as a fraction of it; clip_norm: global norm."""

    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_fraction: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate: linear from 0 over `warmup_steps`, then cosine to the floor at `num_steps`."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(num_steps, warmup + 1), config.learning_rate * config.final_fraction
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip, AdamW, schedule. Weight decay acts on matrices and kernels only, not on biases, norms or embeddings."""

    def decayed(params: Params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim >= 2 and "embedding" not in jax.tree_util.keystr(path[-1:]), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
