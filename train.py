"""Train a stage of a model: the autoencoder or the diffusion network.

    python train.py --config=configs/shapes_autoencoder.py --workdir=runs/shapes_autoencoder
    python train.py --config=configs/shapes.py --workdir=runs/shapes
    python train.py --config=configs/folder.py --workdir=runs/mine --config.data.folder=my_clips
    python train.py --config=configs/finetune.py --workdir=runs/tuned --config.data.folder=my_clips \\
        --config.init_from=a_diffusers_pipeline

Any setting can be changed on the command line: --config.train.num_steps=2000 --config.optimizer.learning_rate=5e-4.
Running the same command again resumes from the newest checkpoint. Ctrl-C or SIGTERM stops after a checkpoint.
The work folder receives checkpoints/, metrics.jsonl, tensorboard/, samples/, model/ (the finished model) and,
with --config.train.model_steps=500, models/0000500 and so on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from vdiff_jax import parallel
from vdiff_jax.command import run_script
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.recipe import TrainConfig, section
from vdiff_jax.stages import make_stage
from vdiff_jax.training.checkpoint import Checkpoints, SaveFailed
from vdiff_jax.training.config_changes import describe_changes
from vdiff_jax.training.loop import fit
from vdiff_jax.training.manifest import code_version
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import TrainState, init_sharded_state, make_train_step
from vdiff_jax.training.writers import MetricWriter

SAVE_FAILED = 74  # the last checkpoint could not be written: nothing after the one before is saved
STOPPED_EARLY = 75  # stopped by a signal or the time limit, with a checkpoint: run again to go on
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made if missing, resumed if not empty.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host run first.")


def main(_: list[str]) -> int:
    # --- processes and devices
    if _DISTRIBUTED.value:
        parallel.start_distributed()
    recipe = _CONFIG.value
    mesh = parallel.make_mesh(**recipe.parallel)
    workdir = Path(_WORKDIR.value or ".")
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file: give a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    first = jax.process_index() == 0
    if first:
        print(f"{recipe.stage} stage, mesh {parallel.describe(mesh)}, in {workdir}", file=sys.stderr)

    with jax.set_mesh(mesh):
        # --- data, networks, loss
        stage = make_stage(recipe, mesh, workdir)
        if first and stage.left_out.count:
            print(f"warning: {stage.left_out}", file=sys.stderr)
        train = section(recipe, "train", TrainConfig)
        optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), train.num_steps)

        # --- state: shapes first, then memory, then the newest checkpoint if there is one
        key = jax.random.key(recipe.seed)
        state, shardings = init_sharded_state(stage.init, optimizer, key, mesh, start=stage.start)
        checkpoints = Checkpoints(workdir, keep=train.keep_checkpoints, keep_every=train.keep_every_steps)
        config = json.loads(recipe.to_json_best_effort())
        if checkpoints.latest_step is not None:
            fresh, abstract = (state if train.partial_restore else None), jax.eval_shape(lambda tree: tree, state)
            del state  # its memory is needed for the restored one
            state, meta = checkpoints.restore(abstract, shardings, fresh=fresh)
            del fresh
            if first:
                print(f"resumed at step {int(state.step)}", file=sys.stderr)
                report_changes(meta, config)
        train_step = make_train_step(
            stage.loss_fn,
            optimizer,
            mesh,
            shardings,
            ema_decay=train.ema_decay,
            accumulation_steps=train.accumulation_steps,
            frozen=stage.frozen,
        )

        # --- the loop, and the finished model
        writer = MetricWriter(workdir) if first else None
        if first:
            (workdir / "recipe.json").write_text(recipe.to_json_best_effort(indent=2) + "\n", encoding="utf-8")
            print(f"{parameter_count(state.params) / 1e6:.2f} M trainable parameters", file=sys.stderr)

        def write_model(state: TrainState, folder: Path) -> None:
            params = parallel.to_host(state.ema)
            if first:
                with parallel.on_this_process():
                    stage.finish(params, folder)

        def preview(step: int, state: TrainState, writer: MetricWriter | None) -> None:
            params = parallel.to_host(state.ema)
            if writer is not None and stage.on_sample is not None:
                with parallel.on_this_process():
                    stage.on_sample(step, params, writer)

        try:
            state, finished = fit(
                state,
                train_step,
                stage.batches_from(int(state.step)),
                key,
                train.loop(),
                batch_size=recipe.data.batch_size,
                checkpoints=checkpoints,
                meta={"config": config, "code": code_version()},
                writer=writer,
                on_sample=preview if stage.on_sample is not None else None,
                on_model=lambda step, state: write_model(state, workdir / "models" / f"{step:07d}"),
            )
        except SaveFailed as error:
            print(f"error: {error}; free some space or make it writable, and run again", file=sys.stderr)
            return SAVE_FAILED
        finally:
            checkpoints.close()
            if writer is not None:
                writer.close()
        write_model(state, workdir / "model")
        if first:
            if stage.unread.count:
                print(f"warning: {stage.unread}", file=sys.stderr)
            print(f"model at step {int(state.step)} written to {workdir / 'model'}", file=sys.stderr)
    return 0 if finished else STOPPED_EARLY


def report_changes(meta: dict[str, Any], config: dict[str, Any]) -> None:
    """Say what differs between the run that wrote a checkpoint and this one."""
    serious, mild = describe_changes(meta.get("config", {}), config)
    if serious:
        print(f"warning: settings changed, so this is not the run it would have been: {serious}", file=sys.stderr)
    if mild:
        print(f"settings changed: {mild}", file=sys.stderr)
    if meta.get("code") != code_version():
        print(f"code changed: {meta.get('code')} -> {code_version()}", file=sys.stderr)


def run() -> None:
    """Entry point: one clear sentence and a non-zero exit code where the input is at fault."""
    flags.mark_flags_as_required(["config", "workdir"])
    run_script(main)


if __name__ == "__main__":
    run()
