"""Data far away, end to end: clips, captions and the latent cache in a bucket that fsspec reaches by s3://."""

import dataclasses
import importlib.util
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vdiff_jax.data.cache_build import build_latent_cache, ensure_latent_cache
from vdiff_jax.data.latent_cache import LatentCache
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.paths import make_path, write_whole
from vdiff_jax.data.preflight import check_data
from vdiff_jax.data.sources import FolderSource, Windows, make_source
from vdiff_jax.data.video_io import Clip, VideoError, probe, read_video
from vdiff_jax.recipe import DataConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="epath goes through TensorFlow where it is installed"
)


class Bucket(MemoryFileSystem):
    """Objects by name in memory; like object storage it renames nothing and knows no empty folders."""

    protocol = ("s3",)
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))

    def mv(self, *args, **kwargs):
        raise OSError("objects cannot be renamed")

    mv_file = rename = move = mv

    def mkdir(self, *args, **kwargs):
        pass

    makedirs = mkdir


@pytest.fixture(scope="module", autouse=True)
def storage():
    fsspec.register_implementation("s3", Bucket, clobber=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same clips here and in the bucket: videos, a gif, a folder of frames, captions of two kinds, a letter."""
    here = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for index, name in enumerate(("a.mp4", "b.webm", "c.gif", "deep/d")):
        Clip(rng.integers(0, 256, (6 + index, 16, 16, 3), np.uint8), 8.0).save(here / name)
    (here / "a.txt").write_text("first\nsecond\n")
    (here / "captions.csv").write_text("file,caption\nb.webm,third\ndeep/d,fourth\n")
    (here / "letter.mp4").write_text("dear reader")
    for path in here.rglob("*"):
        if path.is_file():
            write_whole(make_path(f"s3://bucket/clips/{path.relative_to(here).as_posix()}"), path.read_bytes())
    return here, "s3://bucket/clips"


def test_a_path_is_here_or_far_away(tmp_path):
    assert make_path(str(tmp_path)) == tmp_path and isinstance(make_path("clips"), Path)
    far = make_path("s3://bucket/new/file")
    write_whole(far, b"abc")
    assert far.read_bytes() == b"abc" and str(far.parent / "other") == "s3://bucket/new/other"
    write_whole(tmp_path / "file", b"abc")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="no storage is known by ftp://"):
        make_path("ftp://host/clips")


def test_a_missing_plugin_is_named():
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ImportError, match=r"gs://.* needs a plugin of fsspec .*gcsfs"):
            make_path("gs://bucket/clips")


def test_clips_far_away_are_the_clips_here(folders):
    sources = [FolderSource(folder, Windows(3), 16) for folder in folders]
    near, far = sources
    assert [far.name(i) for i in range(len(far))] == [near.name(i) for i in range(len(near))] and len(far) == 4
    assert list(far.skipped.reasons) == ["letter.mp4"] and far.captions() == near.captions()
    batches = [Loader(pickle.loads(pickle.dumps(source)), None, 4).host_batch_at(1) for source in sources]
    assert batches[0].captions == batches[1].captions and batches[0].names == batches[1].names
    np.testing.assert_array_equal(batches[0].arrays["video"], batches[1].arrays["video"])
    assert probe("s3://bucket/clips/a.mp4").num_frames == 6 and read_video("s3://bucket/clips/deep/d").num_frames == 9
    with pytest.raises(VideoError, match=r"s3://bucket/clips/none.mp4 does not exist"):
        read_video("s3://bucket/clips/none.mp4")
    with pytest.raises(FileNotFoundError, match="s3://bucket/none is not a folder"):
        FolderSource("s3://bucket/none", Windows(3), 16)


def test_a_latent_cache_far_away(folders, tmp_path):
    near = FolderSource(folders[0], Windows(1), 16)
    build_latent_cache(near, lambda video: video[:, :, ::2, ::2], tmp_path / "cache", "abc")
    data = DataConfig(source="folder", folder=folders[1], split="all", size=16, num_frames=3, strides=(1,))
    data = dataclasses.replace(data, stride_weights=(1.0,), native_fps=None, latent_cache="s3://bucket/cache")
    assert check_data(data, 2).upscaled == 0
    report = ensure_latent_cache(data, lambda video: video[:, :, ::2, ::2], "abc")
    assert report is not None and not report.count
    for path in (tmp_path / "cache").iterdir():
        assert make_path(f"s3://bucket/cache/{path.name}").read_bytes() == path.read_bytes(), path.name
    far, near = make_source(data, "all", "abc"), LatentCache(tmp_path / "cache", Windows(3))
    assert isinstance(far, LatentCache)
    batches = [Loader(source, None, 4).batch_at(2) for source in (far, near)]
    np.testing.assert_array_equal(batches[0]["moments"], batches[1]["moments"])
    content = bytearray(make_path("s3://bucket/cache/000001.npy").read_bytes())
    content[-1] ^= 1
    write_whole(make_path("s3://bucket/cache/000001.npy"), bytes(content))
    loader = Loader(far, None, 4)
    for step in range(40):
        loader.batch_at(step)
    assert list(loader.skipped.reasons) == ["b.webm"]
    make_path("s3://bucket/cache/index.json").unlink()
    assert ensure_latent_cache(data, lambda video: video[:, :, ::2, ::2], "abc") is not None
    again = LatentCache("s3://bucket/cache", Windows(3))
    for index in range(4):
        np.testing.assert_array_equal(again[index]["moments"], near[index]["moments"])
