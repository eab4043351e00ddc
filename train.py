"""Train a stage of a model: the autoencoder or the diffusion network.

    python train.py --config=configs/shapes_autoencoder.py --workdir=runs/shapes_autoencoder
    python train.py --config=configs/shapes.py --workdir=runs/shapes
    python train.py --config=configs/folder.py --workdir=runs/mine --config.data.folder=my_clips
    python train.py --config=configs/finetune.py --workdir=runs/tuned --config.data.folder=my_clips \\
        --config.init_from=a_diffusers_pipeline

Any setting can be changed on the command line: --config.train.num_steps=2000 --config.optimizer.learning_rate=5e-4.
Running the same command again resumes from the newest checkpoint. Ctrl-C or SIGTERM stops after a checkpoint, with
exit code 75 and no model. The work folder receives checkpoints/, metrics.jsonl, tensorboard/, samples/, goodput.json,
model/ (the finished model) and, with --config.train.model_steps=500, models/0000500 and so on.

Before it begins a run looks at its data, mesh, checkpoint and memory; --preflight does only that.
Several processes: --distributed under a scheduler, or --coordinator=HOST:PORT --num_processes=2 --process_id=0 (or 1).
"""

from __future__ import annotations

import contextlib

import jax
from absl import flags
from ml_collections import config_flags

from vdiff_jax import parallel, processes
from vdiff_jax.command import run_script
from vdiff_jax.recipe import TrainConfig, section
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.workdir import alone_in, local_folder, make_shared
from vdiff_jax.training_run import carry_out, prepare_run, tell

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made if missing, resumed if not empty.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, which the scheduler's settings tell of."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no scheduler tells.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
_PREFLIGHT = flags.DEFINE_bool("preflight", False, "Look at data, mesh, checkpoint and memory, and stop there.")


def main(_: list[str]) -> int:
    workdir = local_folder(_WORKDIR.value or ".")
    recipe = _CONFIG.value
    train = section(recipe, "train", TrainConfig)
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in explicit):
        processes.start_distributed(*explicit, heartbeat_s=train.heartbeat_s or 100)
    clock = Goodput(workdir if jax.process_index() == 0 else None)
    with processes.one_ends_all(lambda: f"after step {clock.step}"), contextlib.ExitStack() as held:
        make_shared(workdir)
        if not _PREFLIGHT.value:
            held.enter_context(alone_in(workdir))
        mesh = parallel.make_mesh(**recipe.parallel)
        tell(f"{recipe.stage} stage, mesh {parallel.describe(mesh)}, in {workdir}")
        with jax.set_mesh(mesh):
            run = prepare_run(recipe, mesh, workdir, clock, look_only=_PREFLIGHT.value)
            if _PREFLIGHT.value:
                tell("the run can begin")
                return 0
            return carry_out(run)


def start() -> None:
    """Entry point: one clear sentence and a non-zero exit code where the input is at fault."""
    flags.mark_flags_as_required(["config", "workdir"])
    run_script(main)


if __name__ == "__main__":
    start()
