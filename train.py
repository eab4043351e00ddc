"""Train a stage of a model: the autoencoder or the diffusion network.

    python train.py --config=configs/shapes_autoencoder.py --workdir=runs/shapes_autoencoder
    python train.py --config=configs/shapes.py --workdir=runs/shapes
    python train.py --config=configs/folder.py --workdir=runs/mine --config.data.folder=my_clips
    python train.py --config=configs/finetune.py --workdir=runs/tuned --config.data.folder=my_clips \\
        --config.init_from=a_diffusers_pipeline

Any setting can be changed on the command line: --config.train.num_steps=2000 --config.optimizer.learning_rate=5e-4.
Running the same command again resumes from the newest checkpoint. Ctrl-C or SIGTERM stops after a checkpoint, with
exit code 75. The work folder receives checkpoints/, metrics.jsonl, tensorboard/, samples/, goodput.json, model/ (the
finished model) and, with --config.train.model_steps=500, models/0000500 and so on.

Before it begins a run looks at its data, mesh, checkpoint and memory; --preflight does only that.
Several processes: --distributed under a scheduler, or --coordinator=HOST:PORT --num_processes=2 --process_id=0 (or 1).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from vdiff_jax import parallel, processes
from vdiff_jax.command import run_script
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.preflight import check_run_data, check_run_memory
from vdiff_jax.recipe import Recipe, TrainConfig, section
from vdiff_jax.stages import Stage, make_stage
from vdiff_jax.training.checkpoint import Checkpoints, SaveFailed
from vdiff_jax.training.config_changes import describe_changes
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.loop import fit
from vdiff_jax.training.manifest import code_version
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import TrainState, abstract_state, init_sharded_state, make_train_step
from vdiff_jax.training.writers import MetricWriter

SAVE_FAILED = 74  # the last checkpoint could not be written: nothing after the one before is saved
STOPPED_EARLY = 75  # stopped by a signal or the time limit, with a checkpoint: run again to go on
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
    recipe = _CONFIG.value
    train = section(recipe, "train", TrainConfig)
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in explicit):
        processes.start_distributed(*explicit, heartbeat_s=train.heartbeat_s or 100)
    workdir = Path(_WORKDIR.value or ".")
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file: give a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    clock = Goodput(workdir if jax.process_index() == 0 else None)
    with processes.one_ends_all(lambda: f"after step {clock.step}"):
        mesh = parallel.make_mesh(**recipe.parallel)
        tell(f"{recipe.stage} stage, mesh {parallel.describe(mesh)}, in {workdir}")
        with jax.set_mesh(mesh):
            return run_stage(recipe, train, mesh, workdir, clock)


def run_stage(recipe: Recipe, train: TrainConfig, mesh: Mesh, workdir: Path, clock: Goodput) -> int:
    # --- data, networks, loss
    if report := check_run_data(recipe, mesh):
        tell(str(report))
    stage = make_stage(recipe, mesh, workdir)
    if stage.left_out.count:
        tell(f"warning: {stage.left_out}")
    optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), train.num_steps)

    # --- the step, before any memory is taken
    abstract = abstract_state(stage.init, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    tell(f"{parameter_count(abstract.params) / 1e6:.2f} M trainable parameters")
    checkpoints = Checkpoints(workdir, keep=train.keep_checkpoints, keep_every=train.keep_every_steps)
    if not train.partial_restore:
        checkpoints.check(abstract)
    train_step = make_train_step(
        stage.loss_fn,
        optimizer,
        mesh,
        shardings,
        ema_decay=train.ema_decay,
        accumulation_steps=train.accumulation_steps,
        spike_sigmas=train.spike_sigmas,
        frozen=stage.frozen,
    )
    clock.enter("compile")
    for memory in check_run_memory(stage, train_step, abstract, train.memory_limit_gb):
        tell(str(memory))
    clock.enter("startup")
    if _PREFLIGHT.value:
        tell("the run can begin")
        return 0

    # --- state: born sharded, or the newest checkpoint if there is one
    key = jax.random.key(recipe.seed)
    state, _ = init_sharded_state(stage.init, optimizer, key, mesh, start=stage.start)
    meta = {"config": json.loads(recipe.to_json_best_effort()), "code": code_version()}
    data_offset = 0
    if checkpoints.latest_step is not None:
        fresh = state if train.partial_restore else None
        del state  # its memory is needed for the restored one
        state, saved = checkpoints.restore(abstract, shardings, fresh=fresh)
        del fresh
        data_offset = saved.get("data_offset", 0)
        tell(f"resumed at step {int(state.step)}")
        report_changes(saved, meta)
    clock.resumed(int(state.step))

    # --- the loop, and the finished model
    writer = MetricWriter(workdir) if jax.process_index() == 0 else None
    if writer is not None:
        (workdir / "recipe.json").write_text(recipe.to_json_best_effort(indent=2) + "\n", encoding="utf-8")
    try:
        state, finished = fit(
            state,
            train_step,
            stage.batches_from,
            key,
            train.loop(),
            batch_size=recipe.data.batch_size,
            checkpoints=checkpoints,
            meta=meta,
            data_offset=data_offset,
            clock=clock,
            writer=writer,
            on_sample=preview(stage),
            on_model=lambda step, state: write_model(stage, state, workdir / "models" / f"{step:07d}"),
        )
    except SaveFailed as error:
        tell(f"error: {error}; free some space or make it writable, and run again")
        return SAVE_FAILED
    finally:
        checkpoints.close()
        clock.write()
        if writer is not None:
            writer.close()
    write_model(stage, state, workdir / "model")
    if stage.unread.count:
        tell(f"warning: {stage.unread}")
    tell(f"model at step {int(state.step)} written to {workdir / 'model'}")
    clock.write()
    tell(str(clock))
    processes.wait_for_all()
    return 0 if finished else STOPPED_EARLY


def write_model(stage: Stage, state: TrainState, folder: Path) -> None:
    """Called by all processes; the first one writes."""
    params = parallel.to_host(state.ema)
    if jax.process_index() == 0:
        with parallel.on_this_process():
            stage.finish(params, folder)


def preview(stage: Stage):
    """What `fit` calls, by all processes; the first one shows."""
    show = stage.on_sample

    def on_sample(step: int, state: TrainState, writer: MetricWriter | None) -> None:
        params = parallel.to_host(state.ema)
        if writer is not None and show is not None:
            with parallel.on_this_process():
                show(step, params, writer)

    return on_sample if show is not None else None


def tell(text: str) -> None:
    """To the console, by the first process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def report_changes(saved: dict[str, Any], meta: dict[str, Any]) -> None:
    """Say what differs between the run that wrote a checkpoint and this one."""
    serious, mild = describe_changes(saved.get("config", {}), meta["config"])
    if serious:
        tell(f"warning: settings changed, so this is not the run it would have been: {serious}")
    if mild:
        tell(f"settings changed: {mild}")
    if saved.get("code") != meta["code"]:
        tell(f"code changed: {saved.get('code')} -> {meta['code']}")


def run() -> None:
    """Entry point: one clear sentence and a non-zero exit code where the input is at fault."""
    flags.mark_flags_as_required(["config", "workdir"])
    run_script(main)


if __name__ == "__main__":
    run()
