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

All have `logsnr(u)`, `u(logsnr)`, `logsnr_min` and `logsnr_max`, take and return arrays of any shape, and can be
used inside jit. They are hashable settings, not arrays.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from vdiff_jax.diffusion.process import EXTREME_LOGSNR
from vdiff_jax.types import Array


class Schedule(Protocol):
    """What training and sampling need to know of a schedule."""

    @property
    def logsnr_min(self) -> float: ...
    @property
    def logsnr_max(self) -> float: ...
    def logsnr(self, u: Array) -> Array: ...
    def u(self, logsnr: Array) -> Array: ...


def _check_range(logsnr_min: float, logsnr_max: float) -> None:
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min {logsnr_min} must be smaller than logsnr_max {logsnr_max}.")


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Cosine schedule cut to a range; `shift` moves levels, negative = more time at high noise (large grids)."""

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0
    shift: float = 0.0

    def __post_init__(self):
        _check_range(self.logsnr_min, self.logsnr_max)

    def _angles(self) -> tuple[float, float]:
        ends = np.array([self.logsnr_max, self.logsnr_min]) - self.shift
        clean, noise = np.arctan(np.exp(-ends / 2))
        return float(clean), float(noise)

    def logsnr(self, u: Array) -> Array:
        clean, noise = self._angles()
        level = -2 * jnp.log(jnp.tan(clean + u * (noise - clean))) + self.shift
        return jnp.clip(level, self.logsnr_min, self.logsnr_max)

    def u(self, logsnr: Array) -> Array:
        clean, noise = self._angles()
        return (jnp.arctan(jnp.exp((self.shift - logsnr) / 2)) - clean) / (noise - clean)


@dataclasses.dataclass(frozen=True)
class LinearLogSNR:
    """Level linear in u."""

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def __post_init__(self):
        _check_range(self.logsnr_min, self.logsnr_max)

    def logsnr(self, u: Array) -> Array:
        return self.logsnr_max + jnp.asarray(u) * (self.logsnr_min - self.logsnr_max)

    def u(self, logsnr: Array) -> Array:
        return (self.logsnr_max - jnp.asarray(logsnr)) / (self.logsnr_max - self.logsnr_min)


@dataclasses.dataclass(frozen=True)
class EDMRho:
    """Karras et al. 2022, eq. 5; sigmas are those of the EDM process for unit-variance data."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be positive and below sigma_max {self.sigma_max}.")

    @property
    def logsnr_min(self) -> float:
        return float(-2 * np.log(self.sigma_max))

    @property
    def logsnr_max(self) -> float:
        return float(-2 * np.log(self.sigma_min))

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def logsnr(self, u: Array) -> Array:
        low, high = self._ends()
        return -2 * self.rho * jnp.log(low + jnp.asarray(u) * (high - low))

    def u(self, logsnr: Array) -> Array:
        low, high = self._ends()
        return (jnp.exp(-jnp.asarray(logsnr) / (2 * self.rho)) - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Flow:
    """Flow time with the timestep shift `s` of SD3 and Wan (1 = none, larger = more time at high noise).

    Levels are cut to the range, which replaces the infinite ends t = 0 and t = 1.
    A shift of s adds -2 log(s) to every level.
    """

    shift: float = 1.0
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def __post_init__(self):
        _check_range(self.logsnr_min, self.logsnr_max)
        if self.shift <= 0:
            raise ValueError(f"flow shift {self.shift} must be positive.")

    def logsnr(self, u: Array) -> Array:
        u = jnp.asarray(u)
        return jnp.clip(2 * (jnp.log1p(-u) - jnp.log(u * self.shift)), self.logsnr_min, self.logsnr_max)

    def u(self, logsnr: Array) -> Array:
        time_odds = jnp.exp(-jnp.asarray(logsnr) / 2) / self.shift
        return time_odds / (1 + time_odds)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """Flow time with a normal logit: for training. The level is normal, mean `-2 mean`, deviation `2 std`."""

    mean: float = 0.0
    std: float = 1.0
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def __post_init__(self):
        _check_range(self.logsnr_min, self.logsnr_max)

    def logsnr(self, u: Array) -> Array:
        return jnp.clip(-2 * (self.mean + self.std * ndtri(jnp.asarray(u))), self.logsnr_min, self.logsnr_max)

    def u(self, logsnr: Array) -> Array:
        return ndtr((-jnp.asarray(logsnr) / 2 - self.mean) / self.std)


BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")


@dataclasses.dataclass(frozen=True)
class DiscreteTable:
    """Levels of integer timesteps 0 (clean) .. T-1 (noise), as checkpoints of the DDPM family were trained.

    table: `T` decreasing log-SNR values. The last may be -inf (zero terminal SNR): alpha is then exactly 0 there.
        Between it and its neighbour, levels are interpolated towards -40 (alpha = 2e-9).
    """

    table: tuple[float, ...]

    @classmethod
    def from_betas(
        cls,
        betas: str = "scaled_linear",
        num_train_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> DiscreteTable:
        """The table of a named sequence of betas, in float64.

        zero_terminal_snr: shift and stretch sqrt(alpha_bar) so that the last is 0 and the first stays
            (Lin et al. 2024, algorithm 1).
        Raises:
            ValueError: unknown name of betas.
        """
        if betas == "linear":
            values = np.linspace(beta_start, beta_end, num_train_steps, dtype=np.float64)
        elif betas == "scaled_linear":
            values = np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=np.float64) ** 2
        elif betas == "squaredcos_cap_v2":
            bar = np.cos((np.arange(num_train_steps + 1) / num_train_steps + 0.008) / 1.008 * np.pi / 2) ** 2
            values = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        else:
            raise ValueError(f"betas {betas!r} are unknown; use one of {', '.join(BETAS)}.")
        root = np.sqrt(np.cumprod(1 - values))
        if zero_terminal_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        with np.errstate(divide="ignore"):
            return cls(tuple((2 * np.log(root) - np.log1p(-(root**2))).tolist()))

    @property
    def num_train_steps(self) -> int:
        return len(self.table)

    @property
    def logsnr_min(self) -> float:
        return self.table[-1]

    @property
    def logsnr_max(self) -> float:
        return self.table[0]

    def _finite(self) -> Array:
        return jnp.maximum(jnp.asarray(self.table), -EXTREME_LOGSNR)

    def timestep_to_logsnr(self, timestep: Array | int) -> Array:
        """Exact at integer dtypes; real-valued timesteps are interpolated linearly in log-SNR."""
        step: Array = jnp.asarray(timestep)
        if jnp.issubdtype(step.dtype, jnp.integer):
            return jnp.asarray(self.table)[step]
        last = self.num_train_steps - 1
        level = jnp.interp(step, jnp.arange(last + 1, dtype=step.dtype), self._finite())
        return jnp.where(step >= last, self.table[-1], level)

    def logsnr_to_timestep(self, logsnr: Array) -> Array:
        """Real-valued timestep of a level; levels outside the table meet its first or last timestep."""
        finite = self._finite()
        level = jnp.maximum(jnp.asarray(logsnr), -EXTREME_LOGSNR)
        return jnp.interp(-level, -finite, jnp.arange(self.num_train_steps, dtype=finite.dtype))

    def logsnr(self, u: Array) -> Array:
        return self.timestep_to_logsnr(jnp.asarray(u, dtype=jnp.result_type(float)) * (self.num_train_steps - 1))

    def u(self, logsnr: Array) -> Array:
        return self.logsnr_to_timestep(logsnr) / (self.num_train_steps - 1)

    def timesteps(self, steps: int, spacing: str = "leading", steps_offset: int = 0) -> np.ndarray:
        """Integer timesteps `[steps]`, noise first, spaced as public checkpoints expect.

        Only "trailing" and "linspace" start at the last timestep, which zero terminal SNR needs.

        Raises:
            ValueError: unknown spacing, or steps outside 1..T.
        """
        count = self.num_train_steps
        if not 1 <= steps <= count:
            raise ValueError(f"steps {steps} must lie in 1..{count}, the number of training timesteps.")
        if spacing == "leading":
            steps_down = np.arange(steps)[::-1] * (count // steps) + steps_offset
        elif spacing == "trailing":
            steps_down = np.round(np.arange(count, 0, -count / steps)).astype(np.int64)[:steps] - 1
        elif spacing == "linspace":
            steps_down = np.round(np.linspace(0, count - 1, steps))[::-1]
        else:
            raise ValueError(f"timestep spacing {spacing!r} is unknown; use one of {', '.join(SPACINGS)}.")
        return np.clip(steps_down, 0, count - 1).astype(np.int32)

    def grid(self, steps: int, spacing: str = "leading", steps_offset: int = 0, final: str = "clean") -> np.ndarray:
        """Levels `[steps + 1]` of `timesteps`, then the last: +inf ("clean") or that of timestep 0 ("first")."""
        if final not in ("clean", "first"):
            raise ValueError(f"final level {final!r} is unknown; use 'clean' or 'first'.")
        levels = np.asarray(self.table)[self.timesteps(steps, spacing, steps_offset)]
        return np.append(levels, np.inf if final == "clean" else self.table[0])


def grid(schedule: Schedule, steps: int, start: float | Array = 1.0) -> Array:
    """Levels `[steps + 1]` from noise to clean, equally spaced in u from `start` (1 = pure noise) to 0."""
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1.")
    return schedule.logsnr(start * jnp.linspace(1.0, 0.0, steps + 1))


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
}


def make_schedule(name: str, **settings: Any) -> Schedule:
    """A schedule by name: "cosine", "linear_logsnr", "edm", "flow", "logit_normal" or "discrete".

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
