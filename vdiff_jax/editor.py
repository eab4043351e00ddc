"""`Editor`: every edit of one clip, in a session that keeps what the edits share.

    editor = Editor(model, read_video("in.mp4", sound=True))
    editor.edit("a blue square moving right", source_prompt="a red circle moving right").save("out.mp4")

The first edit encodes the clip and compiles; later ones cost only their own denoising. Everything an edit returns is a
`Clip` of the input's size, rate and sound, with a note of what was done in its metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdiff_jax import tasks
from vdiff_jax.anomaly import AnomalyEdits
from vdiff_jax.data.transforms import resize_frames, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing import degradations, motion
from vdiff_jax.editing.inpaint import known_outside, known_tokens, paste
from vdiff_jax.restoration import Restoration
from vdiff_jax.sampling.job import CLEAN_LOGSNR
from vdiff_jax.sampling.posterior import PosteriorSampling
from vdiff_jax.sampling.windows import Window
from vdiff_jax.session import unguided
from vdiff_jax.stylize import stylize_latents
from vdiff_jax.time_edits import TimeEdits
from vdiff_jax.types import DenoiserWrapper, Known, Latents

STRUCTURE_STD = 0.1
"""Deviation in -1..1 that the structure operator allows; smaller holds on to the input more tightly."""


class Editor(TimeEdits, Restoration, AnomalyEdits):
    """The edits of one clip; arguments as `Session`. Edits of time and repairs are in its base classes."""

    _inverted: dict[Any, tasks.Inverted]
    _psnr: dict[Any, float]

    # By prompt ---------------------------------------------------------------------------------------------------

    def edit(
        self,
        prompt: str,
        source_prompt: str = "",
        *,
        mask: np.ndarray | None = None,
        seed: int = 0,
        structure: str | None = None,
        structure_std: float = STRUCTURE_STD,
        keep_detail: bool = True,
        feather: float = 1.0,
        **options: Any,
    ) -> Clip:
        """Change what the clip shows, from what `source_prompt` says to what `prompt` says.

        source_prompt: what the clip shows now; the more exactly it says so, the less else changes.
        mask: `[f h w]`, above 0.5 = may change; outside it every pixel stays the input's.
        structure: "luminance" or "lowpass" holds the new clip to the old one's brightness or coarse picture, where an
            edit would move things (several times slower). structure_std: how tightly, in -1..1.
        keep_detail: give back the input's fine detail where nothing changed.
        options: `method`, `strength`, `steps`, `guidance_scale`, ... as in `tasks.EditOptions`.

        Raises:
            ValueError: options that cannot be.
        """
        chosen = tasks.EditOptions(**options)
        if structure not in (None, *_STRUCTURES):
            raise ValueError(f"structure={structure!r} is unknown: choose one of {', '.join(_STRUCTURES)}")
        note: dict[str, Any] = {"task": "edit", "prompt": prompt, "source_prompt": source_prompt, "seed": seed}
        note |= dataclasses.asdict(chosen) | {"structure": structure}
        if chosen.method in ("inversion", "ddpm"):
            lost = self.reconstruction_psnr(source_prompt, mask=mask, seed=seed, **options)
            note["reconstruction_psnr"] = round(lost, 2)
        known = None if mask is None else self._known(self.latents, mask, margin=0)

        def make(number: int, window: Window, known: Known) -> Latents:
            source = self.latents[:, window.start : window.stop]
            return tasks.edit_by_prompt(
                self.model,
                jnp.asarray(source),
                [prompt],
                [source_prompt],
                chosen,
                keys=self.keys(seed, number),
                known=known,
                times=self.times(window),
                inverted=self._inversion(number, window, known, source_prompt, chosen, seed),
                wrappers=self._structure(window, structure, structure_std),
            )

        frames = self.decode(self.walk(make, known))
        clip = self.finish(frames, note, keep_detail)
        if mask is None:
            return clip
        return dataclasses.replace(clip, frames=paste(self.clip.frames, clip.frames, mask, feather))

    def reconstruction_psnr(
        self, source_prompt: str = "", *, mask: np.ndarray | None = None, seed: int = 0, **options: Any
    ) -> float:
        """dB between the clip and its inversion walked back with the same prompt: what "inversion" and "ddpm" lose
        before they change anything. The autoencoder's own loss is part of it. mask: as in `edit`; only what it
        covers counts."""
        chosen = dataclasses.replace(tasks.EditOptions(**options), guidance_scale=1.0)
        memory = self.__dict__.setdefault("_psnr", {})
        known = None if mask is None else self._known(self.latents, mask, margin=0)
        name = (source_prompt, seed, chosen, None if known is None else np.asarray(known.mask).tobytes())
        if name in memory:
            return memory[name]

        def make(number: int, window: Window, known: Known) -> Latents:
            source = jnp.asarray(self.latents[:, window.start : window.stop])
            inverted = self._inversion(number, window, known, source_prompt, chosen, seed)
            arguments: dict[str, Any] = dict(keys=self.keys(seed, number), known=known, times=self.times(window))
            prompts = [source_prompt]
            return tasks.edit_by_prompt(self.model, source, prompts, prompts, chosen, inverted=inverted, **arguments)

        made = to_video(self.decode(self.walk(make, known)))
        error = np.square(made - to_video(self.frames)).mean(axis=-1)
        mse = float(np.average(error, weights=None if mask is None else self.small_mask(mask)))
        memory[name] = 10 * float(np.log10(4 / max(mse, 1e-12)))
        return memory[name]

    def _inversion(
        self, number: int, window: Window, known: Known, prompt: str, options: tasks.EditOptions, seed: int
    ) -> tasks.Inverted | None:
        """The window's inversion, from the session's memory if it has been made."""
        if options.method not in ("inversion", "ddpm"):
            return None
        memory = self.__dict__.setdefault("_inverted", {})
        mask = np.asarray(known.mask).tobytes()
        name = (window, prompt, options.method, options.strength, self.model.steps(options.steps), seed, mask)
        if name not in memory:
            source = jnp.asarray(self.latents[:, window.start : window.stop])
            memory[name] = tasks.invert(
                self.model,
                source,
                [prompt],
                options,
                keys=self.keys(seed, number),
                known=Known(source, known.mask, known.logsnr),
                times=self.times(window),
            )
        return memory[name]

    def _structure(self, window: Window, name: str | None, std: float) -> tuple[DenoiserWrapper, ...]:
        if name is None:
            return ()
        measure = _STRUCTURES[name]()
        video = jnp.asarray(to_video(self.frames[window.start : window.stop]))[None]
        return (PosteriorSampling(measure(video), measure, jnp.float32(std), iterations=3),)

    def harmonise(
        self, latents: Latents | None = None, prompt: str = "", *, strength: float = 0.3, seed: int = 0, **options: Any
    ) -> Clip:
        """Make latents `[1 f h w c]` that were changed by hand look natural (default: the clip's own).

        strength: level of the noise under which they are made anew; more forgets more.

        Raises:
            ValueError: latents of another shape than the clip's.
        """
        changed = jnp.asarray(self.latents if latents is None else latents)
        if changed.shape != self.latents.shape:
            raise ValueError(
                f"the latents have shape {changed.shape}, the clip's {self.latents.shape}: they must agree"
            )

        def make(number: int, window: Window, known: Known) -> Latents:
            part = changed[:, window.start : window.stop]
            arguments: dict[str, Any] = dict(keys=self.keys(seed, number), times=self.times(window))
            return tasks.harmonise(self.model, part, [prompt], strength, known=known, **arguments, **options)

        note = {"task": "harmonise", "prompt": prompt, "strength": strength, "seed": seed}
        return self.finish(self.decode(self.walk(make)), note)

    # By style ----------------------------------------------------------------------------------------------------

    def stylize(
        self,
        style: Clip,
        prompt: str = "",
        source_prompt: str | None = None,
        *,
        strength: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Clip:
        """Give the clip the looks of a style image (the first frame of `style`): palette, contrast, texture.

        prompt: what the result shows, without words for what the style decides. source_prompt: what the clip shows;
        None = the same. strength: 0..1, how far. options: `structure`, `shared_attention`, `layout`, `method`, `steps`,
        `guidance_scale` as in `stylize.stylize_latents`.
        """
        image = resize_frames(style.frames[:1], self.height, self.width)
        looks = self.model.encode(to_video(image)[None])

        def make(number: int, window: Window, known: Known) -> Latents:
            source = jnp.asarray(self.latents[:, window.start : window.stop])
            arguments: dict[str, Any] = dict(keys=self.keys(seed, number), known=known, times=self.times(window))
            old = None if source_prompt is None else [source_prompt]
            return stylize_latents(self.model, source, looks, [prompt], old, strength=strength, **arguments, **options)

        note = {"task": "stylize", "prompt": prompt or None, "strength": strength, "seed": seed, **options}
        return self.finish(self.decode(self.walk(make)), note)

    # By mask -----------------------------------------------------------------------------------------------------

    def inpaint(
        self,
        mask: np.ndarray,
        prompt: str = "",
        *,
        negative_prompt: str = "",
        seed: int = 0,
        feather: float = 1.0,
        margin: int = 1,
        **options: Any,
    ) -> Clip:
        """Make what the mask covers anew: remove, add, replace, repair.

        mask: `[f h w]` of the clip's size, above 0.5 = make anew; it may move. prompt: the whole new scene; for a
        removal what is left without the object ("an empty grey background"). feather: pixels inside the mask over which
        what surrounds it goes over into the new. margin: tokens around the mask that are made with it.
        options: `steps`, `guidance_scale`, `sampler`, ...

        Every pixel outside the mask stays the input's, bit for bit; what lay under it has no part in the result.

        Raises:
            ValueError: a mask of another shape.
        """
        small = self.small_mask(mask)
        sampling = {"negative_prompt": negative_prompt, **options}
        filled = self.hole_filled(mask)
        latents = jnp.asarray(self.encode(resize_frames(filled, self.height, self.width)))
        known = known_outside(latents, small[None], margin)

        def make(number: int, window: Window, part: Known) -> Latents:
            arguments: dict[str, Any] = dict(keys=self.keys(seed, number), times=self.times(window))
            return self.model.complete(part, [prompt], **arguments, **unguided(prompt, sampling))

        note: dict[str, Any] = {"task": "inpaint", "prompt": prompt, "seed": seed, **sampling}
        clip = self.finish(self.decode(self.walk(make, known)), note | {"negative_prompt": negative_prompt or None})
        return dataclasses.replace(clip, frames=paste(filled, clip.frames, mask, feather))

    def outpaint(
        self, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, prompt: str = "", **options: Any
    ) -> Clip:
        """Widen the picture by pixels on its sides and make what lies there; the middle stays bit for bit.

        The model works at the scale it had, on a larger picture. prompt: the whole wider scene.
        """
        sides = (left, top, right, bottom)
        if min(sides) < 0 or not any(sides):
            raise ValueError(f"outpaint by {sides} pixels (left, top, right, bottom): give at least one above 0")
        pad = ((0, 0), (top, bottom), (left, right), (0, 0))
        mask = np.pad(np.zeros(self.clip.frames.shape[:3], np.float32), pad[:3], constant_values=1.0)
        metadata = self._listed({"task": "outpaint", "sides": list(sides)})
        clip = dataclasses.replace(self.clip, frames=np.pad(self.clip.frames, pad, mode="edge"), metadata=metadata)
        grown = zip((self.height, self.width), clip.frames.shape[1:3], self.clip.frames.shape[1:3])
        multiple = self.model.size_multiple
        height, width = (max(1, round(side * new / old / multiple)) * multiple for side, new, old in grown)
        return self.on(clip, (height, width)).inpaint(mask, prompt, **options)

    def move_camera(
        self, pan: tuple[float, float] = (0.0, 0.0), zoom: float = 1.0, prompt: str = "", **options: Any
    ) -> Clip:
        """A camera that pans (pixels right and down over the clip) and zooms (below 1 it moves away); what comes into
        view is made."""
        if not zoom > 0:
            raise ValueError(f"zoom={zoom}: it must be above 0")
        frames, mask = motion.camera_move(self.clip.frames, pan, zoom)
        metadata = self._listed({"task": "move_camera", "pan": list(pan), "zoom": zoom})
        moved = dataclasses.replace(self.clip, frames=frames, metadata=metadata)
        return self.on(moved).inpaint(mask, prompt, **options) if (mask > 0.5).any() else moved

    def _known(self, latents: Latents, mask: np.ndarray, margin: int) -> Known:
        known = known_tokens(self.small_mask(mask)[None], *self.latent_size, margin)
        return Known(jnp.asarray(latents), known, jnp.full(latents.shape[:2], CLEAN_LOGSNR, jnp.float32))


def _luminance() -> degradations.Degradation:
    return degradations.grayscale()


def _lowpass() -> degradations.Degradation:
    return degradations.downsample(4)


_STRUCTURES: dict[str, Callable[[], degradations.Degradation]] = {"luminance": _luminance, "lowpass": _lowpass}
