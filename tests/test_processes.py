"""Several processes: how they start, and how they end together. `benchmarks/two_processes.py` does more of it."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_runner import ROOT, script_environment

from vdiff_jax.processes import PEER_LOST, start_distributed

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import two_processes


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("localhost:1", None, 0), "--num_processes missing: give --coordinator, --num_processes, --process_id"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("localhost:1", 2, 2), "--process_id=2 must be at least 0 and below --num_processes=2"),
        (("localhost", 2, 0), "--coordinator=localhost: give host:port"),
    ],
)
def test_settings_that_cannot_work(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        start_distributed(*settings)


def start_alone(*settings, **options):
    """The error of a start in a process of its own."""
    program = f"from vdiff_jax.processes import start_distributed as s\ntry: s(*{settings}, **{options})\n"
    program += "except Exception as error: print(type(error).__name__, error)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=script_environment(), cwd=ROOT, capture_output=True, text=True)
    return result.stdout + result.stderr


def test_without_a_scheduler_the_flags_are_named():
    said = start_alone()
    assert ("ValueError --distributed finds no TPU pod, SLURM, Kubernetes or Open MPI here") in said
    assert "give --coordinator=HOST:PORT --num_processes=N --process_id=I" in said


def test_a_process_alone_says_what_it_waited_for():
    said = start_alone("localhost:29879", 2, 1, timeout_s=1)
    assert "error: the processes through localhost:29879 did not all start within 1 s: start every one" in said


def test_an_error_in_one_is_told_at_once_though_a_save_goes_on(tmp_path):
    pair = two_processes.Pair(tmp_path, steps=10**6, interval=1, heartbeat=30, pause=0.1, second={"broken": 5})
    assert pair.ended() == [PEER_LOST, 1], pair.said
    assert "error: process 1 of 2: no clip for step 5" in pair.said[1]


def test_a_save_that_one_cannot_write_fails_on_all_and_the_run_goes_on(tmp_path):
    (tmp_path / "checkpoints" / "2.saving-1").mkdir(parents=True)  # in the way of what process 1 writes first
    pair = two_processes.Pair(tmp_path, steps=4, interval=2)
    assert pair.ended() == [0, 0], pair.said
    assert all("the checkpoint of step 2 could not be written" in said for said in pair.said)
    assert (tmp_path / "checkpoints" / "4" / "manifest.json").exists()
    assert not (tmp_path / "checkpoints" / "2").exists()


SHARED = """
import sys
from pathlib import Path
from vdiff_jax.processes import start_distributed
from vdiff_jax.training import workdir
start_distributed(sys.argv[1], 2, int(sys.argv[2]))
workdir._PATIENCE_S = 0.5
for folder in ("one", "one", sys.argv[2]):
    try:
        workdir.make_shared(Path(sys.argv[3]) / folder)
        print("seen")
    except OSError as error:
        print(error)
"""


def test_processes_of_different_folders_are_refused(tmp_path):
    address = f"localhost:{two_processes.free_port()}"
    environment = {**script_environment(), "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, address, str(number), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (0, 1)
    ]  # fmt: skip
    for said in [run.communicate(timeout=120)[0].splitlines() for run in runs]:
        said = [line for line in said if "Gloo" not in line]
        assert said[:2] == ["seen", "seen"]
        assert said[2].endswith("/1 of process 1 is not that of process 0: give a folder that all processes see")
    assert not list((tmp_path / "one").iterdir())


def test_all_stop_at_one_step_and_one_that_is_killed_ends_the_other(tmp_path):
    pair = two_processes.Pair(tmp_path, steps=10**6, interval=3, heartbeat=5, pause=0.02)
    pair.wait_for_step(5)
    pair.runs[1].send_signal(signal.SIGTERM)  # twice, and to one of them
    time.sleep(0.2)
    pair.runs[1].send_signal(signal.SIGTERM)
    assert pair.ended() == [75, 75], pair.said
    stopped = [log[-1]["step"] for log in pair.logs()]
    assert stopped[0] == stopped[1]

    pair = two_processes.Pair(tmp_path, steps=10**6, interval=3, heartbeat=5, pause=0.02)
    pair.wait_for_step(stopped[0] + 5)
    assert [line["start"] for line in pair.logs()[0] if "start" in line] == [0, stopped[0] + 1]
    started = time.monotonic()
    pair.runs[1].kill()
    assert pair.ended() == [PEER_LOST, -signal.SIGKILL], pair.said
    assert time.monotonic() - started < 2 * 5 + 2
    assert "process 0 of 2: another process of this run ended or cannot be reached, after step" in pair.said[0]
