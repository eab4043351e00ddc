"""The latent cache against encoding by hand: equal values, resumable, atomic, and true to its autoencoder."""

import dataclasses
import json

import numpy as np
import pytest

from vdiff_jax.data.cache_build import build_latent_cache, ensure_latent_cache
from vdiff_jax.data.latent_cache import LatentCache
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import FolderSource, SyntheticSource, Windows, make_source
from vdiff_jax.data.transforms import to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.recipe import DataConfig

WINDOWS = Windows(3, anchor_rate=0.5, anchor_range=(2, 6))


class Encoder:
    """Moments of 2 x 2 blocks: their mean, and a log-variance that tells the call's shape apart from others."""

    def __init__(self, fail_after=None):
        self.shapes, self.fail_after = [], fail_after

    def __call__(self, video):
        self.shapes.append(video.shape)
        if self.fail_after is not None and len(self.shapes) > self.fail_after:
            raise KeyboardInterrupt
        b, f, h, w, _ = video.shape
        mean = video.reshape(b, f, h // 2, 2, w // 2, 2, 3).mean((3, 5))
        return np.concatenate([mean, mean**2 - 3], -1)


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("a", 12), ("b", 7), ("c", 2)):
        Clip(rng.integers(0, 256, (count, 8, 12, 3), np.uint8), 8.0).save(tmp_path / "clips" / name)
    (tmp_path / "clips" / "a.txt").write_text("first\nsecond\n")
    return FolderSource(tmp_path / "clips", Windows(1), (8, 12))


def test_cached_windows_equal_encoded_windows(source, tmp_path):
    encoder = Encoder()
    report = build_latent_cache(source, encoder, tmp_path / "cache", "abc", batch_size=5, dtype="float32")
    assert report.count == 0 and set(encoder.shapes) == {(1, 5, 8, 12, 3)} and len(encoder.shapes) == 3 + 2 + 1
    cache = LatentCache(tmp_path / "cache", WINDOWS, digest="abc")
    assert [cache.name(i) for i in range(len(cache))] == ["a", "b"] and list(cache.skipped.reasons) == ["c"]
    for seed in range(10):
        record = cache.read(0, np.random.default_rng(seed))
        numbers, times, anchor = WINDOWS.draw(12, np.random.default_rng(seed))
        whole = Encoder()(to_video(source.read_whole(0)["frames"])[None])[0]
        np.testing.assert_array_equal(record["moments"], whole[numbers])
        np.testing.assert_array_equal(record["times"], times)
        assert record["anchor"] == anchor and record["fps"] == 8.0 and record["caption"] in ("first", "second")
    assert sorted(cache.captions()) == ["", "first", "second"]


def test_half_precision_by_default_and_batches_of_moments(source, tmp_path):
    build_latent_cache(source, Encoder(), tmp_path / "cache", "abc")
    assert np.load(tmp_path / "cache" / "000000.npy").dtype == np.float16
    batch = Loader(LatentCache(tmp_path / "cache", WINDOWS), None, 4).batch_at(0)
    assert batch["moments"].shape == (4, 3, 4, 6, 6) and batch["moments"].dtype == np.float32 and "video" not in batch


def test_an_interrupted_build_goes_on(source, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_latent_cache(source, Encoder(fail_after=4), folder, "abc", batch_size=5)  # in the second clip
    with pytest.raises(FileNotFoundError, match="unfinished latent cache"):
        LatentCache(folder, WINDOWS)
    first = (folder / "000000.npy").stat().st_mtime_ns
    encoder, seen = Encoder(), []
    build_latent_cache(source, encoder, folder, "abc", batch_size=5, progress=lambda i, n: seen.append((i, n)))
    assert len(encoder.shapes) == 2 + 1 and seen == [(1, 3), (2, 3), (3, 3)]
    assert (folder / "000000.npy").stat().st_mtime_ns == first
    assert len(LatentCache(folder, WINDOWS)) == 2
    again = Encoder()
    build_latent_cache(source, again, folder, "abc", batch_size=5)
    assert not again.shapes


def test_another_autoencoder_is_refused(source, tmp_path):
    folder = tmp_path / "cache"
    build_latent_cache(source, Encoder(), folder, "abc")
    with pytest.raises(ValueError, match=r"made by the autoencoder 'abc', not by 'xyz'") as caught:
        LatentCache(folder, WINDOWS, digest="xyz")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"digest 'abc', not 'xyz'"):
        build_latent_cache(source, Encoder(), folder, "xyz")
    with pytest.raises(ValueError, match=r"dtype 'float16', not 'float32'"):
        build_latent_cache(source, Encoder(), folder, "abc", dtype="float32")


def test_other_clips_under_the_same_cache_are_refused(source, tmp_path):
    build_latent_cache(source, Encoder(), tmp_path / "cache", "abc")
    (tmp_path / "clips" / "a").rename(tmp_path / "clips" / "aa")
    moved = FolderSource(tmp_path / "clips", Windows(1), (8, 12))
    with pytest.raises(ValueError, match="holds 'a' where the source has 'aa'"):
        build_latent_cache(moved, Encoder(), tmp_path / "cache", "abc")


def test_splits(tmp_path):
    for i in range(8):
        Clip(np.full((3, 4, 4, 3), i, np.uint8), 8.0).save(tmp_path / "clips" / f"{i}.gif")
    whole = FolderSource(tmp_path / "clips", Windows(1), 4)
    build_latent_cache(whole, Encoder(), tmp_path / "whole", "abc")
    parts = [LatentCache(tmp_path / "whole", WINDOWS, split=s, holdout=0.4) for s in ("train", "heldout")]
    assert sum(map(len, parts)) == 8 and all(map(len, parts))
    for part, split in zip(parts, ("train", "heldout")):  # the same rule as for the folder itself
        direct = FolderSource(tmp_path / "clips", WINDOWS, 4, split, 0.4)
        assert [part.name(i) for i in range(len(part))] == [direct.name(i) for i in range(len(direct))]
    train = FolderSource(tmp_path / "clips", Windows(1), 4, "train", 0.4)
    build_latent_cache(train, Encoder(), tmp_path / "train", "abc")
    assert len(LatentCache(tmp_path / "train", WINDOWS, split="train", holdout=0.4)) == len(train)
    with pytest.raises(ValueError, match="made from the split 'train', not 'heldout'"):
        LatentCache(tmp_path / "train", WINDOWS, split="heldout")


def test_unreadable_clips_are_reported(source, tmp_path):
    for file in (tmp_path / "clips" / "b").glob("*.png"):
        file.write_bytes(b"\x89PNG broken")
    report = build_latent_cache(source, Encoder(), tmp_path / "cache", "abc")
    assert list(report.reasons) == ["b"]
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert [clip["name"] for clip in index["clips"]] == ["a", "c"] and index["size"] == [8, 12]


def test_wrong_places_and_values(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no latent cache"):
        build_latent_cache(source, Encoder(), tmp_path / "home", "abc")
    with pytest.raises(ValueError, match="not finite in float16"):
        build_latent_cache(source, lambda video: Encoder()(video) * 1e6, tmp_path / "cache", "abc")
    with pytest.raises(FileNotFoundError, match="no latent cache"):
        LatentCache(tmp_path / "clips", WINDOWS)
    synthetic = SyntheticSource(2, Windows(4), 4)  # no whole clips: windows are encoded
    build_latent_cache(synthetic, Encoder(), tmp_path / "windows", "abc")
    assert len(LatentCache(tmp_path / "windows", WINDOWS)) == 2


def test_a_missing_or_unfinished_cache_is_built_once_from_the_split(tmp_path):
    rng = np.random.default_rng(1)
    for index in range(18, 30):  # two of these names fall into the held-out share
        Clip(rng.integers(0, 256, (6, 8, 8, 3), np.uint8), 8.0).save(tmp_path / "clips" / f"clip{index}")
    cache = str(tmp_path / "cache")
    data = DataConfig(
        source="folder", folder=str(tmp_path / "clips"), size=8, num_frames=3, strides=(1,), stride_weights=(1.0,)
    )
    data = dataclasses.replace(data, latent_cache=cache)
    with pytest.raises(FileNotFoundError, match="latent_cache"):
        make_source(data, "train")
    with pytest.raises(KeyboardInterrupt):
        ensure_latent_cache(data, Encoder(fail_after=2), "abc")
    encoder, seen = Encoder(), []
    report = ensure_latent_cache(data, encoder, "abc", progress=lambda done, total: seen.append((done, total)))
    source = make_source(data, "train", digest="abc")
    plain = make_source(dataclasses.replace(data, latent_cache=""), "train")
    assert report is not None and report.count == 0 and len(encoder.shapes) == len(plain) - 2
    assert len(plain) == 10 and [source.name(i) for i in range(len(source))] == [
        plain.name(i) for i in range(len(plain))
    ]
    assert seen == [(i + 1, len(plain)) for i in range(len(plain))]
    assert ensure_latent_cache(data, encoder, "abc") is None and len(encoder.shapes) == len(plain) - 2
