"""Buckets: where clips go, which bucket a step reads, and what fills a clip up."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vdiff_jax.data.buckets import Bucket, BucketLoader, BucketOrder, assign, filled, parse_buckets
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import SyntheticSource, Windows
from vdiff_jax.data.video_io import Clip
from vdiff_jax.recipe import DataConfig, checked_data
from vdiff_jax.streams import make_stream

BUCKETS = parse_buckets([(8, 32, 32), (4, 32, 48), (1, 64, 64, 6), (4, 48, 32)], 4)


def test_buckets_are_read_from_the_recipe():
    assert BUCKETS[0] == Bucket(8, 32, 32, 4) and BUCKETS[2].batch_size == 6 and str(BUCKETS[1]) == "4x32x48"
    for wrong, message in {
        ((8, 32),): "is no bucket",
        ((8, 0, 32),): "is no bucket",
        ((8, 32.0, 32),): "is no bucket",
        ((8, 32, 32), (8, 32, 32, 2)): "8x32x32 stands there twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_buckets(wrong, 4)


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        ((90, 100, 100), 0),  # long and square
        ((90, 100, 150), 1),  # wide
        ((90, 150, 100), 3),  # high
        ((4, 100, 100), 1),  # half the frames of the square one would be filler; the first of two that lose a third
        ((1, 100, 100), 2),  # an image
        ((2, 100, 150), 1),  # two frames are a video
    ],
)
def test_a_clip_goes_where_most_of_it_stays(clip, bucket):
    assert assign([clip], BUCKETS) == [bucket]


def test_an_epoch_shows_each_bucket_as_often_as_it_has_batches():
    order = BucketOrder((5, 1, 3), seed=7)
    steps = [order.at(step) for step in range(27)]
    for epoch in range(3):
        assert Counter(bucket for bucket, _ in steps[9 * epoch : 9 * epoch + 9]) == {0: 5, 1: 1, 2: 3}
    for bucket in range(3):  # nothing is repeated, nothing left out
        own = [number for which, number in steps if which == bucket]
        assert own == list(range(len(own)))
    assert [b for b, _ in steps[:9]] != [b for b, _ in steps[9:18]]
    assert steps != [BucketOrder((5, 1, 3), seed=8).at(step) for step in range(27)]


def loader(num_frames, size, clips, batch_size):
    return Loader(SyntheticSource(clips, Windows(num_frames), size), None, batch_size)


def test_a_resumed_run_reads_the_batches_that_follow():
    def make():
        return BucketLoader([loader(4, 8, 6, 2), loader(1, 16, 5, 2)], seed=3)

    whole = list(itertools.islice(make().starting_at(0), 14))
    assert {batch["video"].shape for batch in whole} == {(2, 4, 8, 8, 3), (2, 1, 16, 16, 3)}
    assert make().steps_per_epoch == 6  # three, and two and a half
    for start in (1, 5, 9):
        for step, batch in enumerate(itertools.islice(make().starting_at(start), 4), start):
            np.testing.assert_array_equal(batch["video"], whole[step]["video"])
            np.testing.assert_array_equal(make().batch_at(step)["video"], batch["video"])


def test_a_short_clip_is_filled_up_with_its_last_frame():
    frames = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    record = filled({"frames": frames, "times": np.array([0, 2, 4], np.float32), "caption": "a"}, 5)
    np.testing.assert_array_equal(record["times"], [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(record["valid"], [True, True, True, False, False])
    np.testing.assert_array_equal(record["frames"][2:], np.stack([frames[2]] * 3))
    assert record["caption"] == "a"
    image = filled({"frames": frames[:1], "times": np.zeros(1, np.float32)}, 3)
    np.testing.assert_array_equal(image["times"], [0, 0, 0])
    whole = filled({"frames": frames, "times": np.array([0, 2, 4], np.float32)}, 3)
    assert whole["valid"].all() and len(whole["frames"]) == 3


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """Three long square clips, two wide short ones, three images."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for index in range(3):
        Clip(rng.integers(0, 256, (9, 32, 32, 3), np.uint8), 8.0).save(folder / f"long{index}.gif")
    for index in range(2):
        Clip(rng.integers(0, 256, (3, 32, 48, 3), np.uint8), 8.0).save(folder / f"wide{index}.gif")
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"still{index}.png")
    return folder


def mixed_data(folder, **changes):
    shapes = ((8, 32, 32), (4, 32, 48), (1, 64, 64, 3))
    settings = dict(source="folder", folder=str(folder), split="all", size=32, batch_size=2, buckets=shapes)
    return checked_data(DataConfig(**{**settings, "strides": (1,), "stride_weights": (1.0,), **changes}))


def test_a_folder_of_clips_and_images_is_read_in_few_shapes(mixed_folder):
    stream = make_stream(mixed_data(mixed_folder), seed=0, tokenizer=None)
    shapes = Counter()
    for batch in itertools.islice(stream.host.starting_at(0), 8):
        shapes[batch["video"].shape] += 1
        wide = batch["video"].shape[1] == 4
        assert batch["valid"].sum(1).tolist() == [3, 3] if wide else batch["valid"].all()
        assert batch["times"].shape == batch["valid"].shape
    # Two batches of three long clips, one of two wide ones, one of three images: four steps an epoch.
    assert shapes == {(2, 8, 32, 32, 3): 4, (2, 4, 32, 48, 3): 2, (3, 1, 64, 64, 3): 2}
    examples = {stream.host.batch_at(step)["video"].shape for step in stream.example_steps}
    assert examples == set(shapes) and not stream.left_out.count


def test_two_processes_read_the_rows_of_one_bucket(mixed_folder):
    data = mixed_data(mixed_folder, buckets=((8, 32, 32), (1, 64, 64, 4)))
    whole = make_stream(data, seed=0, tokenizer=None)
    parts = [make_stream(data, seed=0, tokenizer=None, share=(index, 2)) for index in range(2)]
    for step in range(5):
        rows = [part.host.batch_at(step)["video"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), whole.host.batch_at(step)["video"])


@pytest.mark.parametrize("changes", [{"latent_cache": "somewhere"}, {"source": "tfds"}])
def test_buckets_are_for_folders_of_files(mixed_folder, changes):
    with pytest.raises(ValueError, match=r"data\.buckets works with data\.source='folder'"):
        mixed_data(mixed_folder, **changes)
