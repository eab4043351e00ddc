"""Faults made for real, a few of each; `benchmarks/checkpoint_faults.py` makes many."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import checkpoint_damage
import checkpoint_faults
import fault_run

from vdiff_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return checkpoint_damage.Saved(tmp_path_factory.mktemp("faults"))


def test_no_flipped_bit_is_silent(saved):
    files = saved.files()
    found = checkpoint_damage.bits(saved, len(files), random.Random(5))
    assert found["fell back"] + found["failed"] == found["files"] == len(files) > 12
    assert found["fell back"] >= 6 and found["failed"] >= 6
    early = checkpoint_damage.early_bits(saved, 3, random.Random(6))
    assert early["fell back"] == 3


def test_files_that_are_gone_or_cut_are_named(saved):
    some = [name for name in saved.files() if name.endswith(("manifest.json", "manifest.ocdbt", "metadata"))]
    found = checkpoint_damage.truncate(saved, some)
    assert found["fell back"] + found["failed"] == 3 * len(some) >= 12
    assert found["fell back"] and found["failed"]


def test_a_run_killed_at_a_random_moment_goes_on(tmp_path):
    found = checkpoint_faults.kill(tmp_path, 1, random.Random(7))
    assert found["wrong"] == 0 and found["saves lost"] <= 1, found
    log = checkpoint_faults.read_log(tmp_path / "killed")
    assert len(checkpoint_faults.sessions(log)) == 2
    # The check itself notices: a clip too many, a step left out, a start that goes back too far.
    last = max(index for index, line in enumerate(log) if "step" in line)
    for planted in (
        [*log[:last], {**log[last], "clips": ["0"] * 8}, *log[last + 1 :]],
        [line for index, line in enumerate(log) if index != last - 1],
        [*log, {"start": 0}],
    ):
        assert checkpoint_faults.check_order(planted, 2) > 0


def test_a_run_resumes_bitwise_at_each_of_12_steps(tmp_path):
    assert checkpoint_faults.resume(tmp_path) == {"steps": 12, "resumed at": 12, "wrong": 0}


def test_two_processes_agree_on_what_is_damaged_and_take_up_the_run_of_one(tmp_path):
    fault_run.train(tmp_path, 4, 2)
    newest = max((tmp_path / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    checkpoint_damage.flip_bit(newest, 12345)
    said = checkpoint_faults.together(tmp_path, 6)
    assert all("Falling back to step 2" in one for one in said)
    logs = [checkpoint_faults.read_log(tmp_path, process) for process in (0, 1)]
    assert [line["start"] for log in logs for line in log if "start" in line] == [0, 2, 2]
    assert json.loads((tmp_path / "checkpoints" / "6" / "manifest.json").read_text())["content"]["processes"] == 2
    checkpoints = Checkpoints(tmp_path)  # one process again, on another mesh, every digest compared
    assert checkpoints.latest_step == 6
    checkpoints.close()
    assert int(fault_run.train(tmp_path, 7, 2).step) == 7
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4.damaged", "6", "7"]
