"""The editing verbs of a model, `model.edit(video, ...)` and so on: each opens an `Editor` for one call.

For several edits of one clip keep the editor: `editor = model.editor(video)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vdiff_jax.anomaly import AnomalyScore
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing.degradations import Degradation
from vdiff_jax.editor import Editor
from vdiff_jax.rollout import PromptTimes, generate_long

if TYPE_CHECKING:
    from vdiff_jax.pipeline import Settings

ClipLike: TypeAlias = Clip | np.ndarray
"""A clip, or frames u8 `[f h w 3]`, which get the model's rate."""


class EditingVerbs:
    """Mixed into `VideoDiffusion`. Every verb takes a clip, gives a `Clip`, and leaves the input as it is."""

    settings: Settings

    def editor(self, video: ClipLike, **session: Any) -> Editor:
        """A session on one clip; session: `size, window, overlap, stride` as in `Session`."""
        clip = video if isinstance(video, Clip) else Clip(np.asarray(video), self.settings.fps)
        return Editor(self, clip, **session)  # pyright: ignore[reportArgumentType]

    def generate_long(self, prompt: PromptTimes, num_frames: int, **options: Any) -> Clip:
        """Text to a clip of any length, at constant memory. See `rollout.generate_long`."""
        return generate_long(self, prompt, num_frames, **options)  # pyright: ignore[reportArgumentType]

    def edit(self, video: ClipLike, prompt: str, source_prompt: str = "", **options: Any) -> Clip:
        """Change what the clip shows: subject, colour, weather, background. See `Editor.edit`."""
        return self.editor(video).edit(prompt, source_prompt, **options)

    def inpaint(self, video: ClipLike, mask: np.ndarray, prompt: str = "", **options: Any) -> Clip:
        """Make what a mask `[f h w]` covers anew: remove, add, replace. See `Editor.inpaint`."""
        return self.editor(video).inpaint(mask, prompt, **options)

    def outpaint(self, video: ClipLike, prompt: str = "", **options: Any) -> Clip:
        """Widen the picture: `left, top, right, bottom` in pixels. See `Editor.outpaint`."""
        return self.editor(video).outpaint(prompt=prompt, **options)

    def move_camera(self, video: ClipLike, prompt: str = "", **options: Any) -> Clip:
        """Pan and zoom; what comes into view is made. See `Editor.move_camera`."""
        return self.editor(video).move_camera(prompt=prompt, **options)

    def restore(self, video: ClipLike, task: str | Degradation = "denoise", prompt: str = "", **options: Any) -> Clip:
        """Repair noise, blur, low resolution, blocks, grey. See `Restoration.restore`."""
        return self.editor(video).restore(task, prompt, **options)

    def extend(self, video: ClipLike, num_frames: int, prompt: PromptTimes = "", **options: Any) -> Clip:
        """The clip and what may come next, `num_frames` in all. See `TimeEdits.extend`."""
        return self.editor(video).extend(num_frames, prompt, **options)

    def interpolate(self, video: ClipLike, factor: int = 2, prompt: str = "", **options: Any) -> Clip:
        """Slow motion. See `TimeEdits.interpolate`."""
        return self.editor(video).interpolate(factor, prompt, **options)

    def join(self, first: ClipLike, second: Clip, num_frames: int = 8, prompt: str = "", **options: Any) -> Clip:
        """Two clips with a transition made between them. See `TimeEdits.join`."""
        return self.editor(first).join(second, num_frames, prompt, **options)

    def stylize(self, video: ClipLike, style_image: Clip, prompt: str = "", **options: Any) -> Clip:
        """The looks of a style image. See `Editor.stylize`."""
        return self.editor(video).stylize(style_image, prompt, **options)

    def anomaly(self, video: ClipLike, **options: Any) -> AnomalyScore:
        """How unusual every frame is, and where: `score [f]`, `heat [f h w]`. See `AnomalyEdits.anomaly`."""
        return self.editor(video).anomaly(**options)

    def loop(self, video: ClipLike, num_frames: int = 8, prompt: str = "", **options: Any) -> Clip:
        """A clip that ends where it begins. See `TimeEdits.loop`."""
        return self.editor(video).loop(num_frames, prompt, **options)
