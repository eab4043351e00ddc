"""The shapes stream: a pure function of the step, true to the strides and anchors it was asked for."""

import dataclasses

import jax
import numpy as np
import pytest

from vdiff_jax.data.shapes import make_world
from vdiff_jax.data.shapes_stream import ShapesStream

WORLD = make_world("small", size=32)


def encode(captions):
    return np.array([[len(text)] for text in captions], np.int32), np.ones((len(captions), 1), bool)


STREAM = ShapesStream(WORLD, 2000, 4, encode, strides=(1, 2, 4), stride_weights=(7, 2, 1), anchor_rate=0.3)


@pytest.fixture(scope="module")
def batch():
    return STREAM.batch_at(3)


def test_batches_depend_on_seed_and_step_only(batch):
    small = dataclasses.replace(STREAM, batch_size=8)
    iterator = small.starting_at(2)
    next(iterator)
    jax.tree.map(np.testing.assert_array_equal, next(iterator), small.batch_at(3))
    for other in (small.batch_at(4), dataclasses.replace(small, seed=1).batch_at(3)):
        assert not np.array_equal(other["records"]["position"], small.batch_at(3)["records"]["position"])


def test_processes_share_a_batch_without_overlap():
    whole = dataclasses.replace(STREAM, batch_size=8).batch_at(0)
    parts = [dataclasses.replace(STREAM, batch_size=8, process_index=i, process_count=2).batch_at(0) for i in range(2)]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_strides_and_anchors_have_their_shares_and_ranges(batch):
    times, anchor = batch["times"], batch["anchor"]
    assert abs(anchor.mean() - 0.3) < 4 * np.sqrt(0.21 / len(anchor))
    steps = np.diff(times[:, 1:], axis=1)
    assert (steps == steps[:, :1]).all()
    for stride, share in ((1, 0.7), (2, 0.2), (4, 0.1)):
        assert abs((steps[:, 0] == stride).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(times))
    first = times[:, 1] - times[:, 0] - steps[:, 0]
    assert (first[~anchor] == 0).all()
    assert first[anchor].min() >= 8 and first[anchor].max() <= 64 and first[anchor].max() > 55


def test_windows_lie_in_the_native_clip_and_use_all_of_it(batch):
    plain = batch["times"][~batch["anchor"]]
    assert plain.min() == 0 and plain.max() == WORLD.num_frames - 1


def test_prompts_are_left_out_on_request(batch):
    assert batch["tokens"].shape == (2000, 1)
    assert "tokens" not in dataclasses.replace(STREAM, batch_size=2, encode_prompts=None).batch_at(0)
