"""Folders of real files: windows, time stamps, anchors, captions by precedence, splits, and sentences for bad ones."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from vdiff_jax.data.latent_cache import LatentCache
from vdiff_jax.data.sources import FolderSource, Source, SyntheticSource, Windows, in_split, make_source
from vdiff_jax.data.video_io import Clip


def rng(seed=0):
    return np.random.default_rng(seed)


def counting(num_frames, level=0):
    """Frame i is grey 4 i + level, so that a window's frame numbers can be read off its pixels."""
    grey = (4 * np.arange(num_frames) + level).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey[:, None, None, None], (num_frames, 16, 16, 3)))


def numbers(record):
    return np.round(record["frames"].mean((1, 2, 3)) / 4).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five clips of three kinds, two of them unusable, captions from every place."""
    root = tmp_path_factory.mktemp("clips")
    Clip(counting(40), 8.0).save(root / "a.mp4")
    Clip(counting(30), 8.0).save(root / "sub" / "b.webm")
    Clip(counting(20), 8.0).save(root / "c")  # a folder of frames
    Clip(counting(3), 8.0).save(root / "short.gif")
    (root / "broken.mp4").write_text("not a film")
    (root / "notes.md").write_text("not a clip")
    (root / "a.txt").write_text("from the text file\n\nanother line\n")
    rows = [{"file": "a.mp4", "caption": "never"}, {"file": "sub/b.webm", "caption": "from jsonl"}]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "captions.csv").write_text('file,caption\nsub/b.webm,never\nc,"never, either"\n')
    return root


@pytest.fixture(scope="module")
def source(folder):
    windows = Windows(4, strides=(1, 2), stride_weights=(0.5, 0.5), anchor_rate=0.3, anchor_range=(8, 12))
    return FolderSource(folder, windows, size=16)


def test_what_is_found_and_what_is_skipped(source):
    assert isinstance(source, Source)
    assert [source.name(i) for i in range(len(source))] == ["a.mp4", "c", "sub/b.webm"]
    assert set(source.skipped.reasons) == {"broken.mp4", "short.gif"} and source.skipped.count == 2
    assert "3 frames, 4 needed" in source.skipped.reasons["short.gif"] and "broken.mp4" in str(source.skipped)


def test_windows_times_and_anchors(source):
    """The frames shown are those the time stamps tell, for every stride and for anchors."""
    seen = set()
    for seed in range(60):
        record = source.read(seed % 3, rng(seed))
        assert record["frames"].shape == (4, 16, 16, 3) and record["times"].dtype == np.float32
        shown, times = numbers(record), record["times"]
        np.testing.assert_array_equal(shown - shown[1], times - times[1])
        stride = int(times[2] - times[1])
        seen.add((stride, record["anchor"]))
        if record["anchor"]:
            assert -12 <= times[0] <= -8
        else:
            assert times[0] == 0 and times[1] == stride
        assert record["fps"] == pytest.approx(8.0)
    assert seen == {(1, False), (2, False), (1, True), (2, True)}


def test_windows_cover_the_clip_uniformly():
    windows = Windows(4)
    starts = [windows.draw(10, rng(seed))[0][0] for seed in range(700)]
    counts = np.bincount(starts, minlength=8)
    assert counts.shape == (8,) and counts[7] == 0 and (counts[:7] > 60).all()


def test_stride_frequencies_and_short_clips():
    windows = Windows(4, strides=(1, 2, 4), stride_weights=(0.7, 0.2, 0.1))
    strides = [int(np.diff(windows.draw(100, rng(seed))[0])[0]) for seed in range(1000)]
    shares = np.bincount(strides, minlength=5)[[1, 2, 4]] / 1000
    np.testing.assert_allclose(shares, (0.7, 0.2, 0.1), atol=0.05)
    assert {int(np.diff(windows.draw(7, rng(seed))[0])[0]) for seed in range(50)} == {1, 2}
    with pytest.raises(ValueError, match="needs 4 frames, the clip has 3"):
        windows.draw(3, rng())


def test_equal_rng_equal_record(source):
    one, two, other = source.read(0, rng(5)), source.read(0, rng(5)), source.read(0, rng(6))
    np.testing.assert_array_equal(one["frames"], two["frames"])
    np.testing.assert_array_equal(source[1]["frames"], source[1]["frames"])
    assert not np.array_equal(one["frames"], other["frames"])


def test_caption_precedence(source, folder):
    captions = {source.name(i): {source.read(i, rng(s))["caption"] for s in range(20)} for i in range(3)}
    assert captions == {
        "a.mp4": {"from the text file", "another line"},  # beside the file beats the tables
        "sub/b.webm": {"from jsonl"},  # jsonl beats csv
        "c": {""},
    }
    assert sorted(source.captions()) == ["", "another line", "from jsonl", "from the text file"]


def test_captions_from_csv_alternatives_and_strangers(tmp_path):
    for name in ("x", "y"):
        Clip(counting(4), 8.0).save(tmp_path / f"{name}.gif")
    (tmp_path / "captions.csv").write_text('file,caption\nx.gif,"one, two"\nx,three\nz.gif,nobody\n')
    with pytest.warns(UserWarning, match=r"1 clips that are not there: \['z.gif'\]"):
        source = FolderSource(tmp_path, Windows(2), size=None)
    assert {source.read(0, rng(s))["caption"] for s in range(20)} == {"one, two", "three"}
    (tmp_path / "captions.csv").write_text("name,text\nx.gif,one\n")
    with pytest.raises(ValueError, match='needs the columns "file" and "caption"'):
        FolderSource(tmp_path, Windows(2), size=None)
    (tmp_path / "captions.jsonl").write_text('{"file": "x.gif", "caption": "fine"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        FolderSource(tmp_path, Windows(2), size=None)


def test_splits_share_nothing_and_stay_when_clips_come(tmp_path):
    for i in range(12):
        Clip(counting(2, i), 8.0).save(tmp_path / f"{i}.gif")

    def names(split, holdout=0.4):
        source = FolderSource(tmp_path, Windows(2), None, split, holdout)
        return {source.name(i) for i in range(len(source))}

    train, heldout = names("train"), names("heldout")
    assert train and heldout and not train & heldout and train | heldout == names("all")
    Clip(counting(2), 8.0).save(tmp_path / "new.gif")
    assert train <= names("train") and heldout <= names("heldout")
    assert 350 < sum(in_split(str(i), "heldout", 0.4) for i in range(1000)) < 450
    with pytest.raises(ValueError, match=r"'heldout' with holdout 0.0 holds none of the 13 clips"):
        names("heldout", 0.0)


def test_a_subfolder_named_like_the_split_is_taken_whole(tmp_path):
    for split, count in (("train", 3), ("heldout", 2)):
        for i in range(count):
            Clip(counting(2), 8.0).save(tmp_path / split / f"{i}.gif")
    assert [len(FolderSource(tmp_path, Windows(2), None, s, 0.5)) for s in ("train", "heldout", "all")] == [3, 2, 5]


def test_resampling_to_one_rate(folder):
    source = FolderSource(folder, Windows(4), size=16, fps=4.0)
    for seed in range(5):
        record = source.read(0, rng(seed))
        np.testing.assert_array_equal(np.diff(numbers(record)), 2)  # 8 fps on disk
        assert record["fps"] == 4.0 and record["times"].tolist() == [0, 1, 2, 3]


def test_images_are_clips_of_one_frame(tmp_path):
    for i in range(3):
        Image.fromarray(counting(1, 50 * i)[0]).save(tmp_path / f"{i}.png")
    source = FolderSource(tmp_path, Windows(1), size=8)
    assert sorted(int(source[i]["frames"].mean()) for i in range(len(source))) == [0, 50, 100]
    assert source[0]["frames"].shape == (1, 8, 8, 3)
    assert len(FolderSource(tmp_path, Windows(3), size=8)) == 1  # as a film of three frames


def test_no_usable_clip_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        FolderSource(tmp_path / "none", Windows(2), None)
    with pytest.raises(ValueError, match="holds no clips"):
        FolderSource(tmp_path, Windows(2), None)
    Clip(counting(3), 8.0).save(tmp_path / "a.gif")
    with pytest.raises(
        ValueError, match=r"all 1 clips .* longest has 3 frames, .*num_frames=9 at stride 1 needs 9; lower"
    ):
        FolderSource(tmp_path, Windows(9), None)
    (tmp_path / "a.gif").write_bytes(b"")
    (tmp_path / "b.mp4").write_text("letter")
    with pytest.raises(ValueError, match=r"none of the 2 clips .*is empty.*is not a video") as caught:
        FolderSource(tmp_path, Windows(2), None)
    assert "\n" not in str(caught.value)


def test_wrong_windows():
    with pytest.raises(ValueError, match="num_frames >= 1"):
        Windows(0)
    with pytest.raises(ValueError, match="one weight"):
        Windows(2, strides=(1, 2), stride_weights=(1.0,))


def test_synthetic_clips_move_as_told():
    source = SyntheticSource(8, Windows(3), 8)
    assert source[0]["caption"] == "a gradient moving right"
    for index, (axis, step) in enumerate([(2, 1), (2, -1), (1, 1), (1, -1)]):
        frames = source[index]["frames"]
        moved = np.roll(frames[0], step, axis=axis - 1)
        inner = (slice(1, -1), slice(1, -1))
        np.testing.assert_array_equal(frames[1][inner], moved[inner])
    assert SyntheticSource(2, Windows(3), (8, 12), "noise")[0]["frames"].shape == (3, 8, 12, 3)
    with pytest.raises(IndexError):
        source[8]


def test_make_source_from_a_config(folder, tmp_path):
    data = types.SimpleNamespace(
        source="folder",
        folder=str(folder),
        size=16,
        num_frames=4,
        native_fps=8.0,
        strides=(1, 2),
        stride_weights=(1, 1),
        anchor_rate=0.0,
        video_key="video",
        captions_key="caption",
        latent_cache="",
    )
    assert isinstance(make_source(data, "all"), FolderSource)
    data.source = "synthetic"
    assert isinstance(make_source(data), SyntheticSource)
    data.source = "film"
    with pytest.raises(ValueError, match="unknown source 'film'"):
        make_source(data)
    data.latent_cache = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no latent cache"):
        make_source(data)
    assert LatentCache.__doc__
