"""Clips of any length: windows of the network one after the other, at constant memory.

Every window knows the last frames that were made (motion goes on) and the first frame of the clip (things stay what
they are). Three things hold drift down: what was made is shown under noise that is told to the network, so that it
corrects it; the anchor; and a pull of the latents' statistics towards those of the first window.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing import motion
from vdiff_jax.sampling.job import CLEAN_LOGSNR
from vdiff_jax.sampling.windows import CONTEXT_LOGSNR, pull_statistics
from vdiff_jax.types import Array, Latents

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion


PromptTimes = str | Mapping[int, str]
"""One prompt, or {frame: prompt} with each in force from its frame on."""


def prompt_at(prompts: PromptTimes, frame: int) -> str:
    """The prompt in force at a frame; before the first one's frame, the first."""
    if isinstance(prompts, str):
        return prompts
    if not prompts:
        raise ValueError("prompts over time are an empty mapping: give one text, or {frame: text}")
    starts = sorted(prompts)
    return prompts[starts[max(0, bisect.bisect_right(starts, frame) - 1)]]


def prompt_changes(prompts: PromptTimes) -> list[int]:
    """The frames at which another prompt comes into force."""
    return [] if isinstance(prompts, str) else sorted(prompts)[1:]


@dataclasses.dataclass(frozen=True)
class RollOut:
    """How a clip goes on beyond the network's window.

    window: frames the network sees at a time. context: of these, how many are the last ones made; two at least carry a
        velocity. anchor: the first frame of the clip is shown as well, so that things stay what they are.
    context_logsnr: level of the noise in which frames that were made are shown.
    statistics: 0..1, pull of every window's latent mean and deviation per channel to the first window's.
    """

    window: int = 16
    context: int = 3
    anchor: bool = True
    context_logsnr: float = CONTEXT_LOGSNR
    statistics: float = 0.3

    def __post_init__(self):
        if self.context < 1 or self.context + self.anchor >= self.window:
            raise ValueError(
                f"context={self.context} of a window of {self.window} frames must be at least 1 and leave new frames"
            )

    @classmethod
    def fitting(cls, window: int, prompts: PromptTimes = "", have: int | None = None) -> RollOut:
        """The defaults, as far as `window` and a clip of `have` frames have room for them.

        Where another prompt comes into force nothing is pulled to the first window, which showed something else.
        """
        context = max(1, min(cls.context, window - 2, window if have is None else have))
        several = not isinstance(prompts, str) and len(set(prompts.values())) > 1
        return cls(window=window, context=context, statistics=0.0 if several else cls.statistics)

    @property
    def new_frames(self) -> int:
        """Frames that every window adds."""
        return self.window - self.context - self.anchor


LONGEST_ANCHOR = 64.0
"""Native frame intervals; an anchor from longer ago is shown as if it were this far away, as none was in training."""


def roll_out(
    model: VideoDiffusion,
    first: Latents,
    num_frames: int,
    prompts_at: Callable[[int], Sequence[str] | None],
    options: RollOut | None = None,
    *,
    keys_at: Callable[[int], Array],
    spacing: float = 1.0,
    given: bool = False,
    changes: Sequence[int] = (),
    anchor: Latents | None = None,
    anchor_age: int = 0,
    **sampling: Any,
) -> Iterator[Latents]:
    """Goes on after `first [b f h w c]`, window by window at constant memory; yields new latents `[b k h w c]`.

    num_frames: how many frames to add; the last part is cut to them. prompts_at(i): the prompts of the window whose new
    frames begin `i` frames after the first of `first`. keys_at(n): keys `[b]` of the n-th window. given: `first` is a
    real clip, to be shown without noise as long as it is the context. changes: frames, counted as `prompts_at` does, at
    which a window must begin; of the one before only the frames up to there are kept. anchor: `[b 1 h w c]`, a frame
    from `anchor_age` frames before `first`, where that is the end of a longer clip; default: the first one of `first`.
    sampling: `steps`, `guidance_scale`, ... as `VideoDiffusion.complete`.

    Raises:
        ValueError: fewer frames in `first` than the context needs.
    """
    options = options or RollOut.fitting(model.settings.num_frames, have=first.shape[1])
    if first.shape[1] < options.context:
        raise ValueError(
            f"the clip has {first.shape[1]} frame(s), a context of {options.context} is asked: give a longer clip or a "
            "smaller context"
        )
    anchor, statistics = first[:, :1] if anchor is None else anchor, first
    recent, done = first[:, -options.context :], first.shape[1]
    end, number = first.shape[1] + num_frames, 0
    real_left = options.context if given else 0  # frames of the context that are real
    while done < end:
        far = -min((done - options.context + anchor_age) * spacing, LONGEST_ANCHOR)
        line = motion.continuation(
            recent,
            options.new_frames,
            spacing,
            anchor if options.anchor else None,
            jnp.asarray([far]) if options.anchor else None,
        )
        # Each known frame at a level of its own: what was made is shown under noise, what was given is clean.
        made = jnp.arange(line.times.shape[0]) >= options.anchor + real_left
        made = made.at[0].set(not given) if options.anchor else made
        level = jnp.where(made, options.context_logsnr, CLEAN_LOGSNR).astype(first.dtype)  # a weak type compiles anew
        known = dataclasses.replace(line.known, logsnr=jnp.broadcast_to(level, line.known.logsnr.shape))
        window = model.complete(known, prompts_at(done), keys=keys_at(number), times=line.times, **sampling)
        new = window[:, options.anchor + options.context :]
        if options.statistics:
            new = pull_statistics(new, statistics, options.statistics)
        new = new[:, : min([options.new_frames, *(frame - done for frame in changes if frame > done)])]
        recent = jnp.concatenate([recent, new], axis=1)[:, -options.context :]
        real_left = max(0, real_left - new.shape[1])
        yield new[:, : end - done]
        done, number = done + new.shape[1], number + 1


def generate_long(
    model: VideoDiffusion,
    prompt: PromptTimes,
    num_frames: int,
    *,
    seed: int = 0,
    index: int = 0,
    size: int | tuple[int, int] | None = None,
    stride: float = 1.0,
    fps: float | None = None,
    options: RollOut | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **sampling: Any,
) -> Clip:
    """Text to a clip of any length, window by window.

    prompt: one, or {frame: prompt}, each in force from its frame on. The clip depends on (seed, index) only.
    options: see `RollOut`. progress(frames made, frames in all) after every window. The other arguments are those of
    `VideoDiffusion.generate`.

    Raises:
        ValueError: no frame asked, or settings that cannot be.
    """
    options = options or RollOut.fitting(model.settings.num_frames, prompt)
    changes = prompt_changes(prompt)
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: it must be at least 1")

    def keys_at(number: int) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), number)
        return key[None]

    shared: dict[str, Any] = dict(size=size, stride=stride, num_frames=options.window)
    first = model.generate_latents([prompt_at(prompt, 0)], keys=keys_at(0), **shared, **sampling)
    first = first[:, : min([options.window, *(max(frame, options.context) for frame in changes)])]
    frames = [model.decode(first)[0]]
    progress(min(len(frames[0]), num_frames), num_frames)
    if num_frames > len(frames[0]):
        parts = roll_out(
            model,
            first,
            num_frames - len(frames[0]),
            lambda done: [prompt_at(prompt, done)],
            options,
            keys_at=lambda number: keys_at(number + 1),
            spacing=stride,
            changes=changes,
            **sampling,
        )
        for part in parts:
            frames.append(model.decode(part)[0])
            progress(sum(map(len, frames)), num_frames)
    used = {"seed": seed, "index": index, "num_frames": num_frames, **dataclasses.asdict(options), **sampling}
    note = model.provenance(prompt=prompt if isinstance(prompt, str) else str(dict(prompt)), **used)
    return Clip(np.concatenate(frames)[:num_frames], fps or model.settings.fps / stride, note)
