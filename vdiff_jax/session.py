"""A clip brought to a model and back: size, windows, latents that are kept, and the finished clip.

The model has a size and a window of its own; a clip has another size, any length, a rate and a sound. `Session` brings
the clip to the model (stretched to its size, cut into windows that share frames) and what was made back to the clip:
its size, its rate, its sound, and the fine detail that the model's size cannot hold, wherever nothing was changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax.data.transforms import resize_frames, to_uint8, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing.inpaint import fill_hole
from vdiff_jax.sampling.job import nothing_known
from vdiff_jax.sampling.windows import Window, window_slices, with_context
from vdiff_jax.types import Array, Known, Latents

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion

DETAIL_REACH = 0.06
"""How much of 0..1 a pixel may have changed until its old fine detail is left out by about two thirds."""


class Session:
    """One clip open for one model. Latents are encoded once; compiled functions are the model's, shared by all.

    size: pixels the model works at, one number or (height, width); default: as trained.
    window: frames the model sees at a time; default: as it generates. overlap: frames that windows share.
    stride: time between the clip's frames in native frame intervals.
    An image-to-video model that has no picture yet takes the clip's first frame.
    """

    def __init__(
        self,
        model: VideoDiffusion,
        clip: Clip,
        *,
        size: int | tuple[int, int] | None = None,
        window: int | None = None,
        overlap: int = 3,
        stride: float = 1.0,
    ):
        if not stride > 0:
            raise ValueError(f"stride={stride}: it must be above 0")
        if window is not None and window < 1:
            raise ValueError(f"window={window} frames: it must be at least 1")
        self.given = model
        self.model = model.with_image(clip, size=size) if model.needs_image else model
        self.clip, self.stride = clip, stride
        self.latent_size = model.latent_size(size)
        factor = model.components["autoencoder"].config.factor
        self.height, self.width = (side * factor for side in self.latent_size)
        self.window = model.settings.num_frames if window is None else window
        self.overlap = min(overlap, max(self.window - 1, 0))
        window_slices(clip.num_frames, self.window, self.overlap)  # refuses what cannot be, before any work

    @functools.cached_property
    def frames(self) -> np.ndarray:
        """The clip at the model's size, u8 `[f h w 3]`."""
        return resize_frames(self.clip.frames, self.height, self.width)

    @functools.cached_property
    def latents(self) -> Latents:
        """Final latents `[1 f h w c]` of the clip."""
        return self.encode(self.frames)

    @functools.cached_property
    def reconstruction(self) -> np.ndarray:
        """What the autoencoder alone makes of the clip, u8 `[f h w 3]`: the part of an error that is not the edit's."""
        return self.decode(self.latents)

    def encode(self, frames: np.ndarray) -> Latents:
        """u8 `[f h w 3]` -> final latents `[1 f h w c]`, one window at a time."""
        return self._by_window(lambda part: np.asarray(self.model.encode(to_video(part)[None])), frames)

    def decode(self, latents: Latents | np.ndarray) -> np.ndarray:
        """Final latents `[1 f h w c]` -> u8 `[f h w 3]`, one window at a time."""
        return self._by_window(lambda part: self.model.decode(jnp.asarray(part)[None]), np.asarray(latents)[0])[0]

    def _by_window(self, function: Callable[[np.ndarray], np.ndarray], frames: np.ndarray) -> Any:
        """`function` of parts of one length, the last filled up, so that nothing compiles anew for other lengths."""
        length = min(self.window, len(frames))
        parts = []
        for start in range(0, len(frames), length):
            part = frames[start : start + length]
            filled = np.concatenate([part, np.repeat(part[-1:], length - len(part), axis=0)])
            parts.append(function(filled)[:, : len(part)])
        return np.concatenate(parts, axis=1)

    def keys(self, seed: int, number: int = 0) -> Array:
        """The key `[1]` of window `number`."""
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 1)

    def times(self, window: Window) -> Array:
        """Time stamps `[f]` of a window's frames."""
        return self.stride * jnp.arange(window.stop - window.start, dtype=jnp.float32)

    def walk(self, make: Callable[[int, Window, Known], Latents], known: Known | None = None) -> np.ndarray:
        """`make(number, window, known)` over all windows of the clip; returns latents `[1 f h w c]`.

        known: what is given of the whole clip. Later windows also know the frames that the one before has made.
        """
        known = nothing_known(self.latents.shape) if known is None else known
        made = np.array(self.latents, np.float32)
        for number, window in enumerate(window_slices(made.shape[1], self.window, self.overlap)):
            part = jax.tree.map(lambda leaf: leaf[:, window.start : window.stop], known)  # noqa: B023
            part = with_context(part, jnp.asarray(made[:, window.start : window.start + window.context]))
            made[:, window.start : window.stop] = np.asarray(make(number, window, part))
        return made

    def on(self, clip: Clip, size: tuple[int, int] | None = None) -> Self:
        """A session on another clip with the same settings; size: another one at which the model works."""
        size = size or (self.height, self.width)
        return type(self)(self.given, clip, size=size, window=self.window, overlap=self.overlap, stride=self.stride)

    def small_mask(self, mask: np.ndarray) -> np.ndarray:
        """The mask at the model's size: what a covered pixel touches is covered; `[f h w]` f32, 0 or 1."""
        mask = np.asarray(mask)
        if mask.shape != self.clip.frames.shape[:3]:
            raise ValueError(f"the mask has shape {mask.shape}, the clip {self.clip.frames.shape[:3]}: they must agree")
        covered = mask > 0.5
        for axis, size in ((1, self.height), (2, self.width)):
            covered = _cover_cells(covered, axis, size)
        return covered.astype(np.float32)

    def hole_filled(self, mask: np.ndarray) -> np.ndarray:
        """The clip's own frames u8 `[f h w 3]` with a smooth continuation of the rest under `mask [f h w]`.

        At the clip's size, because a resize looks beyond its pixel: filled later, what lay in the hole is around it.
        """
        parts = [slice(start, start + self.window) for start in range(0, self.clip.num_frames, self.window)]
        filled = [fill_hole(to_video(self.clip.frames[part])[None], np.asarray(mask)[part][None])[0] for part in parts]
        return np.concatenate([to_uint8(part) for part in filled])

    # Back to the clip --------------------------------------------------------------------------------------------

    def finish(
        self,
        frames: np.ndarray,
        note: dict[str, Any],
        keep_detail: bool = False,
        source: np.ndarray | None = None,
        **changes: Any,
    ) -> Clip:
        """Frames u8 `[f h w 3]` at the model's size as a clip of the input's size, rate and sound.

        note: what was done, for the provenance. keep_detail: give back the input's fine detail, and what the
        autoencoder lost, where nothing was changed.
        source: the clip's frame that each of `frames` is like, `[f]` ints; default: the one at its place, and then
        `frames` are as many as the clip's.
        changes: fields of the clip to replace, as `fps` or `sound`.
        """
        full = resize_frames(frames, *self.clip.frames.shape[1:3])
        if keep_detail:
            full = self._with_detail(full, frames, np.arange(len(frames)) if source is None else source)
        return dataclasses.replace(self.clip, frames=full, metadata=self._note(note), **changes)

    def _with_detail(self, full: np.ndarray, frames: np.ndarray, source: np.ndarray) -> np.ndarray:
        """Adds the input minus its reconstruction, faded out where the frames differ from the reconstruction."""
        out = np.empty_like(full)
        for index, like in enumerate(source):  # one by one: in fp32 a long clip takes a lot of memory
            made, before = frames[index].astype(np.float32), self.reconstruction[like]
            change = ndimage.maximum_filter(np.abs(made - before).max(axis=-1) / 255.0, size=3)
            share = (255 * np.exp(-np.square(change / DETAIL_REACH))).astype(np.uint8)
            share = resize_frames(np.repeat(share[None, ..., None], 3, axis=-1), *full.shape[1:3])[0, ..., :1]
            detail = self.clip.frames[like].astype(np.float32) - resize_frames(before[None], *full.shape[1:3])[0]
            out[index] = np.clip(np.rint(full[index] + detail * (share.astype(np.float32) / 255.0)), 0, 255)
        return out

    def _note(self, note: dict[str, Any]) -> dict[str, Any]:
        return {**self._listed(note), **self.model.provenance()}

    def _listed(self, note: dict[str, Any]) -> dict[str, Any]:
        """The clip's metadata with one more edit in its list."""
        told = self.model.provenance(**note)
        edits = [*self.clip.metadata.get("edits", []), {key: told[key] for key in note if key in told}]
        return {**self.clip.metadata, "edits": edits}


def _cover_cells(covered: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Bool array with `axis` brought to `size` cells, True where any pixel that overlaps the cell is."""
    old = covered.shape[axis]
    if old == size:
        return covered
    edges = np.arange(size + 1) * old / size
    first, last = np.floor(edges[:-1] + 1e-9).astype(int), np.ceil(edges[1:] - 1e-9).astype(int)
    parts = [covered.take(range(a, b), axis).any(axis) for a, b in zip(first, last)]
    return np.stack(parts, axis)


def unguided(prompt: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """`sampling` without guidance where there are no words to guide to or away from; it would cost a second call."""
    return sampling if prompt or sampling.get("negative_prompt") else {"guidance_scale": 1.0, **sampling}
