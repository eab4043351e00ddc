"""Repairing a clip: noise, blur, low resolution, blocks, grey, or any degradation the user can write down.

The cheapest way that is right comes first. Frames or whole tokens that are intact are known, and the rest is made
around them, one call per step. White noise alone is a level of the process: denoise from there. Everything else is
drawn from the posterior given the measurement (`sampling.posterior`), several times dearer, from a classical answer on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax import tasks
from vdiff_jax.data.transforms import resize_frames, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing import degradations
from vdiff_jax.editing.degradations import Degradation
from vdiff_jax.editing.inpaint import known_outside, paste
from vdiff_jax.editing.noise_estimate import estimate_noise
from vdiff_jax.sampling.posterior import chi_square
from vdiff_jax.sampling.windows import Window
from vdiff_jax.session import Session, unguided
from vdiff_jax.types import Array, Known, Latents

RESTORE_TASKS = ("denoise", "salt_pepper", "deblur", "superres", "colorize", "unblock", "fill")
ROUNDING_STD = 2 / 255 / np.sqrt(12)
"""Deviation in -1..1 of what is lost in 8 bits."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is given of a clip at the model's size: `observed = degradation(video) + noise_std * noise`.

    observed: `[1 f ...]`. noise_std: scalar or of its shape, inf where nothing is observed.
    """

    observed: np.ndarray
    degradation: Degradation
    noise_std: Any

    def part(self, window: Window) -> Measurement:
        """The measurement of a window's frames."""
        frames = slice(window.start, window.stop)
        std = self.noise_std[:, frames] if np.ndim(self.noise_std) > 1 else self.noise_std
        count = self.observed.shape[1]
        parameters = jax.tree.map(
            lambda leaf: leaf[:, frames] if np.ndim(leaf) == 5 and leaf.shape[1] == count else leaf,
            self.degradation.parameters,
        )
        degradation = dataclasses.replace(self.degradation, parameters=parameters)
        return Measurement(self.observed[:, frames], degradation, std)


class Restoration(Session):
    """Edits that give back what a clip has lost."""

    def restore(
        self,
        task: str | Degradation = "denoise",
        prompt: str = "",
        *,
        observed: np.ndarray | None = None,
        noise_std: float | None = None,
        factor: int = 4,
        blur: float = 1.5,
        block: int = 8,
        mask: np.ndarray | None = None,
        method: str | None = None,
        n_candidates: int = 1,
        mean_of: int = 1,
        steps: int | None = None,
        iterations: int = 8,
        seed: int = 0,
    ) -> Clip:
        """A clip drawn from those that explain what is given.

        task: "denoise" (white noise), "salt_pepper" (pixels lost to black and white), "deblur" (Gaussian, std `blur`
            pixels at the model's size), "superres" (the clip becomes `factor` times as large), "colorize", "unblock"
            (every block of `block` pixels at the model's size holds only its mean), "fill" (the pixels under
            `mask [f h w]` are lost; where whole tokens are intact, `inpaint` does the same for less), or a
            `Degradation` with `observed [f ...]`, what it gave, at the model's size.
        prompt: what the clip shows, if known. noise_std: of the measurement, pixels in 0..1; None = estimated for
            "denoise", that of 8 bits otherwise.
        method: "posterior", or "fast": "denoise" starts from the level of the noise, "fill" knows the tokens that are
            intact, both without a measurement. Default: "fast" where there is one. "posterior" begins in a classical
            answer (`Degradation.first_guesses`), for a `Degradation` without one in the clip itself.
        n_candidates: draws, of which the one that explains the measurement best is taken.
        mean_of: average of so many answers: nearer in squared error than any of them, and smoother. Of a grey clip all
            have one hue, that of the first window that tells hues apart.
        steps, iterations: of sampling, and of the solver in each step.

        Raises:
            ValueError: an unknown task or method, or what it needs is missing.
        """
        has_fast = isinstance(task, str) and task in ("denoise", "fill")
        if method is None:
            method = "fast" if has_fast and max(n_candidates, mean_of) == 1 else "posterior"
        if method not in ("posterior", "fast") or (method == "fast" and not has_fast):
            raise ValueError(f"method={method!r} of {task!r}: choose posterior, or fast for denoise and fill")
        if min(n_candidates, mean_of) < 1:
            raise ValueError(f"n_candidates={n_candidates}, mean_of={mean_of}: both must be at least 1")
        if method == "fast" and max(n_candidates, mean_of) > 1:
            raise ValueError(f"n_candidates={n_candidates}, mean_of={mean_of} of method='fast': it has one answer only")
        std = None if noise_std is None else 2.0 * noise_std
        if method == "fast" and task == "fill":
            return self._fill(mask, prompt, steps, seed)
        given = self._measure(task, observed, std, factor, blur, block, mask)
        hues: list[int] = []

        def answer(seed: int) -> np.ndarray:
            def make(number: int, window: Window, known: Known) -> Latents:
                part, keys = given.part(window), self.keys(seed, number)
                arguments: dict[str, Any] = dict(steps=steps, times=self.times(window))
                if method == "fast":
                    arguments |= dict(keys=keys, known=known)
                    return tasks.denoise(self.model, part.observed, part.noise_std, [prompt], **arguments)
                keys = jax.random.split(keys[0], n_candidates)
                return self._draw(part, window, known, hues, prompt, keys=keys, iterations=iterations, **arguments)

            return self.decode(self.walk(make))

        answers = [answer(seed + number).astype(np.float32) for number in range(mean_of)]
        frames = np.rint(np.mean(answers, axis=0)).astype(np.uint8)
        name = task if isinstance(task, str) else task.name
        note = {"task": "restore", "restore": name, "prompt": prompt or None, "method": method, "seed": seed}
        note |= {"n_candidates": n_candidates, "mean_of": mean_of, "steps": steps, "iterations": iterations}
        settings = {"superres": {"factor": factor}, "deblur": {"blur": blur}, "unblock": {"block": block}}
        clip = self.finish(frames, note | {"noise_std": noise_std} | settings.get(name, {}))
        if task == "superres":
            height, width = (side * factor for side in self.clip.frames.shape[1:3])
            clip = dataclasses.replace(clip, frames=resize_frames(frames, height, width))
        return clip

    def _draw(
        self,
        part: Measurement,
        window: Window,
        known: Known,
        hues: list[int],
        prompt: str,
        *,
        keys: Array,
        **options: Any,
    ) -> Latents:
        """A window `[1 f h w c]` from the posterior: of one draw per key the one that explains best what was observed.

        hues: of several first guesses the one that the whole clip takes, written by the first window that tells them
            apart; empty before that.
        """
        count = len(keys)
        videos = self._first_guesses(part, window)
        guesses = [videos[index] for index in hues] if hues else videos
        latents = [jnp.repeat(self.model.encode(video), count, axis=0) for video in guesses]
        drawn, distances = tasks.restore_from(
            self.model, latents, jnp.asarray(part.observed), part.degradation, part.noise_std, [prompt] * count,
            keys=keys, known=jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), known),
            choose=len(videos) > 1, **options,
        )  # fmt: skip
        best = 0 if count == 1 else self._best(drawn, part)
        if distances is not None and not hues and _told_apart(distances[:, best]):
            hues.append(int(np.argmin(distances[:, best])))
        return drawn[best][None]

    def _first_guesses(self, part: Measurement, window: Window) -> list[np.ndarray]:
        """Videos `[1 f h w 3]` of a window to start from, at the model's size."""
        count = window.stop - window.start
        guesses = part.degradation.first_guesses(part.observed, part.noise_std, count)
        guesses = guesses or [to_video(self.frames[window.start : window.stop])[None]]
        expected = (1, count, self.height, self.width, 3)
        if wrong := [np.shape(guess) for guess in guesses if np.shape(guess) != expected]:
            raise ValueError(
                f"what {part.degradation.name!r} gave leads back to a video of {wrong[0]}, the model's is {expected}: "
                "give observed= as it comes of the clip at the model's size"
            )
        return guesses

    def _fill(self, mask: np.ndarray | None, prompt: str, steps: int | None, seed: int) -> Clip:
        """What lies under the mask made anew around the tokens that it does not touch; the rest stays bit for bit."""
        if mask is None:
            raise ValueError("restoring by 'fill' needs mask=: the pixels that are lost, [f h w]")
        latents = jnp.asarray(self.encode(resize_frames(self.hole_filled(mask), self.height, self.width)))
        known = known_outside(latents, self.small_mask(mask)[None], margin=0)

        def make(number: int, window: Window, part: Known) -> Latents:
            options = unguided(prompt, {"steps": steps})
            return self.model.complete(
                part, [prompt], keys=self.keys(seed, number), times=self.times(window), **options
            )

        note = {"task": "restore", "restore": "fill", "prompt": prompt or None, "method": "fast", "seed": seed}
        clip = self.finish(self.decode(self.walk(make, known)), note | {"steps": steps})
        return dataclasses.replace(clip, frames=paste(self.clip.frames, clip.frames, mask, feather=0.0))

    def _measure(
        self,
        task: str | Degradation,
        observed: np.ndarray | None,
        noise_std: float | None,
        factor: int,
        blur: float,
        block: int,
        mask: np.ndarray | None,
    ) -> Measurement:
        """The clip as a measurement at the model's size."""
        std = float(ROUNDING_STD if noise_std is None else noise_std)
        if isinstance(task, Degradation):
            if observed is None:
                raise ValueError(f"restoring by {task.name!r} needs observed=: what the degradation gave, [f ...]")
            if len(observed) != self.clip.num_frames > self.window:
                raise ValueError(
                    f"{task.name!r} gave {len(observed)} of {self.clip.num_frames} frames: in windows of {self.window} "
                    "frames one is needed for each; give a larger window"
                )
            return Measurement(np.asarray(observed, np.float32)[None], task, std)
        video = to_video(self.frames)[None]
        if task == "denoise":
            std = float(estimate_noise(jnp.asarray(video))[0]) if noise_std is None else std
            return Measurement(video, degradations.identity(), std)
        if task == "salt_pepper":
            # At the clip's own size: resizing would spread them over their neighbours.
            lost = impulses(to_video(self.clip.frames)[None])[0].any(axis=-1).astype(np.float32)
            # Of a larger clip a pixel of the model is seen if most of its own are; the others are filled from those.
            seen = resize_frames(np.repeat((255 * lost).astype(np.uint8)[..., None], 3, -1), self.height, self.width)
            return self._without(lost, std, seen[..., 0] > 127)
        if task == "deblur":
            return Measurement(video, degradations.gaussian_blur(blur), std)
        if task == "superres":
            if self.height % factor or self.width % factor:
                raise ValueError(f"factor={factor} does not divide the model's {self.height}x{self.width} pixels")
            height, width = self.height // factor, self.width // factor
            if self.clip.frames.shape[1] > height or self.clip.frames.shape[2] > width:
                have = "x".join(str(side) for side in self.clip.frames.shape[1:3])
                raise ValueError(
                    f"superres by {factor} of a clip of {have} pixels: at {self.height}x{self.width} the model can "
                    f"enlarge at most {height}x{width}; give a size of {factor} times the clip's, or resize the clip"
                )
            small = resize_frames(self.clip.frames, height, width)
            return Measurement(to_video(small)[None], degradations.downsample(factor), std)
        if task == "colorize":
            gray = degradations.grayscale()
            return Measurement(np.asarray(gray(jnp.asarray(video))), gray, std)
        if task == "unblock":
            # The pixels of a block share one rounding, but count as block^2 measurements.
            return Measurement(video, degradations.mosaic(block), std * block if noise_std is None else std)
        if task == "fill":
            if mask is None:
                raise ValueError("restoring by 'fill' needs mask=: the pixels that are lost, [f h w]")
            return self._without(mask, std, self.small_mask(mask) > 0.5)
        raise ValueError(f"restoration {task!r} is unknown: choose one of {', '.join(RESTORE_TASKS)}")

    def _without(self, lost: np.ndarray, std: float, unseen: np.ndarray) -> Measurement:
        """The clip where it is not under the mask `lost [f h w]`; what lies there has no part in the resizing.

        unseen: the same at the model's size, bool.
        """
        if unseen.all():
            size = f"{self.height}x{self.width}"
            raise ValueError(f"nothing of the clip is left at the model's {size} pixels: give a smaller mask")
        video = to_video(resize_frames(self.hole_filled(lost), self.height, self.width))[None]
        noise_std = np.where(unseen[None, ..., None], np.inf, std).astype(np.float32) * np.ones_like(video)
        return Measurement(video, degradations.identity(), noise_std)

    def _best(self, drawn: Latents, part: Measurement) -> int:
        video = to_video(self.model.decode(drawn))
        explained = part.degradation(jnp.asarray(video))
        return int(np.argmin(np.asarray(chi_square(jnp.asarray(part.observed), explained, part.noise_std))))


def _told_apart(distances: np.ndarray) -> bool:
    """Whether one of the first guesses explains what is seen clearly better than most; not so in a dark picture."""
    return len(distances) > 1 and distances.min() < 0.8 * np.median(distances)


def impulses(video: np.ndarray) -> np.ndarray:
    """Pixels lost to black or white, bool `[b f h w c]`: at an end of the range and far from the median around."""
    median = np.asarray(ndimage.median_filter(video, size=(1, 1, 3, 3, 1), mode="reflect"))
    return (np.abs(video) > 0.98) & (np.abs(video - median) > 0.2)
