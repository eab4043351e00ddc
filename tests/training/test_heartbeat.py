"""A run that stands still says where and ends; one that is only slow goes on."""

import subprocess
import sys
import time

import pytest
from script_runner import ROOT, script_environment

from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.heartbeat import STALLED, Heartbeat

PROGRAM = """
import sys, threading, time
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.heartbeat import Heartbeat

clock = Goodput()
with Heartbeat(clock, 0.5):
    for clock.step in range(4):
        clock.enter("data")
        clock.enter("step")
    print(time.monotonic(), flush=True)
    clock.enter(sys.argv[1])
    def the_loader_that_hangs():
        time.sleep(float(sys.argv[2]))
    the_loader_that_hangs()
print("went on")
"""


def run(phase, seconds):
    command = [sys.executable, "-c", PROGRAM, phase, str(seconds)]
    result = subprocess.run(command, cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=120)
    return result, time.monotonic() - float(result.stdout.split()[0])


def test_a_stalled_loader_is_named_within_two_heartbeats():
    result, seconds = run("data", 60)
    assert result.returncode == STALLED == 77
    assert "no progress for" in result.stderr and "after step 3 (data): waiting for the data loader" in result.stderr
    assert "in the_loader_that_hangs" in result.stderr and "went on" not in result.stdout
    assert seconds < 2 * 0.5 + 1.5  # and the end of the process


def test_phases_that_are_long_by_nature_may_be():
    result, _ = run("checkpoint", 1.5)
    assert result.returncode == 0 and "went on" in result.stdout, result.stderr


def test_limits_grow_with_what_was_seen():
    clock = Goodput()
    heartbeat = Heartbeat(clock, 2.0)
    assert {heartbeat.limit(phase) for phase in ("step", "data", "compile", "export")} == {40.0}
    clock.longest["data"] = 0.1
    clock.longest["step"] = 3.0
    assert heartbeat.limit("data") == 2.0 and heartbeat.limit("step") == 15.0 and heartbeat.limit("compile") == 40.0


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_the_watch_ends_with_the_loop(seconds):
    heartbeat = Heartbeat(Goodput(), seconds)
    with heartbeat:
        assert heartbeat._thread.is_alive() == (seconds > 0)
    assert not heartbeat._thread.is_alive()
