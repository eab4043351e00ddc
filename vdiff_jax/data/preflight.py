"""The data of a run looked at before it begins: a sample of clips is really read, and what cannot work is refused.

`check_data` opens the source as training does. Each refusal is a ValueError of one sentence that ends with the fix;
everything else is told by the report, whose text is a small table.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from typing import Any

import numpy as np

from vdiff_jax.data.cache_build import has_latent_cache
from vdiff_jax.data.sources import SkipReport, make_source


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What training will find.

    usable: clips of the split that can be used. batches_per_epoch: `usable / batch_size`. left_out: clips that cannot.
    sampled: clips that were read; unread: those of the sample that could not be; unfinished: those not done in time.
    without_caption: clips whose only caption is empty. upscaled: clips smaller than the training size, None where the
    source does not say. clips_per_s: windows decoded in a second by `num_threads` threads. record_bytes: of a window
    as a batch holds it, in f32.
    """

    place: str
    batch_size: int
    process_count: int
    usable: int
    left_out: SkipReport
    sampled: int
    unread: SkipReport
    unfinished: int
    without_caption: int
    upscaled: int | None
    clips_per_s: float
    record_bytes: int

    @property
    def batches_per_epoch(self) -> float:
        return self.usable / self.batch_size

    @property
    def batch_bytes(self) -> int:
        """Of one process's rows."""
        return self.record_bytes * (self.batch_size // self.process_count)

    def warnings(self) -> list[str]:
        """What works, but may not be meant; a sentence each."""
        found = []
        if self.left_out.count:
            found.append(str(self.left_out))
        if self.unread.count:
            found.append(f"of {self.sampled + len(self.unread.reasons)} clips tried, {self.unread}")
        if self.unfinished:
            found.append(
                f"{self.unfinished} clips of the sample were not read in time: the storage or the clips are slow"
            )
        if self.usable < self.batch_size:
            found.append(f"a batch of {self.batch_size} shows each of the {self.usable} clips more than once")
        if self.without_caption:
            found.append(f"{self.without_caption} of {self.usable} clips have no caption and train the empty prompt")
        if self.upscaled:
            found.append(f"{self.upscaled} of {self.usable} clips are smaller than data.size and get enlarged")
        return found

    def __str__(self) -> str:
        rows = [
            ("clips", f"{self.usable} usable of {self.usable + len(self.left_out.reasons)} in {self.place}"),
            ("batches", f"{self.batches_per_epoch:.1f} of {self.batch_size} clips in an epoch"),
            ("captions", f"{self.usable - self.without_caption} of {self.usable} clips have one"),
            ("reading", f"{self.clips_per_s:.1f} clips/s, {self.sampled} tried"),
            ("memory", f"{self.batch_bytes / 2**20:.1f} MiB a batch in each of {self.process_count} processes"),
        ]
        return "\n".join([f"{name:<10}{text}" for name, text in rows] + [f"{'note':<10}{w}" for w in self.warnings()])


def check_data(
    data: Any,
    batch_size: int,
    process_count: int = 1,
    *,
    needs_captions: bool = False,
    split: str | None = None,
    digest: str | None = None,
    sample: int = 16,
    limit_s: float = 60.0,
    num_threads: int = 4,
) -> DataReport | None:
    """Look at the data of a run; None for rendered shapes, which are no files.

    data: see `sources.make_source`. Where its latent cache is not finished yet, the clips behind it are looked at.
    needs_captions: whether the model learns from words. digest: of the autoencoder in use.
    sample: clips that are read, spread over the source, by `num_threads` threads within `limit_s` seconds.
    Raises ValueError or FileNotFoundError where no training is possible: no usable clips, all too short, none of the
    sample readable, no captions at all, a batch that does not divide over the processes.
    """
    if data.source == "shapes":
        return None
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"data.batch_size={batch_size} is not a multiple of the {process_count} processes; change one of them"
        )
    if data.latent_cache and not has_latent_cache(data.latent_cache):
        data = dataclasses.replace(data, latent_cache="")
    source, place = make_source(data, split or data.split, digest), data.latent_cache or data.folder or data.source
    empty = sum(not caption for caption in source.captions())
    if needs_captions and empty >= len(source):
        raise ValueError(
            f"none of the {len(source)} clips of {place} has a caption, and the model learns from captions; write "
            "NAME.txt beside each NAME.mp4, or captions.csv, or train with model.text=none"
        )
    records, unread, unfinished, seconds = _read_sample(source, sample, limit_s, num_threads)
    if not records:
        if unfinished:
            raise ValueError(f"no clip of {place} could be read in {limit_s:.0f} s; see that its storage answers")
        raise ValueError(f"none of {len(unread.reasons)} clips of {place} that were tried can be read; {unread}")
    return DataReport(
        place=str(place),
        batch_size=batch_size,
        process_count=process_count,
        usable=len(source),
        left_out=getattr(source, "skipped", SkipReport()),
        sampled=len(records),
        unread=unread,
        unfinished=unfinished,
        without_caption=min(empty, len(source)),
        upscaled=_upscaled(source, data.size),
        clips_per_s=len(records) / max(seconds, 1e-9),
        record_bytes=4 * max((r["moments"] if "moments" in r else r["frames"]).size for r in records),
    )


def _read_sample(
    source: Any, sample: int, limit_s: float, num_threads: int
) -> tuple[list[dict[str, Any]], SkipReport, int, float]:
    """Records read, clips that cannot be, the number of those not done in time, and seconds."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int)).tolist()
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for index in chosen:
        waiting.put(index)

    def work() -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put((index, source.read(index, np.random.default_rng([index])), ""))
            except Exception as error:  # whatever it is, it is told
                answers.put((index, None, str(error) or type(error).__name__))

    began = time.perf_counter()
    for _ in range(num_threads):  # daemons: a thread that hangs in a decoder must not hold up the end of the program
        threading.Thread(target=work, daemon=True).start()
    records, unread, missing = [], SkipReport(), len(chosen)
    while missing:
        try:
            left_s = began + limit_s - time.perf_counter()
            index, record, reason = answers.get(timeout=max(left_s, 0.0))
        except queue.Empty:
            break
        missing -= 1
        if record is None:
            unread.add(source.name(index) if hasattr(source, "name") else f"clip {index}", reason)
        else:
            records.append(record)
    return records, unread, missing, time.perf_counter() - began


def _upscaled(source: Any, size: int | tuple[int, int]) -> int | None:
    if not hasattr(source, "frame_size"):
        return None
    height, width = (size, size) if isinstance(size, int) else size
    sizes = [source.frame_size(index) for index in range(len(source))]
    return sum(h < height or w < width for h, w in sizes)
