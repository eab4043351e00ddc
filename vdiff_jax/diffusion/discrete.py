"""Schedules of checkpoints that are told integer timesteps, with the placing of timesteps their samplers expect.

Public samplers agree on the table of a checkpoint and differ in where they walk. `placing` names whose rules hold:

    ddim       integer timesteps                                              (DDIM, DDPM, PNDM)
    euler      "linspace" is not rounded, sigma is linear between timesteps, and the start noise has the deviation of
               the first level instead of 1 (but for "leading")               (Euler, Euler ancestral)
    multistep  one more timestep is placed and the cleanest left out          (DPM-Solver++, UniPC)

`sigmas` may replace the timesteps' own levels: "karras" (Karras et al. 2022), "exponential" (even in log-SNR) or "beta"
(quantiles of a Beta(0.6, 0.6) law, Lee et al. 2024). The network is then told the timestep at which its table has
that level: real-valued for "euler", the nearest integer ("karras") or the one below for "multistep".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from vdiff_jax.diffusion.continuous import Schedule, karras_levels, walk
from vdiff_jax.diffusion.process import EXTREME_LOGSNR
from vdiff_jax.types import Array

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
PLACINGS = ("ddim", "euler", "multistep")
SIGMAS = ("table", "karras", "exponential", "beta")
FINALS = ("clean", "first")

SMALLEST_ALPHA_BAR = 2.0**-24
"""What "euler" and "multistep" samplers have in place of 0 at zero terminal SNR: sigma is 4096 there."""


def _check_choice(idea: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{idea} {value!r} is unknown; use one of {', '.join(choices)}.")


@dataclasses.dataclass(frozen=True)
class DiscreteTable(Schedule):
    """Levels of integer timesteps 0 (clean) .. T-1 (noise), as checkpoints of the DDPM family were trained.

    table: `T` decreasing log-SNR values. The last may be -inf (zero terminal SNR): alpha is then exactly 0 there.
        Between it and its neighbour, levels are interpolated towards -40 (alpha = 2e-9).
    spacing: "leading", "trailing" or "linspace" (Lin et al. 2024, table 2). steps_offset: added to "leading".
    final: a walk ends at sigma = 0 ("clean") or at timestep 0 ("first"), in the latents there.
    placing, sigmas: see above. sigma_min, sigma_max: ends of `sigmas` other than "table", None = those of the walk
        ("euler") or of the table ("multistep").
    """

    table: tuple[float, ...]
    spacing: str = "leading"
    steps_offset: int = 0
    final: str = "clean"
    placing: str = "ddim"
    sigmas: str = "table"
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self):
        _check_choice("timestep spacing", self.spacing, SPACINGS)
        _check_choice("final level", self.final, FINALS)
        _check_choice("placing of timesteps", self.placing, PLACINGS)
        _check_choice("sequence of sigmas", self.sigmas, SIGMAS)
        if self.placing == "ddim" and self.sigmas != "table":
            raise ValueError(f"sigmas {self.sigmas!r} need placing 'euler' or 'multistep', not 'ddim'.")

    @classmethod
    def from_betas(
        cls,
        betas: str | Sequence[float] = "scaled_linear",
        num_train_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
        spacing: str = "leading",
        steps_offset: int = 0,
        final: str = "clean",
        placing: str = "ddim",
        sigmas: str = "table",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> DiscreteTable:
        """The table of a named or given sequence of betas, in float64; the other fields as in the class.

        zero_terminal_snr: shift and stretch sqrt(alpha_bar) so that the last is 0 and the first stays
            (Lin et al. 2024, algorithm 1).
        Raises:
            ValueError: unknown name of betas, or a given sequence of another length than `num_train_steps`.
        """
        if not isinstance(betas, str):
            values = np.asarray(betas, np.float64)
            if len(values) != num_train_steps:
                raise ValueError(f"{len(values)} betas are given for num_train_steps {num_train_steps}.")
        elif betas == "linear":
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
            if placing != "ddim":
                root[-1] = SMALLEST_ALPHA_BAR**0.5
        with np.errstate(divide="ignore"):
            table = tuple((2 * np.log(root) - np.log1p(-(root**2))).tolist())
        return cls(table, spacing, steps_offset, final, placing, sigmas, sigma_min, sigma_max)

    @property
    def num_train_steps(self) -> int:
        return len(self.table)

    @property
    def logsnr_min(self) -> float:
        return self.table[-1]

    @property
    def logsnr_max(self) -> float:
        return self.table[0]

    @property
    def finish(self) -> bool:
        return self.final == "clean"

    def _finite(self) -> Array:
        return jnp.maximum(jnp.asarray(self.table), -EXTREME_LOGSNR)

    def _widths(self) -> Array:
        """Steps of log(sigma / alpha) from each timestep to the next, `[T - 1]`."""
        return -jnp.diff(self._finite()) / 2

    @property
    def _linear_in_sigma(self) -> bool:
        return self.placing == "euler" and self.sigmas == "table"

    def timestep_to_logsnr(self, timestep: Array | int) -> Array:
        """Exact at integer dtypes; real-valued timesteps are interpolated linearly in log-SNR, or in sigma for the
        "euler" placing of the table's own levels."""
        step: Array = jnp.asarray(timestep)
        if jnp.issubdtype(step.dtype, jnp.integer):
            return jnp.asarray(self.table)[step]
        last = self.num_train_steps - 1
        if self._linear_in_sigma:
            cell = jnp.clip(jnp.floor(step), 0, last - 1).astype(jnp.int32)
            share = jnp.clip(step - cell, 0.0, 1.0)
            level = self._finite()[cell] - 2 * jnp.log1p(share * jnp.expm1(self._widths()[cell]))
        else:
            level = jnp.interp(step, jnp.arange(last + 1, dtype=step.dtype), self._finite())
        return jnp.where(step >= last, self.table[-1], level)

    def _real_timestep(self, logsnr: Array) -> Array:
        """Inverse of `timestep_to_logsnr`; levels outside the table meet its first or last timestep."""
        finite = self._finite()
        level = jnp.maximum(jnp.asarray(logsnr), -EXTREME_LOGSNR)
        step = jnp.interp(-level, -finite, jnp.arange(self.num_train_steps, dtype=finite.dtype))
        if not self._linear_in_sigma:
            return step
        cell = jnp.clip(jnp.floor(step), 0, self.num_train_steps - 2).astype(jnp.int32)
        width = self._widths()[cell]
        return cell + jnp.expm1((step - cell) * width) / jnp.expm1(width)

    def logsnr_to_timestep(self, logsnr: Array) -> Array:
        """Timestep that a network is told at a level: real-valued, but for "multistep", where it is whole.

        Exact at the levels of the table; levels outside it meet its first or last timestep.
        """
        step = self._real_timestep(logsnr)
        if self.placing != "multistep":
            return step
        if self.sigmas in ("table", "karras"):
            return jnp.round(step)
        # Public samplers find the first level a rounding error below its timestep, and so tell the one below.
        return jnp.floor(jnp.maximum(step - 1e-3, 0.0))

    def logsnr(self, u: Array) -> Array:
        return self.timestep_to_logsnr(jnp.asarray(u, dtype=jnp.result_type(float)) * (self.num_train_steps - 1))

    def u(self, logsnr: Array) -> Array:
        return self._real_timestep(logsnr) / (self.num_train_steps - 1)

    def timesteps(self, steps: int) -> np.ndarray:
        """Timesteps `[steps]`, noise first, before `sigmas` replaces their levels; integer but for "euler".

        Only "trailing" and "linspace" start at the last timestep, which zero terminal SNR needs.

        Raises:
            ValueError: steps outside 1..T.
        """
        count = self.num_train_steps
        if not 1 <= steps <= count:
            raise ValueError(f"steps {steps} must lie in 1..{count}, the number of training timesteps.")
        placed = min(steps + 1, count) if self.placing == "multistep" else steps
        if self.spacing == "leading":
            steps_down = np.arange(placed)[::-1] * (count // placed) + self.steps_offset
        elif self.spacing == "trailing":
            steps_down = np.round(np.arange(count, 0, -count / steps)).astype(np.int64)[:steps] - 1
        else:
            steps_down = np.linspace(0, count - 1, placed)[::-1]
            if self.placing == "euler":
                return steps_down
        return np.clip(np.round(steps_down), 0, count - 1).astype(np.int32)[:steps]

    def placed(self, steps: int) -> np.ndarray:
        """Levels `[steps]` at which the network is called, in float64."""
        table = np.asarray(self.table)
        timesteps = self.timesteps(steps)
        if timesteps.dtype == np.int32:
            levels = table[timesteps]
        else:
            levels = -2 * np.log(np.interp(timesteps, np.arange(len(table)), np.exp(-table / 2)))
        if self.sigmas == "table":
            return levels
        noise, clean = (table[-1], table[0]) if self.placing == "multistep" else (levels[0], levels[-1])
        noise = noise if self.sigma_max is None else -2 * np.log(self.sigma_max)
        clean = clean if self.sigma_min is None else -2 * np.log(self.sigma_min)
        if self.sigmas == "karras":
            return karras_levels(noise, clean, steps)
        if self.sigmas == "exponential":
            return np.linspace(noise, clean, steps)
        low, high = np.exp(-np.array([clean, noise]) / 2)
        return -2 * np.log(low + (high - low) * betaincinv(0.6, 0.6, np.linspace(1, 0, steps)))

    def levels(self, steps: int, start: float | Array = 1.0) -> Array:
        """Levels `[steps + 1]` of a walk, see `walk` for a later start. Raises ValueError as `timesteps` does."""
        levels = self.placed(steps)
        last = np.inf if self.final == "clean" else max(self.table[0], levels[-1])
        return walk(levels, start, last, max(self.table[0], levels[-1]))

    def start_std(self, steps: int) -> float:
        if self.placing != "euler" or self.spacing == "leading":
            return 1.0
        return float(np.sqrt(1 / (1 + np.exp(self.placed(steps)[0]))))


@dataclasses.dataclass(frozen=True)
class FlowTable(Schedule):
    """Flow time t of checkpoints with timesteps `T t`: t = s b / (1 + (s - 1) b), b from 1 (noise) to 1 / T.

    A walk calls the network at t = 1 first, and last at the t whose base time b is the cleanest t: public samplers
    apply the shift s to their last timestep twice. It ends at t = 0.
    """

    shift: float = 1.0
    num_train_steps: int = 1000

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"flow shift {self.shift} must be positive.")

    def _shifted(self, base: np.ndarray | float) -> np.ndarray:
        return np.asarray(self.shift * base / (1 + (self.shift - 1) * base))

    @property
    def logsnr_min(self) -> float:
        return -np.inf

    @property
    def logsnr_max(self) -> float:
        time = self._shifted(1 / self.num_train_steps)
        return float(2 * np.log((1 - time) / time))

    def logsnr(self, u: Array) -> Array:
        least = 1 / self.num_train_steps
        base = least + (1 - least) * jnp.asarray(u)
        # 1 - b without cancellation near noise
        return 2 * (jnp.log((1 - least) * (1 - jnp.asarray(u))) - jnp.log(self.shift * base))

    def u(self, logsnr: Array) -> Array:
        least = 1 / self.num_train_steps
        base = jax.nn.sigmoid(-jnp.asarray(logsnr) / 2 - np.log(self.shift))
        return (base - least) / (1 - least)

    def logsnr_to_timestep(self, logsnr: Array) -> Array:
        """`T t`, real-valued."""
        return self.num_train_steps * jax.nn.sigmoid(-jnp.asarray(logsnr) / 2)

    def placed(self, steps: int) -> np.ndarray:
        """Levels `[steps]` at which the network is called, in float64; the first is -inf."""
        time = self._shifted(np.linspace(1.0, self._shifted(1 / self.num_train_steps), steps))
        with np.errstate(divide="ignore"):
            return 2 * np.log((1 - time) / time)

    def levels(self, steps: int, start: float | Array = 1.0) -> Array:
        levels = self.placed(steps)
        return walk(levels, start, cleanest=max(self.logsnr_max, levels[-1]))
