"""Batches on the device, from any source: the bridge between host data and the mesh.

A stream is a pure function of the step (`device_batch(step)`), so a resumed run continues the order exactly. The shapes
world sends attribute records and renders pixels on the device; other sources send decoded windows or cached moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vdiff_jax import parallel
from vdiff_jax.data.shapes import make_world, render, vocabulary
from vdiff_jax.data.shapes_stream import ShapesStream
from vdiff_jax.data.sources import SkipReport
from vdiff_jax.data.tokenizer import Tokenizer, train_tokenizer
from vdiff_jax.recipe import DataConfig
from vdiff_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Stream:
    """Device batches of a data source.

    host: has `starting_at(step) -> iterator` of this process's rows of raw batches; whole: the same of all rows.
    finish: raw device batch -> Batch, jitted or the identity. captions: a list of all words or captions a tokenizer is
    fitted on. example_steps: steps whose batches have between them every shape there is. left_out: clips that cannot be
    used at all; unread: clips that failed while training, filled as it goes.
    """

    host: Any
    whole: Any
    finish: Callable[[dict[str, Any]], Batch]
    captions: Callable[[], list[str]]
    example_steps: tuple[int, ...] = (0,)
    left_out: SkipReport = dataclasses.field(default_factory=SkipReport)
    unread: SkipReport = dataclasses.field(default_factory=SkipReport)

    def starting_at(self, step: int, mesh: Mesh) -> Iterator[Batch]:
        for raw in self.host.starting_at(step):
            yield self.finish(parallel.shard_batch(raw, mesh))

    def device_batch(self, step: int, mesh: Mesh | None = None) -> Batch:
        """The batch of one step, on the mesh; without one all of it on each process, for previews and measures."""
        raw = next(iter((self.whole if mesh is None else self.host).starting_at(step)))
        return self.finish(jax.tree.map(jax.numpy.asarray, raw) if mesh is None else parallel.shard_batch(raw, mesh))

    def fit_tokenizer(self, vocab_size: int = 4096) -> Tokenizer:
        """A word tokenizer over the captions of the source."""
        return train_tokenizer(self.captions(), vocab_size=vocab_size)


def make_stream(
    data: DataConfig,
    *,
    seed: int,
    tokenizer: Tokenizer | None,
    anchor_rate: float = 0.0,
    digest: str | None = None,
    split: str | None = None,
    share: tuple[int, int] = (0, 1),
) -> Stream:
    """The stream of a data configuration; without a tokenizer the batches carry no prompts.

    anchor_rate: share of windows that open with an anchor frame (`Mixture.anchor_probability`). digest: of the
    autoencoder in use, so that a latent cache of another one is refused. share: which part of the batch, of how many,
    this process brings, see `parallel.batch_share`.
    """

    def encode(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        assert tokenizer is not None
        return tokenizer.encode(captions, data.context_length)

    encode_prompts = encode if tokenizer is not None else None
    process: dict[str, Any] = dict(process_index=share[0], process_count=share[1])
    if data.source == "shapes":
        world = make_world(data.world, size=data.size, num_frames=data.world_frames, **tuples(data.world_overrides))
        host = ShapesStream(
            world,
            data.batch_size,
            data.num_frames,
            encode_prompts=encode_prompts,
            seed=seed,
            split=split or data.split,
            strides=data.strides,
            stride_weights=data.stride_weights,
            anchor_rate=anchor_rate,
            num_scenes=data.num_scenes,
            scenes_seed=data.scenes_seed,
            **process,
        )
        whole = dataclasses.replace(host, process_index=0, process_count=1)
        return Stream(host, whole, _renderer(world), lambda: vocabulary(world))
    from vdiff_jax.data.loader import Loader
    from vdiff_jax.data.sources import make_source

    if data.buckets:
        return _bucket_stream(data, encode_prompts, seed, anchor_rate, split or data.split, share)
    source = make_source(data, split or data.split, digest, anchor_rate)
    host = Loader(source, encode_prompts, data.batch_size, seed=seed, num_workers=data.num_workers, **process)
    whole = Loader(source, encode_prompts, data.batch_size, seed=seed) if share[1] > 1 else host
    left_out = getattr(source, "skipped", SkipReport())
    return Stream(host, whole, lambda batch: batch, source.captions, left_out=left_out, unread=host.skipped)


def _bucket_stream(
    data: DataConfig,
    encode_prompts: Callable[[list[str]], tuple[np.ndarray, np.ndarray]] | None,
    seed: int,
    anchor_rate: float,
    split: str,
    share: tuple[int, int],
) -> Stream:
    """Batches of one bucket at a time, see `data.buckets`."""
    from vdiff_jax.data.buckets import BucketLoader
    from vdiff_jax.data.loader import Loader
    from vdiff_jax.data.sources import make_bucket_sources

    source, parts = make_bucket_sources(data, split, anchor_rate)

    def loader(index: int, count: int) -> BucketLoader:
        shared: dict[str, Any] = dict(num_workers=data.num_workers, process_index=index, process_count=count)
        return BucketLoader(
            [
                Loader(part, encode_prompts, bucket.batch_size, seed=seed + number, **shared)
                for number, (bucket, part) in enumerate(parts)
            ],
            seed,
        )

    host = loader(*share)
    return Stream(
        host,
        loader(0, 1) if share[1] > 1 else host,
        lambda batch: batch,
        source.captions,
        tuple(host.example_steps()),
        source.skipped,
        host.skipped,
    )


def _renderer(world: Any) -> Callable[[dict[str, Any]], Batch]:
    @jax.jit
    def finish(raw: dict[str, Any]) -> Batch:
        batch = dict(raw)
        return {"video": render(batch.pop("records"), batch["times"], world), **batch}

    return finish


def tuples(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in overrides.items()}
