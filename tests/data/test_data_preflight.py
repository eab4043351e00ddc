"""The data preflight over real folders: what it counts, what it refuses, each with a sentence of its own."""

import dataclasses
import shutil
import time

import numpy as np
import pytest

from vdiff_jax.data import preflight
from vdiff_jax.data.cache_build import build_latent_cache
from vdiff_jax.data.preflight import check_data
from vdiff_jax.data.sources import FolderSource, Windows
from vdiff_jax.data.video_io import Clip
from vdiff_jax.recipe import DataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of 8 frames: 4 of 16 x 16 and 2 of 8 x 16, 4 with captions; and a letter."""
    path = tmp_path_factory.mktemp("preflight")
    rng = np.random.default_rng(0)
    for index in range(6):
        height = 8 if index >= 4 else 16
        Clip(rng.integers(0, 256, (8, height, 16, 3), np.uint8), 8.0).save(path / f"{index}.mp4")
        if index < 4:
            (path / f"{index}.txt").write_text("a test\nof noise\n")
    (path / "letter.mp4").write_text("dear reader")
    return path


def config(folder, **changes):
    data = DataConfig(source="folder", folder=str(folder), split="all", size=16, num_frames=4, strides=(1,))
    return dataclasses.replace(data, stride_weights=(1.0,), **changes)


def test_what_a_folder_holds(folder):
    report = check_data(config(folder), 4, 2, needs_captions=True)
    assert (report.usable, report.sampled, report.without_caption, report.upscaled) == (6, 6, 2, 2)
    assert report.batches_per_epoch == 1.5 and report.batch_bytes == 2 * 4 * 4 * 16 * 16 * 3 and report.clips_per_s > 0
    assert list(report.left_out.reasons) == ["letter.mp4"] and not report.unread.count and not report.unfinished
    text = str(report)
    for part in ("6 usable of 7", "1.5 of 4 clips", "4 of 6 clips have one", "2 of 6 clips are smaller", "letter.mp4"):
        assert part in text, text
    assert "shows each of the 6 clips more than once" in str(check_data(config(folder), 8))


def test_damage_that_the_header_does_not_tell(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clips")
    for index in range(3):
        path = tmp_path / "clips" / f"{index}.mp4"
        data = path.read_bytes()
        pictures = data.index(b"mdat") + 4
        path.write_bytes(data[:pictures] + bytes(len(data) - pictures))
    report = check_data(config(tmp_path / "clips"), 2)
    assert report.usable == 6 and report.sampled == 3 and set(report.unread.reasons) == {"0.mp4", "1.mp4", "2.mp4"}
    assert "of 6 clips tried, 3 clips were skipped" in str(report)


def refused(match, *args, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        check_data(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_refusal_is_its_own_sentence(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.mp4").write_text("dear reader")
    (tmp_path / "silent").mkdir()
    shutil.copy(folder / "4.mp4", tmp_path / "silent")
    (tmp_path / "short").mkdir()
    shutil.copy(folder / "5.mp4", tmp_path / "short")
    said = {
        refused("is not a folder", config(tmp_path / "none"), 2),
        refused("holds no clips .* add some", config(tmp_path / "empty"), 2),
        refused("none of the 1 clips .* is usable; .*is not a video", config(tmp_path / "letters"), 2),
        refused(
            r"all 1 clips .* longest has 8 frames, .*num_frames=9 at stride 2 needs 17; lower num_frames",
            config(tmp_path / "short", num_frames=9, strides=(2,)), 2,
        ),
        refused(
            "none of the 1 clips .* has a caption.*model.text=none",
            config(tmp_path / "silent"), 2, needs_captions=True,
        ),
        refused("batch_size=3 is not a multiple of the 2 processes", config(folder), 3, 2),
    }  # fmt: skip
    assert len(said) == 6
    assert check_data(config(tmp_path / "silent"), 2).without_caption == 1  # no words asked for


def test_a_sample_of_which_nothing_can_be_read(folder, tmp_path, monkeypatch):
    class Gone(FolderSource):
        def read(self, index, rng):
            raise OSError("the disk has gone")

    class Slow(FolderSource):
        def read(self, index, rng):
            time.sleep(2)

    opened = {"kind": Gone}
    monkeypatch.setattr(preflight, "make_source", lambda *_: opened["kind"](folder, Windows(4), 16))
    refused("none of 6 clips .* that were tried can be read; .*the disk has gone", config(folder), 2)
    opened["kind"] = Slow
    began = time.monotonic()
    refused(r"no clip of .* could be read in 0 s", config(folder), 2, limit_s=0.1)
    assert time.monotonic() - began < 1.5


def test_the_clips_behind_an_unfinished_cache_then_the_cache_itself(folder, tmp_path):
    data = config(folder, latent_cache=str(tmp_path / "cache"))
    assert check_data(data, 2).upscaled == 2  # the folder was looked at
    build_latent_cache(
        FolderSource(folder, Windows(1), 16, fps=8.0), lambda v: v[:, :, ::2, ::2], tmp_path / "cache", "abc"
    )
    report = check_data(data, 2, digest="abc")
    assert report.usable == 6 and report.upscaled is None and report.place == str(tmp_path / "cache")
    assert report.record_bytes == 4 * 4 * 8 * 8 * 3
    refused("made by the autoencoder 'abc', not by 'xyz'", data, 2, digest="xyz")
    refused("all 6 clips of .*cache are too short", dataclasses.replace(data, num_frames=9), 2)


def test_rendered_shapes_are_no_files():
    assert check_data(DataConfig(), 32, 4) is None
    assert check_data(dataclasses.replace(DataConfig(), source="synthetic"), 32).usable == 256
