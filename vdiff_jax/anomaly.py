"""Watching footage: how unusual every frame is, and where, to a model that predicts it from the frames before.

session = AnomalyEdits(model, clip)
normal = session.calibrate(normal_clips)          # once for a camera, then kept
result = session.anomaly(calibrate=normal)
result.score, result.heat, result.peak            # [f], [f h w], the most unusual frame
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing.anomaly import Normal, combine, lay_out, normal_errors, own_errors, window_errors
from vdiff_jax.session import Session

LEVELS = (-10.0, -1.0)
"""Log-SNR: one level that hides the frames, one that shows a trace of them (measured in docs/anomaly.md)."""

HEAT_BLUR = 1.0
"""Deviation, in latent cells, of the blur of the heat map. It takes off the grid of cells, and brings the peak from the
edge of a thing, where errors are largest, towards its middle."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnomalyScore:
    """How unusual a clip is; no value is NaN.

    score: f32 `[f]`, about 0 where a frame is usual. With calibration in deviations of normal frames, else in multiples
        of the clip's own median error.
    heat: f32 `[f h w]` at the clip's size, where in the frame, in the same unit; its mean over a frame is about the
        frame's score.
    context: how many first frames had nothing before them to judge by; they have 0 in both.
    """

    score: np.ndarray
    heat: np.ndarray
    context: int

    @property
    def peak(self) -> int:
        """The most unusual frame."""
        return self.context + int(np.argmax(self.score[self.context :]))

    def onset(self, threshold: float) -> int | None:
        """The first frame with a score above the threshold; None where there is none."""
        above = np.flatnonzero(self.score[self.context :] > threshold)
        return self.context + int(above[0]) if len(above) else None

    def sheet(self, clip: Clip, full: float | None = None) -> np.ndarray:
        """The clip's frames, u8 `[f h w 3]`, reddened where they are unusual.

        full: the heat that is painted red entirely; default the clip's highest, which makes something red in every
        clip. Give one number to compare clips.

        Raises:
            ValueError: a clip of another size or length, or a `full` that is not above 0.
        """
        if clip.frames.shape[:3] != self.heat.shape:
            raise ValueError(f"the clip has shape {clip.frames.shape[:3]}, the heat {self.heat.shape}: they must agree")
        if full is not None and not full > 0:
            raise ValueError(f"full={full}: it must be above 0")
        top = max(float(self.heat.max()), 1e-6) if full is None else full
        share = 0.8 * np.clip(self.heat / top, 0.0, 1.0)[..., None]
        red = np.array([255.0, 0.0, 0.0], np.float32)
        return np.rint((1 - share) * clip.frames + share * red).astype(np.uint8)


class AnomalyEdits(Session):
    """Scores of how unusual a clip is, see the module."""

    def calibrate(
        self,
        clips: Sequence[Clip],
        *,
        context: int = 4,
        ahead: int = 4,
        levels: Sequence[float] = LEVELS,
        prompt: str = "",
        seed: int = 0,
        batch_size: int = 16,
    ) -> Normal:
        """What is normal, from clips in which nothing unusual happens; for `anomaly` with the same options.

        The clips are brought to this session's size; arguments as in `anomaly`.

        Raises:
            ValueError: no clip, or one shorter than context + ahead frames.
        """
        _check(context, ahead, levels, batch_size)
        short = [clip.num_frames for clip in clips if clip.num_frames < context + ahead]
        if not clips or short:
            raise ValueError(
                f"calibration needs at least one clip, each of context + ahead = {context + ahead} frames or more; "
                f"got {len(clips)} clip(s), the shortest of {min(short, default=0)}"
            )
        windows = [
            window for clip in clips for window in _windows(np.asarray(self.on(clip).latents)[0], context + ahead)
        ]
        return normal_errors(self._errors(windows, context, levels, prompt, seed, batch_size))

    def anomaly(
        self,
        *,
        context: int = 4,
        ahead: int = 4,
        levels: Sequence[float] = LEVELS,
        prompt: str = "",
        calibrate: Normal | Sequence[Clip] | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> AnomalyScore:
        """How unusual every frame is, and where.

        context: frames shown before those that are judged; two at least carry a velocity.
        ahead: frames judged together, 1 = the next one only. Slow deviations, as a thing that stops, show only some
            frames ahead. A clip of fewer than context + ahead frames is judged as one window.
        levels: log-SNR of the noise the judged frames are shown in.
        prompt: what is expected to be seen, if that is known.
        calibrate: normal clips, or what `calibrate` made of them with the same options; None: the clip is judged by
            its own median, for which it must hold three windows (context + ahead + 2 frames) and be mostly usual.
        seed: of the noise. batch_size: windows at a time.

        Raises:
            ValueError: a clip without a frame after the context, options that cannot be, or a calibration that was
                made with others.
        """
        _check(context, ahead, levels, batch_size)
        num_frames = self.clip.num_frames
        if num_frames <= context:
            raise ValueError(
                f"the clip has {num_frames} frame(s), the context {context}: give a longer clip or a smaller context"
            )
        ahead = min(ahead, num_frames - context)
        if calibrate is not None and not isinstance(calibrate, Normal):
            calibrate = self.calibrate(
                calibrate,
                context=context,
                ahead=ahead,
                levels=levels,
                prompt=prompt,
                seed=seed + 1,
                batch_size=batch_size,
            )
        if calibrate is not None and calibrate.mean.shape != (len(levels), ahead):
            made_with = " levels and ahead=".join(str(size) for size in calibrate.mean.shape)
            raise ValueError(
                f"the calibration was made with {made_with}, the clip is judged with {len(levels)} levels and "
                f"ahead={ahead}: they must agree"
            )
        windows = _windows(np.asarray(self.latents)[0], context + ahead)
        errors = self._errors(windows, context, levels, prompt, seed, batch_size)
        score, heat = lay_out(combine(errors, own_errors(errors) if calibrate is None else calibrate), context)
        return AnomalyScore(score, _to_size(heat, *self.clip.frames.shape[1:3]), context)

    def _errors(
        self, windows: Sequence[np.ndarray], context: int, levels: Sequence[float], prompt: str, seed: int, limit: int
    ) -> np.ndarray:
        """Errors f32 `[l n k h w]` of windows `[f h w c]`, in batches of one shape. Window i has key (seed, i)."""
        batch, num_frames = min(limit, len(windows)), len(windows[0])
        times = self.stride * jnp.arange(num_frames, dtype=jnp.float32)
        cond = self.model.condition([prompt] * batch, times, (batch, num_frames))
        levels_array, root = jnp.asarray(levels, jnp.float32), jax.random.key(seed)
        parts = []
        for index in _batches(len(windows), batch):
            errors = self.model.run(
                window_errors,
                jnp.asarray(np.stack([windows[number] for number in index])),
                levels_array,
                cond,
                jax.vmap(lambda number: jax.random.fold_in(root, number))(jnp.asarray(index)),
                context=context,
                noise_kind=self.model.settings.noise,
            )
            parts.append(np.asarray(errors)[:, :, context:])
        return np.concatenate(parts, axis=1)[:, : len(windows)]


def _windows(latents: np.ndarray, length: int) -> list[np.ndarray]:
    """All windows of `length` frames of `latents [f h w c]`, by their first frame."""
    return [latents[start : start + length] for start in range(len(latents) - length + 1)]


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Numbers 0 to count - 1 in batches of one size; the last is filled up by repeating its last number."""
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def _to_size(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """Heat `[f h w]` of latent cells, blurred by `HEAT_BLUR` cells, at a size in pixels (bilinear)."""
    from PIL import Image

    heat = ndimage.gaussian_filter(heat, (0.0, HEAT_BLUR, HEAT_BLUR), mode="nearest")
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(cells).resize((width, height), bilinear)) for cells in heat])


def _check(context: int, ahead: int, levels: Sequence[float], batch_size: int) -> None:
    for name, value in (("context", context), ("ahead", ahead), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    if not len(levels) or not np.isfinite(levels).all():
        raise ValueError(f"levels={tuple(levels)}: give one log-SNR at least, all of them finite, as (-10, -1)")
