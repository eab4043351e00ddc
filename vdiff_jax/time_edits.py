"""Edits of time: slow motion, transitions, loops, ends to a clip, the future, and clips of any length."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax import rollout
from vdiff_jax.data.effects import concatenate, resize, set_fps
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing import motion
from vdiff_jax.rollout import PromptTimes, RollOut, prompt_at, prompt_changes
from vdiff_jax.sampling.job import known_frames
from vdiff_jax.sampling.windows import CONTEXT_LOGSNR, window_slices
from vdiff_jax.session import Session, unguided
from vdiff_jax.types import Known


class TimeEdits(Session):
    """Edits that make new frames before, between or after those of the clip."""

    def interpolate(self, factor: int = 2, prompt: str = "", *, seed: int = 0, **sampling: Any) -> Clip:
        """Slow motion: `factor` times as many frames at the same rate; the clip's own frames stay, bit for bit.

        The clip's frames lie `stride` native intervals apart (see `Session`): of a clip that shows every fourth frame
        of natural motion, stride 4 and factor 4 make the motion natural again. sampling: `steps`, ...

        Raises:
            ValueError: a factor below 2, or a clip of one frame.
        """
        count = (self.clip.num_frames - 1) * factor + 1
        motion.spread(jnp.zeros((1, self.clip.num_frames, 1, 1, 1)), factor)  # refuses before any work
        # Windows begin and end on given frames, so neighbours share one and need no other context.
        given = max(2, (self.window - 1) // factor + 1)
        made = np.zeros((1, count, *self.latents.shape[2:]), np.float32)
        for number, window in enumerate(window_slices(self.clip.num_frames, given, 1)):
            line = motion.spread(jnp.asarray(self.latents[:, window.start : window.stop]), factor, self.stride)
            part = self.model.complete(
                line.known, [prompt], keys=self.keys(seed, number), times=line.times, **unguided(prompt, sampling)
            )
            made[:, window.start * factor : (window.stop - 1) * factor + 1] = np.asarray(part)
        sound = self.clip.sound.change_speed(1 / factor) if self.clip.sound else None
        note = {"task": "interpolate", "factor": factor, "prompt": prompt or None, "seed": seed, **sampling}
        # What stands still is as sharp in the new frames as in the given ones, or it would flicker between them.
        nearest = (np.arange(count) + factor // 2) // factor
        clip = self.finish(self.decode(made), note, keep_detail=True, source=nearest, sound=sound)
        frames = clip.frames.copy()
        frames[::factor] = self.clip.frames
        return dataclasses.replace(clip, frames=frames)

    def join(
        self, other: Clip, num_frames: int = 8, prompt: str = "", *, context: int = 3, seed: int = 0, **sampling: Any
    ) -> Clip:
        """This clip, `num_frames` new frames, and the other clip: a transition that goes on with both motions.

        The other clip is brought to this one's size and rate. context: frames of either that the transition knows.
        """
        _check_context(context)
        after = self.on(_like(other, self.clip))
        middle = self._between(
            self.latents[:, -context:], after.latents[:, :context], num_frames, prompt, seed, sampling
        )
        note = {"task": "join", "num_frames": num_frames, "prompt": prompt or None, "seed": seed, **sampling}
        bridge = self.finish(middle, note, sound=None)
        joined = concatenate([self.clip, bridge, after.clip])
        return dataclasses.replace(joined, metadata=bridge.metadata)

    def loop(self, num_frames: int = 8, prompt: str = "", *, context: int = 3, seed: int = 0, **sampling: Any) -> Clip:
        """The clip and `num_frames` new frames that lead from its end back to its beginning."""
        _check_context(context)
        head, tail = self.latents[:, -context:], self.latents[:, :context]
        middle = self._between(head, tail, num_frames, prompt, seed, sampling)
        note = {"task": "loop", "num_frames": num_frames, "prompt": prompt or None, "seed": seed, **sampling}
        bridge = self.finish(middle, note, sound=None)
        return dataclasses.replace(concatenate([self.clip, bridge]), metadata=bridge.metadata)

    def _between(self, head, tail, num_frames: int, prompt: str, seed: int, sampling: dict[str, Any]) -> np.ndarray:
        line = motion.bridge(jnp.asarray(head), jnp.asarray(tail), num_frames, self.stride)
        made = self._complete(line, prompt, seed, sampling)
        return self.decode(made[:, head.shape[1] : head.shape[1] + num_frames])

    def _complete(self, line: motion.Timeline, prompt: str, seed: int, sampling: dict[str, Any]) -> np.ndarray:
        """All frames of a time line, latents `[1 f h w c]`.

        A line longer than the window is made coarse to fine: frames spread over every long gap first, so that its ends
        know of each other, then those between, window by window.
        """
        known, count = line.known, line.times.shape[0]
        given = np.asarray(known.mask[0, :, 0, 0, 0]) > 0.5
        windows = window_slices(count, self.window, self.overlap)
        passes = [*motion.waypoints(given, self.window, self.overlap), *(np.arange(w.start, w.stop) for w in windows)]
        for number, frames in enumerate(passes):
            part = jax.tree.map(lambda leaf: leaf[:, frames], known)  # noqa: B023
            if part.mask.min() > 0.5:  # the last window may hold given frames alone
                continue
            times = line.times[frames] - line.times[frames[0]]
            made = self.model.complete(
                part, [prompt], keys=self.keys(seed, number), times=times, **unguided(prompt, sampling)
            )
            level = jnp.where(part.mask[:, :, 0, 0, 0] > 0.5, part.logsnr, CONTEXT_LOGSNR)
            known = Known(
                latents=known.latents.at[:, frames].set(made),
                mask=known.mask.at[:, frames].set(1.0),
                logsnr=known.logsnr.at[:, frames].set(level),
            )
        return np.asarray(known.latents)

    def from_ends(
        self, num_frames: int, prompt: str = "", *, last: bool | None = None, seed: int = 0, **sampling: Any
    ) -> Clip:
        """A clip of `num_frames` from its first frame, or its first and its last: those of this clip.

        last: whether the clip's last frame is given too; default: if it has more than one.
        """
        last = self.clip.num_frames > 1 if last is None else last
        ends = [0, num_frames - 1] if last else [0]
        if num_frames < len(ends) + 1:
            raise ValueError(f"num_frames={num_frames}: beside {len(ends)} given frame(s) at least 1 must be made")
        latents = np.zeros((1, num_frames, *self.latents.shape[2:]), np.float32)
        latents[:, 0] = self.latents[:, 0]
        if last:
            latents[:, -1] = self.latents[:, -1]
        known = known_frames(jnp.asarray(latents), ends)
        times = self.stride * jnp.arange(num_frames, dtype=jnp.float32)
        made = self._complete(motion.Timeline(known, times), prompt, seed, sampling)
        note = {"task": "from_ends", "num_frames": num_frames, "prompt": prompt or None, "seed": seed, **sampling}
        clip = self.finish(self.decode(made), note, sound=None)
        frames = clip.frames.copy()
        frames[0] = self.clip.frames[0]
        if last:
            frames[-1] = self.clip.frames[-1]
        return dataclasses.replace(clip, frames=frames)

    def extend(
        self,
        num_frames: int,
        prompt: PromptTimes = "",
        *,
        seed: int = 0,
        options: RollOut | None = None,
        **sampling: Any,
    ) -> Clip:
        """The clip and what may come next, `num_frames` in all; any length, at constant memory.

        prompt: one, or {frame: prompt}, each in force from its frame of the result on. options: see `RollOut`.

        Raises:
            ValueError: fewer frames than the clip has, or a clip shorter than the context.
        """
        have = self.clip.num_frames
        if num_frames <= have:
            raise ValueError(f"num_frames={num_frames}: the clip has {have} already, ask for more")
        options = options or RollOut.fitting(self.window, prompt, have)
        before = have - min(have, self.window)  # frames of the clip that no window sees
        words = prompt if isinstance(prompt, str) else " ".join(prompt.values())
        parts = rollout.roll_out(
            self.model,
            jnp.asarray(self.latents[:, -self.window :]),
            num_frames - have,
            lambda done: [prompt_at(prompt, done + before)],
            options,
            keys_at=lambda number: self.keys(seed, number),
            spacing=self.stride,
            given=True,
            changes=[frame - before for frame in prompt_changes(prompt)],
            anchor=jnp.asarray(self.latents[:, :1]),
            anchor_age=before,
            **unguided(words.strip(), sampling),
        )
        new = self.decode(np.concatenate([np.asarray(part) for part in parts], axis=1))
        told = prompt if isinstance(prompt, str) else {str(frame): text for frame, text in sorted(prompt.items())}
        note = {"task": "extend", "num_frames": num_frames, "prompt": told or None, "seed": seed, **sampling}
        clip = self.finish(new, note)
        return dataclasses.replace(clip, frames=np.concatenate([self.clip.frames, clip.frames]))


def _check_context(context: int) -> None:
    if context < 1:
        raise ValueError(f"context={context}: a transition must know at least 1 frame of either side")


def _like(clip: Clip, other: Clip) -> Clip:
    """`clip` at the size and rate of `other`."""
    height, width = other.frames.shape[1:3]
    return set_fps(resize(clip, height, width), other.fps)
