"""Endless training batches of the shapes world: scenes and prompts on the host, pixels on the device.

`batch_at(step)` is a pure function of (seed, step), so the step is the whole data position, and each process draws
only its own rows. Time stamps carry the strides and anchors of the training mixture: a stride of 2 shows every second
native frame; an anchor puts one frame from far before the window at index 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vdiff_jax.data.shapes import Records, ShapesWorld, captions, draw_records, select, split_rng

EncodePrompts = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ShapesStream:
    """`stream.batch_at(step)` -> raw batch; `stream.starting_at(step)` -> an iterator.

    world: what clips contain; its `num_frames` defines the speeds. num_frames: frames in a training window.
    strides, stride_weights: distances between frames in native intervals, and how often each is drawn.
    anchor_rate: share of clips whose frame 0 is an anchor, `anchor_range` intervals before the window.
    num_scenes, scenes_seed: with num_scenes above 0, all windows are of these scenes, which depend on scenes_seed
    only and come with their one complete caption; 0 = new scenes and paraphrases without end.
    encode_prompts: captions -> (tokens [b n] i32, token_mask [b n] bool); None leaves prompts out.
    """

    world: ShapesWorld
    batch_size: int
    num_frames: int
    encode_prompts: EncodePrompts | None = None
    seed: int = 0
    split: str = "train"
    strides: tuple[int, ...] = (1, 2, 4)
    stride_weights: tuple[float, ...] = (0.7, 0.2, 0.1)
    anchor_rate: float = 0.0
    anchor_range: tuple[float, float] = (8.0, 64.0)
    num_scenes: int = 0
    scenes_seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def batch_at(self, step: int) -> dict[str, Any]:
        """Raw batch: `records` (see `shapes.draw_records`), `times [b f]`, `anchor [b]`, `tokens`, `token_mask`."""
        rng = split_rng(self.split, self.seed, step)
        times, anchor = self._times(rng)
        if self.num_scenes:
            scenes = select(self.fixed_scenes(), rng.integers(self.num_scenes, size=self.batch_size))
        else:
            scenes = draw_records(rng, self.world, self.split, self.batch_size, span=self.world.num_frames - 1)
        length = self.batch_size // self.process_count
        rows = slice(self.process_index * length, (self.process_index + 1) * length)
        batch: dict[str, Any] = {"records": select(scenes, rows), "times": times[rows], "anchor": anchor[rows]}
        if self.encode_prompts is not None:
            tokens, token_mask = self.encode_prompts(captions(scenes, None if self.num_scenes else rng))
            batch |= {"tokens": tokens[rows], "token_mask": token_mask[rows]}
        return batch

    def fixed_scenes(self) -> Records:
        """The `num_scenes` scenes that all windows are of."""
        return draw_records(split_rng(self.split, self.scenes_seed), self.world, self.split, self.num_scenes)

    def starting_at(self, step: int) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch_at(step)
            step += 1

    def _times(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        weights = np.asarray(self.stride_weights) / np.sum(self.stride_weights)
        stride = rng.choice(np.asarray(self.strides), size=(self.batch_size, 1), p=weights)
        window = stride * (self.num_frames - 1)
        # Windows start anywhere in the native clip that they fit in, so that scenes stay in the picture.
        start = np.floor(rng.random((self.batch_size, 1)) * np.maximum(self.world.num_frames - window, 1))
        times = (start + stride * np.arange(self.num_frames)[None]).astype(np.float32)
        anchor = rng.random(self.batch_size) < self.anchor_rate
        if self.num_frames > 1:
            far = times[:, 0] - rng.uniform(*self.anchor_range, self.batch_size).astype(np.float32)
            times[:, 0] = np.where(anchor, far, times[:, 0])
        return times, anchor & (self.num_frames > 1)
