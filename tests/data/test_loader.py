"""The loader's promises: batches depend on (seed, step) alone, shards are disjoint, bad clips are replaced."""

import functools
import itertools
import threading
import time

import numpy as np
import pytest

from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import FolderSource, SyntheticSource, Windows
from vdiff_jax.data.tokenizer import train_tokenizer
from vdiff_jax.data.transforms import random_flip, to_video
from vdiff_jax.data.video_io import Clip, VideoError

SOURCE = SyntheticSource(10, Windows(3, (1, 2), (0.5, 0.5), anchor_rate=0.5, anchor_range=(1, 3)), 8)
TOKENIZER = train_tokenizer(SOURCE.captions(), 32)
ENCODE = functools.partial(TOKENIZER.encode, context_length=8)


def make(batch_size=4, source=SOURCE, **options):
    return Loader(source, ENCODE, batch_size, **options)


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype, key
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def take(iterator, count):
    with_end = list(itertools.islice(iterator, count))
    iterator.close()
    return with_end


class Failing:
    """Ten clips of which some cannot be read."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 10

    def name(self, index):
        return f"clip {index}"

    def captions(self):
        return [""]

    def read(self, index, rng):
        if index in self.bad:
            raise VideoError(f"{self.name(index)} is damaged; make it again")
        return {"frames": np.full((1, 2, 2, 3), index, np.uint8), "caption": "", "name": self.name(index)}


def test_what_a_batch_holds():
    batch = make().host_batch_at(3)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.arrays.items()}
    assert shapes == {
        "video": ((4, 3, 8, 8, 3), "float32"),
        "tokens": ((4, 8), "int32"),
        "token_mask": ((4, 8), "bool"),
        "times": ((4, 3), "float32"),
        "anchor": ((4,), "bool"),
    }
    assert -1 <= batch.arrays["video"].min() < batch.arrays["video"].max() <= 1
    assert TOKENIZER.decode(batch.arrays["tokens"]) == batch.captions
    for row, name in enumerate(batch.names):  # caption, clip and pixels belong together
        index = int(name.split()[-1])
        assert batch.captions[row] == SOURCE.captions()[index % 4]
    assert "tokens" not in Loader(SOURCE, None, 2).batch_at(0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_any_step_is_bitwise_equal(num_workers):
    reference = [make(augment=random_flip).batch_at(step) for step in range(7)]
    loader = make(augment=random_flip, num_workers=num_workers)
    for start in (0, 4):
        for step, batch in enumerate(take(loader.starting_at(start), 3), start):
            assert_equal(batch, reference[step])


def test_calls_before_do_not_matter():
    loader = make()
    later = loader.batch_at(5)
    loader.batch_at(1)
    assert_equal(loader.batch_at(5), later)
    assert_equal(make().batch_at(5), later)


def test_seed_and_step_change_the_batch():
    videos = [make(seed=seed).batch_at(step)["video"].tobytes() for seed in (0, 1) for step in (0, 1, 5)]
    assert len(set(videos)) == 6


def names(loader, steps):
    return [name for step in range(steps) for name in loader.host_batch_at(step).names]


def test_every_epoch_is_a_new_permutation():
    loader = make(batch_size=5)
    assert loader.steps_per_epoch == 2
    epochs = np.array(names(loader, 6)).reshape(3, 10)
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert names(make(batch_size=5, shuffle=False), 2) == [f"synthetic {i}" for i in range(10)]


def test_windows_change_from_epoch_to_epoch():
    loader = Loader(SyntheticSource(1, Windows(3), 8), None, 1)
    assert len({loader.batch_at(step)["video"].tobytes() for step in range(8)}) > 2


def test_two_processes_cover_an_epoch_disjointly():
    parts = [make(batch_size=2, process_index=i, process_count=2) for i in range(2)]
    seen = [names(part, 5) for part in parts]
    assert len(seen[0]) == len(seen[1]) == 5 and not set(seen[0]) & set(seen[1])
    assert set(seen[0]) | set(seen[1]) == {f"synthetic {i}" for i in range(10)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_epoch_shows_each_clip_once_whatever_the_number_of_processes(count):
    source = SyntheticSource(12, Windows(2), 4)
    parts = [Loader(source, None, 4, seed=3, process_index=i, process_count=count) for i in range(count)]
    for epoch in range(2):
        seen = [name for part in parts for step in range(3) for name in part.host_batch_at(3 * epoch + step).names]
        assert len(seen) == 12 and set(seen) == {f"synthetic {i}" for i in range(12)}


@pytest.mark.parametrize("counts", [(1, 2, 4), (4, 1, 2), (2, 4, 4)])
def test_the_number_of_processes_may_change_at_any_step(counts):
    """Epochs of 13 clips in batches of 4: each step run by another number of processes, nothing repeats or is lost."""
    source, seen = SyntheticSource(13, Windows(2), 4), []
    for step in range(13):
        count = counts[step % len(counts)]
        parts = [Loader(source, None, 4, seed=3, process_index=i, process_count=count) for i in range(count)]
        batches = [part.host_batches(step) for part in parts]
        rows = [next(batch).names for batch in batches]
        for batch in batches:
            batch.close()
        seen += [name for row in rows for name in row]
    alone = Loader(source, None, 4, seed=3)
    assert seen == names(alone, 13)
    for epoch in range(4):
        assert len(set(seen[13 * epoch : 13 * (epoch + 1)])) == 13


def test_what_is_read_ahead_is_bounded_by_memory_too():
    source = SyntheticSource(8, Windows(4), 16)
    bytes_of_a_batch = 4 * 4 * 16 * 16 * 3 * 4
    for limit, workers, ahead in (
        (1 << 30, 0, 4),
        (3 * bytes_of_a_batch, 0, 3),
        (1, 0, 1),
        (12 * bytes_of_a_batch, 2, 3),
    ):
        loader = Loader(source, None, 4, num_workers=workers, prefetch_bytes=limit)
        assert loader.batch_bytes == loader.batch_at(0)["video"].nbytes == bytes_of_a_batch
        assert loader.ahead == ahead
    counted = Counted(source)
    loader = Loader(counted, None, 4, prefetch_bytes=2 * bytes_of_a_batch)
    batches = loader.host_batches()
    for _ in range(3):
        next(batches)
    time.sleep(0.3)  # time enough to run ahead
    assert counted.reads <= 1 + 4 * (3 + 2)
    batches.close()


class Counted:
    """Another source that counts what is read of it."""

    def __init__(self, source):
        self.source, self.reads, self.lock = source, 0, threading.Lock()

    def __len__(self):
        return len(self.source)

    def read(self, index, rng):
        with self.lock:
            self.reads += 1
        return self.source.read(index, rng)


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    whole = make(batch_size=4).batch_at(3)
    for i in range(2):
        part = make(batch_size=4, process_index=i, process_count=2).batch_at(3)
        assert_equal(part, {key: value[2 * i : 2 * i + 2] for key, value in whole.items()})


def test_a_batch_larger_than_the_source():
    batch = make(batch_size=23).host_batch_at(0)
    assert len(batch.names) == 23 and len(set(batch.names)) == 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_clips_are_replaced_counted_and_named(num_workers):
    loader = Loader(Failing({3, 4}), None, 10, shuffle=False, num_workers=num_workers)
    (batch,) = take(loader.host_batches(), 1)
    assert batch.names == [f"clip {i}" for i in (0, 1, 2, 5, 5, 5, 6, 7, 8, 9)]
    levels = np.asarray([0, 1, 2, 5, 5, 5, 6, 7, 8, 9], np.uint8)
    np.testing.assert_array_equal(batch.arrays["video"][:, 0, 0, 0, 0], to_video(levels))
    assert loader.skipped.reasons == {f"clip {i}": f"clip {i} is damaged; make it again" for i in (3, 4)}
    assert loader.skipped.count == 3 and "2 clips were skipped (3 times)" in str(loader.skipped)


def test_a_file_that_breaks_during_training(tmp_path):
    for i in range(3):
        Clip(np.full((4, 8, 8, 3), 60 * i, np.uint8), 8.0).save(tmp_path / f"{i}.gif")
    source = FolderSource(tmp_path, Windows(2), 8)
    (tmp_path / "1.gif").write_bytes(b"GIF8 broken")
    loader = Loader(source, None, 3, shuffle=False)
    assert loader.host_batch_at(0).names == ["0.gif", "2.gif", "2.gif"]
    assert list(loader.skipped.reasons) == ["1.gif"]


def _broken_augment(record, rng):
    raise ValueError("a fault of the augmentation")


def test_errors_are_one_sentence():
    for options, match in (
        ({"batch_size": 3, "process_count": 2}, "multiple of the 2 processes"),
        ({"batch_size": 0}, "positive multiple"),
        ({"process_index": 2, "process_count": 2}, "number 2"),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options)

    class Empty(Failing):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="0 batches"):
        Loader(Empty(()), None, 1)
    with pytest.raises(ValueError, match=r"none of 10 clips in a row can be read; the first says: clip \d is damaged"):
        Loader(Failing(range(10)), None, 1).batch_at(0)
    with pytest.raises(ValueError, match="a fault of the augmentation"):  # is not taken for an unreadable clip
        Loader(Failing(()), None, 1, augment=_broken_augment).batch_at(0)
    with pytest.raises(ValueError, match="step must be"):
        make().batch_at(-1)

    class Mixed(Failing):
        def read(self, index, rng):
            return {"frames": np.zeros((1, 2 + index % 2, 2, 3), np.uint8)}

    with pytest.raises(ValueError, match="differ in shape"):
        Loader(Mixed(()), None, 10).batch_at(0)
