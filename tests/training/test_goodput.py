"""The account of time: every moment in one phase, kept over restarts, lost work told apart."""

import json
import subprocess
import sys
import time

import pytest
from script_runner import script_environment

from vdiff_jax.training.goodput import PHASES, Goodput, process_age_s


class Clock:
    def __init__(self, monkeypatch):
        self.moment = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.moment)
        monkeypatch.setattr("vdiff_jax.training.goodput.process_age_s", lambda: 0.0)

    def spend(self, goodput, phase, seconds, **options):
        goodput.enter(phase, **options)
        self.moment += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_each_moment_counts_once(clock):
    goodput = Goodput()
    clock.moment += 2.0
    clock.spend(goodput, "compile", 3.0)
    clock.spend(goodput, "data", 1.0)
    clock.spend(goodput, "step", 4.0)
    clock.spend(goodput, "data", 5.0)
    # While that batch was read the devices were at work.
    clock.spend(goodput, "step", 5.0, count_as="step")
    assert goodput.percent() == pytest.approx(
        {"startup": 10, "compile": 15, "data": 5, "step": 70, "checkpoint": 0, "export": 0, "lost": 0}
    )
    assert str(goodput) == "goodput 70.0 % of 20 s; compile 15.0, data 5.0, startup 10.0"
    assert goodput.longest == {"data": 5.0}  # the first of each is no measure


def test_work_that_is_done_again_is_lost(clock, tmp_path):
    first = Goodput(tmp_path)
    first.resumed(0)
    for step in range(1, 9):  # 8 steps of a second, saved at 3 and 6, killed after 8
        clock.spend(first, "step", 1.0)
        if step % 3 == 0:
            first.saved(step)
    first.write()
    clock.moment += 50.0  # a new process
    second = Goodput(tmp_path)
    clock.moment += 4.0
    second.resumed(6)
    clock.spend(second, "step", 6.0)
    second.write()
    record = json.loads((tmp_path / "goodput.json").read_text())
    assert record["starts"] == 2 and record["wall_s"] == pytest.approx(18)
    assert record["seconds"] == pytest.approx(dict.fromkeys(PHASES, 0) | {"step": 12, "lost": 2, "startup": 4})
    assert sum(record["percent"].values()) == pytest.approx(100, abs=0.1)
    third = Goodput(tmp_path)
    third.resumed(3)  # step 6 was damaged
    assert third.seconds["step"] == pytest.approx(3) and third.seconds["lost"] == pytest.approx(11)


@pytest.mark.parametrize("text", ['{"seconds": ', '{"seconds": [], "saved": {}, "starts": 1}', '{"seconds": {}}', "3"])
def test_a_file_that_cannot_be_read_is_begun_anew(text, tmp_path):
    (tmp_path / "goodput.json").write_text(text)
    goodput = Goodput(tmp_path)
    goodput.write()
    assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["goodput.json"]


def test_the_clock_starts_with_the_process():
    assert 0.5 < process_age_s() < 86400
    program = "import time; time.sleep(0.5); from vdiff_jax.training.goodput import Goodput; clock = Goodput(); "
    program += "clock.percent(); print(sum(clock.seconds.values()), flush=True); import os; os._exit(0)"
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program], env=script_environment(), capture_output=True, text=True)
    wall = time.monotonic() - started
    assert 0.5 < float(said.stdout) == pytest.approx(wall, abs=0.3 + 0.1 * wall)
