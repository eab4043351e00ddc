"""Schedules: maps from a coordinate u in [0, 1] (1 = noise) to log-SNR, and back.

A schedule is only a way to place levels: training draws u uniformly, sampling walks u from 1 to 0. It says nothing
about the scale of `z`, which is the process's business. All share one range of levels, default [-10, 10]: at -10
sigma / alpha is 148, so less than one per cent of the signal leaks into the first step and no correction is needed.

    Cosine         logsnr = -2 log tan(pi u / 2) + shift           (Nichol & Dhariwal 2021; Hoogeboom et al. 2023)
    LinearLogSNR   logsnr linear in u                              (Kingma et al. 2021)
    EDMRho         sigma^(1/rho) linear in u, logsnr = -2 log sigma (Karras et al. 2022)
    Flow           flow time t = s u / (1 + (s - 1) u), logsnr = 2 log((1 - t) / t)      (Esser et al. 2024)
    LogitNormal    logit(t) normal: more training at middle levels                       (Esser et al. 2024)
    DiscreteTable  the table of a checkpoint trained on integer timesteps
    FlowTable      flow time of a checkpoint trained on integer timesteps

All have `logsnr(u)`, `u(logsnr)`, `logsnr_min` and `logsnr_max`, take and return arrays of any shape, and can be
used inside jit. They are hashable settings, not arrays. `levels` places a walk: evenly in u, or as a public
checkpoint expects it. Where networks are told a timestep instead of a level, `logsnr_to_timestep` says which.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from vdiff_jax.diffusion.continuous import Cosine, EDMRho, Flow, LinearLogSNR, LogitNormal, Schedule
from vdiff_jax.diffusion.discrete import DiscreteTable, FlowTable
from vdiff_jax.types import Array

__all__ = [
    "SCHEDULES",
    "Cosine",
    "DiscreteTable",
    "EDMRho",
    "Flow",
    "FlowTable",
    "LinearLogSNR",
    "LogitNormal",
    "Schedule",
    "grid",
    "make_schedule",
    "shift_for_length",
    "shift_for_resolution",
]


def grid(schedule: Schedule, steps: int, start: float | Array = 1.0) -> Array:
    """Levels `[steps + 1]` from noise to clean, placed by the schedule, from `start` (1 = pure noise, may be traced).

    Equally spaced in u, but for the schedules of public checkpoints, which have a way of their own.

    Raises:
        ValueError: no steps, or more than a table has timesteps.
    """
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1.")
    return schedule.levels(steps, start)


def shift_for_resolution(height: int, base: int = 16) -> float:
    """What to add to levels when the latent grid is `height` instead of `base` tokens high.

    `2 log(base / height)`: averaging over the (height / base)^2 more tokens that show the same content takes away
    noise, so larger grids need lower levels for the same task (Hoogeboom et al. 2023, Esser et al. 2024).
    """
    return float(2 * np.log(base / height))


def shift_for_length(num_frames: int, base: int = 16) -> float:
    """The same for longer clips: `log(base / num_frames)`, right when frames repeat their content."""
    return float(np.log(base / num_frames))


SCHEDULES: dict[str, Any] = {
    "cosine": Cosine,
    "linear_logsnr": LinearLogSNR,
    "edm": EDMRho,
    "flow": Flow,
    "logit_normal": LogitNormal,
    "discrete": DiscreteTable.from_betas,
    "flow_table": FlowTable,
}


def make_schedule(name: str, **settings: Any) -> Schedule:
    """A schedule by name: "cosine", "linear_logsnr", "edm", "flow", "logit_normal", "discrete" or
    "flow_table".

    Raises:
        ValueError: unknown name or setting.
    """
    if name not in SCHEDULES:
        close = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(SCHEDULES)}."
        raise ValueError(f"schedule {name!r} is unknown; {hint}")
    try:
        return SCHEDULES[name](**settings)
    except TypeError as error:
        raise ValueError(f"schedule {name!r} does not take these settings: {error}.") from None
