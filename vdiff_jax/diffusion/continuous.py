"""Continuous schedules, and what all schedules have in common.

The names are explained in `diffusion.schedule`, from where they are imported.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

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

    @property
    def finish(self) -> bool:
        """Whether a walk ends in its last clean estimate; False: in the latents at its last level."""
        return True

    def start_std(self, steps: int) -> float:
        """Standard deviation of the noise a walk of `steps` steps begins in, VP scale."""
        return 1.0

    def levels(self, steps: int, start: float | Array = 1.0) -> Array:
        """Levels `[steps + 1]` of a walk from `start` (1 = pure noise, may be traced): equally spaced in u."""
        return self.logsnr(start * jnp.linspace(1.0, 0.0, steps + 1))


def walk(placed: np.ndarray, start: float | Array, last: float = np.inf, cleanest: float | None = None) -> Array:
    """Levels `[s + 1]` through the `s` levels at which a network is called when a whole walk is `placed`, then `last`.

    A later start, at share `start` of the walk, calls the network as often, at levels between the placed ones: from
    place `s (1 - start)` on, evenly, in steps of `start` places. What lies after the last place is `cleanest`, by
    default the last placed level. (Public pipelines call it `int(s start)` times, at the last of the placed levels;
    where `s start` is whole, both begin at the same one.)
    """
    steps = len(placed)
    if isinstance(start, (int, float)) and start == 1:
        return jnp.asarray(np.append(placed, last), jnp.float32)
    end = placed[-1] if cleanest is None else cleanest
    known = np.clip(np.append(placed, end), -EXTREME_LOGSNR, EXTREME_LOGSNR).astype(np.float32)
    place = steps * (1 - start) + start * jnp.arange(steps, dtype=jnp.float32)
    level = jnp.interp(place, jnp.arange(steps + 1, dtype=jnp.float32), known)
    level = jnp.where(place <= 0, float(placed[0]), level)
    return jnp.append(level, jnp.float32(last))


def karras_levels(noise: float, clean: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Levels `[steps]` from `noise` to `clean` whose sigma^(1/rho) is evenly spaced (Karras et al. 2022, eq. 5)."""
    low, high = np.exp(-np.array([clean, noise]) / (2 * rho))
    return -2 * rho * np.log(np.linspace(high, low, steps))


def _check_range(logsnr_min: float, logsnr_max: float) -> None:
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min {logsnr_min} must be smaller than logsnr_max {logsnr_max}.")


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
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
class LinearLogSNR(Schedule):
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
class EDMRho(Schedule):
    """Karras et al. 2022, eq. 5; sigmas are those of the EDM process for unit-variance data.

    final: "sigma_min" walks from sigma_max to sigma_min; "clean" does so one step earlier and ends at sigma = 0, as
        public checkpoints with timesteps `ln(sigma) / 4` are sampled (Stable Video Diffusion: 0.002, 700, 7).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    final: str = "sigma_min"

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be positive and below sigma_max {self.sigma_max}.")
        if self.final not in ("sigma_min", "clean"):
            raise ValueError(f"final level {self.final!r} is unknown; use 'sigma_min' or 'clean'.")

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

    def logsnr_to_timestep(self, logsnr: Array) -> Array:
        """`ln(sigma) / 4`, what networks trained on continuous sigmas are told; cut at +-10."""
        return -jnp.clip(jnp.asarray(logsnr), -2 * EXTREME_LOGSNR, 2 * EXTREME_LOGSNR) / 8

    def levels(self, steps: int, start: float | Array = 1.0) -> Array:
        if self.final == "sigma_min":
            return super().levels(steps, start)
        return walk(karras_levels(-2 * np.log(self.sigma_max), -2 * np.log(self.sigma_min), steps, self.rho), start)


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
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
class LogitNormal(Schedule):
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
