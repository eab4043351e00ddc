"""Records to batches: the order and every draw are a pure function of (seed, step), so a run resumes from its step.

Row r of step s on process i of k has the position  p = s * batch_size + i * batch_size / k + r  in an endless stream:
the processes' rows, one after the other, are the batch that one process would read. Position p belongs to epoch p // n
and shows the clip of place p % n in that epoch's own permutation of the n clips; its window and augmentation come from
an rng of (seed, p). Hence no batch depends on calls before it, on worker processes or threads,
and the processes' shards are disjoint and cover each epoch exactly.

Batches are `types.Batch` in numpy, this process's rows only.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from vdiff_jax.data.sources import Record, SkipReport
from vdiff_jax.data.transforms import to_video

Augment: TypeAlias = Callable[[Record, np.random.Generator], Record]
EncodePrompts: TypeAlias = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
Arrays: TypeAlias = dict[str, np.ndarray]
_MOST_TRIES = 100  # so many unreadable clips in a row mean that something else is wrong


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """`arrays`: the batch. The rest stays on the host: captions and names of the rows, skipped (name, reason)."""

    arrays: Arrays
    captions: list[str]
    names: list[str]
    skipped: list[tuple[str, str]]


@functools.lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, u32 [n]: 4 bytes a clip, where grain's shuffle without memory is slow for few clips."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(n, dtype=np.uint32))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """step -> one local batch, as a dictionary. Picklable: worker processes get a copy."""

    source: Any
    encode_prompts: EncodePrompts | None
    batch_size: int
    seed: int
    process_index: int
    process_count: int
    augment: Augment | None
    shuffle: bool

    @property
    def rows(self) -> int:
        return self.batch_size // self.process_count

    def __call__(self, step: int) -> dict[str, Any]:
        first = int(step) * self.batch_size + self.process_index * self.rows
        records, skipped = [], []
        for position in range(first, first + self.rows):
            records.append(self._read(position, skipped))
        captions = [str(record.get("caption", "")) for record in records]
        return {
            "arrays": self._stack(records, captions),
            "captions": captions,
            "names": [str(record.get("name", "")) for record in records],
            "skipped": skipped,
        }

    def _read(self, position: int, skipped: list[tuple[str, str]]) -> Record:
        """The record at a position, or the next readable one after its clip."""
        n = len(self.source)
        wanted = int(_permutation(n, self.seed, position // n)[position % n]) if self.shuffle else position % n
        tries = min(n, _MOST_TRIES)
        for index in range(wanted, wanted + tries):
            rng = np.random.default_rng([self.seed, position])
            try:
                record = self.source.read(index % n, rng)
            except (OSError, ValueError) as error:
                name = self.source.name(index % n) if hasattr(self.source, "name") else f"clip {index % n}"
                skipped.append((name, str(error)))
                continue
            return self.augment(record, rng) if self.augment else record
        raise ValueError(f"none of {tries} clips in a row can be read; the first says: {skipped[-tries][1]}")

    def _stack(self, records: list[Record], captions: list[str]) -> Arrays:
        key = "moments" if "moments" in records[0] else "frames"
        shapes = sorted({record[key].shape for record in records})
        if len(shapes) > 1:
            raise ValueError(
                f"clips of one batch differ in shape, {shapes[0]} and {shapes[-1]}; give the source a size"
            )
        stacked = np.stack([record[key] for record in records])
        arrays = (
            {"moments": stacked.astype(np.float32, copy=False)} if key == "moments" else {"video": to_video(stacked)}
        )
        frames = np.arange(stacked.shape[1], dtype=np.float32)
        arrays["times"] = np.stack([np.asarray(record.get("times", frames), np.float32) for record in records])
        arrays["anchor"] = np.asarray([bool(record.get("anchor", False)) for record in records])
        if "valid" in records[0]:
            arrays["valid"] = np.stack([record["valid"] for record in records])
        if self.encode_prompts is not None:
            arrays["tokens"], arrays["token_mask"] = self.encode_prompts(captions)
        return arrays


class Loader:
    """Endless batches of a source; `batch_at(step)` for one, `starting_at(step)` for a prefetched stream.

    batch_size: rows of the global batch, over all processes; larger than the source is fine (clips repeat).
    encode_prompts: captions -> (tokens i32 [b n], token_mask bool [b n]), such as
        `partial(tokenizer.encode, context_length=32)`; None leaves them out.
    augment: `(record, rng) -> record` on u8 frames, for example `transforms.random_flip`.
    num_workers: decoding processes; 0 reads with `num_threads` threads, which is faster for most small clips.
    prefetch, prefetch_bytes: batches read ahead, by number and by memory, whichever is less (but one at least). With
        worker processes each of them holds up to twice `prefetch` batches; `prefetch_bytes` is for all together.
    `skipped` counts clips that could not be read during training and were replaced by the next readable one.
    Raises ValueError for an empty source or sizes that do not divide.
    """

    def __init__(
        self,
        source: Any,
        encode_prompts: EncodePrompts | None,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        augment: Augment | None = None,
        num_workers: int = 0,
        num_threads: int = 4,
        prefetch: int = 4,
        shuffle: bool = True,
        prefetch_bytes: int = 2 << 30,
    ):
        if not len(source):
            raise ValueError("the source has no clips, so there are 0 batches; give it at least one")
        if batch_size < 1 or process_count < 1 or batch_size % process_count or not 0 <= process_index < process_count:
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of the {process_count} processes "
                f"(this one is number {process_index})"
            )
        self._reader = _Reader(source, encode_prompts, batch_size, seed, process_index, process_count, augment, shuffle)
        self.batch_size, self.num_workers, self.num_threads, self.prefetch = (
            batch_size,
            num_workers,
            num_threads,
            prefetch,
        )
        self.prefetch_bytes, self.skipped = prefetch_bytes, SkipReport()

    @functools.cached_property
    def batch_bytes(self) -> int:
        """Bytes of this process's rows of a batch, by the first record that can be read."""
        record = self._reader._read(self._reader.process_index, [])
        return 4 * (record["moments"] if "moments" in record else record["frames"]).size * self._reader.rows

    @property
    def ahead(self) -> int:
        """Batches that are read ahead, by each worker process where there are any."""
        readers = 2 * self.num_workers or 1
        return max(1, min(self.prefetch, self.prefetch_bytes // (readers * self.batch_bytes)))

    @property
    def steps_per_epoch(self) -> float:
        return len(self._reader.source) / self.batch_size

    def batch_at(self, step: int) -> Arrays:
        """The batch of a step, read now."""
        return self.host_batch_at(step).arrays

    def host_batch_at(self, step: int) -> HostBatch:
        """The batch of a step with its captions and names, read now."""
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        return self._report(self._reader(step))

    def starting_at(self, step: int = 0) -> Iterator[Arrays]:
        """Batches step, step + 1, ... without end, read ahead by threads or worker processes."""
        for batch in self.host_batches(step):
            yield batch.arrays

    def host_batches(self, step: int = 0) -> Iterator[HostBatch]:
        """As `starting_at`, with captions and names."""
        import grain
        from absl import flags

        steps = grain.MapDataset.range(step, sys.maxsize).map(self._reader)
        ahead = self.ahead
        read = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=ahead)
        batches = steps.to_iter_dataset(read)
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS(sys.argv[:1])  # the worker processes are started with our flags
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=ahead)
            batches = batches.mp_prefetch(options)
        iterator = iter(batches)
        try:
            for batch in iterator:
                yield self._report(batch)
        finally:
            iterator.close()

    def __iter__(self) -> Iterator[Arrays]:
        return self.starting_at(0)

    def _report(self, batch: dict[str, Any]) -> HostBatch:
        for name, reason in batch["skipped"]:
            if name not in self.skipped.reasons:
                logging.warning("skipped a clip: %s", reason)
            self.skipped.add(name, reason)
        # Copies: arrays from worker processes live in shared memory that their owner frees.
        arrays = {key: np.array(value) if self.num_workers else value for key, value in batch["arrays"].items()}
        return HostBatch(arrays, batch["captions"], batch["names"], batch["skipped"])
