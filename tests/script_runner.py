"""Runs scripts as a user would, each in a fork of one process that has the imports behind it.

    run_scripts([["sample.py", "--num_frames=0"], ...]) -> list of Result

A fork starts from fresh flags and a JAX that has not started, like a new process, but without its seconds of imports.
"""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def script_environment() -> dict[str, str]:
    """One CPU device, and imports from this checkout."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
    return {**os.environ, "XLA_FLAGS": flags.strip(), "PYTHONPATH": str(ROOT)}


def run_scripts(commands: list[list[str]], timeout_s: float = 600) -> list[Result]:
    """Run every command (script name, then its arguments) from the repository root, one after another."""
    finished = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=script_environment(),
        timeout=timeout_s,
        check=True,
    )
    return [Result(**record) for record in json.loads(finished.stdout)]


def _run_here(command: list[str]) -> int:
    """In the fork: the script as `__main__`."""
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _in_fork(command: list[str]) -> Result:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = _run_here(command)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
    return Result(code, *texts)


def main() -> None:
    import vdiff_jax.pipeline
    import vdiff_jax.stages  # noqa: F401

    commands = json.load(sys.stdin)
    print(json.dumps([dataclasses.asdict(_in_fork(command)) for command in commands]))


if __name__ == "__main__":
    main()
