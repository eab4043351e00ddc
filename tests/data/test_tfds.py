"""TFDS data sets written and read back with real files, TensorFlow never imported."""

import sys

import numpy as np
import pytest

from vdiff_jax.data import shapes
from vdiff_jax.data.loader import Loader
from vdiff_jax.data.sources import Windows
from vdiff_jax.data.tfds_builders import ShapesBuilder, prepare
from vdiff_jax.data.tfds_source import TfdsSource
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.data.video_io import Clip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    clips = {name: rng.integers(0, 256, (count, 16, 16, 3), np.uint8) for name, count in (("a", 9), ("b", 4))}
    for name, frames in clips.items():
        Clip(frames, 12.0).save(root / "clips" / name)
    (root / "clips" / "a.txt").write_text("a r\u00f8d ball\nanother line\n")
    return prepare(root / "clips", root / "out", num_frames=4, size=16), clips


def test_what_was_written_is_read_back(prepared):
    folder, clips = prepared
    source = TfdsSource(Windows(4), folder)
    assert len(source) == 3  # two windows of a, one of b
    found = {record["frames"].tobytes(): record for record in (source[i] for i in range(3))}
    for window, caption in (
        (clips["a"][:4], "a r\u00f8d ball"),
        (clips["a"][4:8], "another line"),
        (clips["b"], ""),
    ):
        record = found[window.tobytes()]
        assert record["caption"] == caption and record["fps"] == 12.0 and record["times"].tolist() == [0, 1, 2, 3]
    assert sorted(source.captions()) == ["", "a r\u00f8d ball", "another line"]
    assert "tensorflow" not in sys.modules


def test_windows_size_and_loader(prepared):
    source = TfdsSource(Windows(2, (1, 3), (1, 1)), prepared[0], size=8)
    batch = Loader(source, None, 6).batch_at(0)
    assert batch["video"].shape == (6, 2, 8, 8, 3) and set(batch["times"][:, 1]) <= {1.0, 3.0}
    full_size = TfdsSource(Windows(2, (1, 3), (1, 1)), prepared[0])
    stored = full_size.read_whole(1)["frames"]
    shown = [full_size.read(1, np.random.default_rng(seed)) for seed in range(20)]
    starts = {int(np.argmax((stored == record["frames"][0]).all((1, 2, 3)))) for record in shown}
    assert starts == {0, 1, 2}
    for record in shown:  # the frames are as far apart as their time stamps
        first = int(np.argmax((stored == record["frames"][0]).all((1, 2, 3))))
        np.testing.assert_array_equal(record["frames"][1], stored[first + int(record["times"][1])])
    whole = source.read_whole(0)
    assert whole["frames"].shape == (4, 8, 8, 3) and len(whole["captions"]) == 1


def test_shapes_clips_equal_the_world(tmp_path):
    world = shapes.small_world(16, num_frames=4)
    builder = ShapesBuilder(world, 3, seed=5, data_dir=str(tmp_path))
    builder.download_and_prepare()
    source = TfdsSource(Windows(4), builder.data_path)
    rng = np.random.default_rng(5)
    records = shapes.draw_records(rng, world, "train", 3)
    texts = shapes.captions(records, rng)
    video = to_uint8(np.asarray(shapes.render(records, shapes.native_times(world, 3), world)))
    stored = {source[i]["caption"]: source[i]["frames"] for i in range(3)}
    assert stored.keys() == set(texts)
    for text, frames in zip(texts, video):
        assert np.abs(stored[text].astype(int) - frames).max() <= 1  # jit may round the other way
    assert "tensorflow" not in sys.modules


def test_errors_are_sentences(prepared, tmp_path):
    folder = prepared[0]
    for options, match in (
        ({"frames_key": "movie"}, "no feature 'movie' for the frames; the data set has caption, fps, name, video"),
        ({"folder": None}, "either folder or name"),
        ({"frames_key": "caption"}, "not uint8"),
    ):
        with pytest.raises(ValueError, match=match):
            TfdsSource(Windows(4), **({"folder": folder} | options))[0]
    with pytest.raises(FileNotFoundError, match=r"dataset_info\.json"):
        TfdsSource(Windows(4), tmp_path)
    with pytest.raises(ValueError, match="needs 9 frames, the clip has 4"):
        TfdsSource(Windows(9), folder)[0]


def test_a_feature_that_needs_tensorflow_says_so(prepared, tmp_path):
    """A data set with `tfds.features.Video` cannot be opened without TensorFlow."""
    import json
    import shutil

    if "tensorflow" in sys.modules:
        raise AssertionError("another test imported TensorFlow")
    shutil.copytree(prepared[0], tmp_path / "video")
    path = tmp_path / "video" / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["video"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"shape": {"dimensions": ["4", "16", "16", "3"]}, "encodingFormat": "png", "dtype": "uint8"},
    }
    path.write_text(json.dumps(features))
    with pytest.raises(ImportError, match="only TensorFlow decodes") as caught:
        TfdsSource(Windows(4), tmp_path / "video")
    assert "\n" not in str(caught.value)
