"""Clips of mixed lengths, sizes and shapes, images among them: a few buckets, each of one shape that is compiled once.

Every clip goes to the bucket that wastes least of it. A batch is of one bucket, and which one a step reads is a pure
function of (seed, step), as everything about the order of data: an epoch shows every bucket as often as its clips fill
batches, in an order drawn anew for each. A clip shorter than its bucket is filled up with its last frame, and `valid`
says which frames are real.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bucket:
    """num_frames, height, width: of its batches, in pixels. batch_size: clips of a batch, over all processes."""

    num_frames: int
    height: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def parse_buckets(shapes: Sequence[Sequence[int]], batch_size: int) -> tuple[Bucket, ...]:
    """`(frames, height, width)` or `(frames, height, width, batch size)` each; without, `batch_size` clips.

    Raises ValueError for other lengths, numbers below 1, or the same shape twice.
    """
    buckets = []
    for shape in shapes:
        values = tuple(shape)
        if len(values) not in (3, 4) or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"data.buckets: {shape} is no bucket; give (frames, height, width), or with a batch size as fourth"
            )
        frames, height, width, *own = values
        buckets.append(Bucket(frames, height, width, *own or [batch_size]))
    names = [str(bucket) for bucket in buckets]
    if len(set(names)) < len(names):
        raise ValueError(f"data.buckets: {max(names, key=names.count)} stands there twice; remove one")
    return tuple(buckets)


def assign(clips: Sequence[tuple[int, int, int]], buckets: Sequence[Bucket]) -> list[int]:
    """The bucket of each clip of `(frames, height, width)`.

    The one of which most stays: the share of the clip's frames and of its picture that is used, times the share of the
    bucket's frames that are real. A clip is cut to the bucket's aspect ratio, and its frames beyond the bucket's are
    used by other windows, so a clip of many windows counts as one that fits. Of equals, the one with more frames and
    pixels.
    """

    def worth(clip: tuple[int, int, int], bucket: Bucket) -> tuple[float, int, int]:
        frames, height, width = clip
        if frames > 1 and bucket.num_frames == 1:
            used = 1 / frames  # a video among images loses what moves
        else:
            used = min(frames / bucket.num_frames, 1.0)
        ratio = (width / height) / (bucket.width / bucket.height)
        picture = min(ratio, 1 / ratio)
        return used * picture, bucket.num_frames, bucket.height * bucket.width

    return [max(range(len(buckets)), key=lambda index: worth(clip, buckets[index])) for clip in clips]


@dataclasses.dataclass(frozen=True)
class BucketOrder:
    """Which bucket each step reads.

    batches: how many batches each bucket has in an epoch. `at(step)` gives (bucket, which of its batches), counted over
    all epochs.
    """

    batches: tuple[int, ...]
    seed: int = 0

    def at(self, step: int) -> tuple[int, int]:
        epoch, place = divmod(step, sum(self.batches))
        order, before = _epoch_order(self.batches, self.seed, epoch)
        bucket = int(order[place])
        return bucket, epoch * self.batches[bucket] + int(before[place])


@functools.lru_cache(maxsize=4)
def _epoch_order(batches: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of an epoch's steps, and for each step how many of its bucket came before."""
    order = np.repeat(np.arange(len(batches)), batches)
    order = np.random.default_rng([seed, epoch, len(order)]).permutation(order)
    before = np.zeros(len(order), np.int64)
    for bucket in range(len(batches)):
        mine = order == bucket
        before[mine] = np.arange(mine.sum())
    return order, before


class BucketLoader:
    """Batches of several loaders, one bucket at a time; what `Loader` is for one shape.

    loaders: one `Loader` for each bucket that has clips. Their batches hold `valid` all alike, so that a bucket is one
    compiled program.
    """

    def __init__(self, loaders: Sequence[Any], seed: int = 0):
        if not loaders:
            raise ValueError("no bucket has clips, so there are 0 batches; give at least one")
        self.loaders = tuple(loaders)
        self.order = BucketOrder(tuple(max(1, math.ceil(loader.steps_per_epoch)) for loader in loaders), seed)
        self.skipped = self.loaders[0].skipped
        for loader in self.loaders:
            loader.skipped = self.skipped

    def example_steps(self) -> list[int]:
        """The first step of each bucket: one batch of every shape there is."""
        buckets = [self.order.at(step)[0] for step in range(sum(self.order.batches))]
        return [buckets.index(bucket) for bucket in range(len(self.loaders))]

    @property
    def steps_per_epoch(self) -> float:
        return float(sum(self.order.batches))

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, read now."""
        bucket, own_step = self.order.at(step)
        return self.loaders[bucket].batch_at(own_step)

    def starting_at(self, step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches step, step + 1, ... without end, each bucket read ahead."""
        streams: dict[int, Iterator[dict[str, np.ndarray]]] = {}
        try:
            while True:
                bucket, own_step = self.order.at(step)
                if bucket not in streams:
                    streams[bucket] = self.loaders[bucket].starting_at(own_step)
                yield next(streams[bucket])
                step += 1
        finally:
            for stream in streams.values():
                stream.close()  # type: ignore[attr-defined]


def filled(record: dict[str, Any], num_frames: int) -> dict[str, Any]:
    """A record of at most `num_frames` frames brought to that many, and `valid [f]` bool.

    The last frame is repeated, and time goes on in the last step, which is what `types.Conditioning.valid` asks for.
    """
    real = len(record["frames"])
    missing = num_frames - real
    times = np.asarray(record["times"], np.float32)
    step = times[-1] - times[-2] if real > 1 else np.float32(0)
    return {
        **record,
        "frames": np.concatenate([record["frames"], np.repeat(record["frames"][-1:], missing, axis=0)]),
        "times": np.concatenate([times, times[-1] + step * np.arange(1, missing + 1, dtype=np.float32)]),
        "valid": np.arange(num_frames) < real,
    }
