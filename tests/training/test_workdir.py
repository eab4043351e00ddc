"""The work folder: here, and for one run at a time."""

import subprocess
import sys

import pytest
from script_runner import script_environment

from vdiff_jax.training.workdir import alone_in, local_folder, make_shared

HOLD = """
import sys
from pathlib import Path
from vdiff_jax.training.workdir import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_address_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="--workdir=gs://bucket/run is an address: give a folder"):
        local_folder("gs://bucket/run")
    assert local_folder(str(tmp_path)) == tmp_path


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    make_shared(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    first = subprocess.Popen(
        command, env=script_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(OSError, match=r"another run is training in .*run: wait for its end"),
        alone_in(tmp_path / "run"),
    ):
        pass
    first.kill()
    first.communicate()
    with alone_in(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
