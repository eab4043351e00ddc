"""One training run of a stage, from the look before it to the finished model: what `train.py` starts."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vdiff_jax import parallel, processes
from vdiff_jax.data.cache_build import has_latent_cache
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.preflight import check_run_data, check_run_memory
from vdiff_jax.recipe import Recipe, TrainConfig, section
from vdiff_jax.stages import Stage, make_stage
from vdiff_jax.training.checkpoint import Checkpoints, SaveFailed
from vdiff_jax.training.config_changes import describe_changes
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.loop import SIGNAL, fit
from vdiff_jax.training.manifest import code_version
from vdiff_jax.training.optimizer import OptimizerConfig, make_optimizer
from vdiff_jax.training.step import TrainState, abstract_state, init_sharded_state, make_train_step
from vdiff_jax.training.writers import MetricWriter

SAVE_FAILED = 74  # the last checkpoint could not be written: nothing after the one before is saved
STOPPED_EARLY = 75  # stopped by a signal or the time limit, with a checkpoint: run again to go on


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run needs before any memory is taken. abstract: the state's shapes with their shardings."""

    recipe: Recipe
    train: TrainConfig
    mesh: Mesh
    workdir: Path
    clock: Goodput
    stage: Stage
    optimizer: Any
    abstract: TrainState
    train_step: Any
    checkpoints: Checkpoints


def prepare_run(recipe: Recipe, mesh: Mesh, workdir: Path, clock: Goodput, *, look_only: bool = False) -> Run:
    """Data, networks and the step, looked at: what cannot work is refused here, see `preflight`.

    look_only: no latent cache is built; where there is none yet, clips are decoded for the look.
    """
    cache = recipe.data.latent_cache
    if look_only and cache and not has_latent_cache(cache):
        tell(f"data.latent_cache={cache} is not built yet: training will first encode all clips")
        recipe = recipe.copy_and_resolve_references()
        recipe.data.latent_cache = ""
    train: TrainConfig = section(recipe, "train", TrainConfig)

    def look(whole: Recipe) -> None:
        if report := check_run_data(whole, mesh):
            tell(str(report))

    stage = make_stage(recipe, mesh, workdir, look)
    if stage.left_out.count:
        tell(f"warning: {stage.left_out}")
    optimizer = make_optimizer(section(recipe, "optimizer", OptimizerConfig), train.num_steps)
    abstract = abstract_state(stage.init, optimizer, mesh)
    state_gb = parallel.bytes_per_device(abstract) / 1e9
    tell(f"{parameter_count(abstract.params) / 1e6:.2f} M trainable parameters, {state_gb:.3f} GB of state a device")
    patience = 10 * (train.heartbeat_s or 100.0)  # half of what the heartbeat allows
    checkpoints = Checkpoints(
        workdir, keep=train.keep_checkpoints, keep_every=train.keep_every_steps, timeout_s=patience
    )
    if not train.partial_restore:
        checkpoints.check(abstract)
    train_step = make_train_step(
        stage.loss_fn,
        optimizer,
        mesh,
        _shardings(abstract),
        ema_decay=train.ema_decay,
        accumulation_steps=train.accumulation_steps,
        spike_sigmas=train.spike_sigmas,
        frozen=stage.frozen,
    )
    clock.enter("compile")
    for memory in check_run_memory(stage, train_step, abstract, train.memory_limit_gb):
        tell(str(memory))
    clock.enter("startup")
    return Run(recipe, train, mesh, workdir, clock, stage, optimizer, abstract, train_step, checkpoints)


def carry_out(run: Run) -> int:
    """Train to the end or the time limit and write the model, or to a signal and do not; returns the exit code."""
    stage, workdir, clock, key = run.stage, run.workdir, run.clock, jax.random.key(run.recipe.seed)
    meta = {"config": json.loads(run.recipe.to_json_best_effort()), "code": code_version()}
    run.checkpoints.begin()
    state, data_offset = _first_state(run, key, meta)
    clock.resumed(int(state.step))
    writer = MetricWriter(workdir) if jax.process_index() == 0 else None
    if writer is not None:
        unfinished = workdir / "recipe.json.unfinished"
        unfinished.write_text(run.recipe.to_json_best_effort(indent=2) + "\n", encoding="utf-8")
        unfinished.replace(workdir / "recipe.json")
    try:
        with run.checkpoints:
            state, stopped = fit(
                state,
                run.train_step,
                stage.batches_from,
                key,
                run.train.loop(),
                batch_size=run.recipe.data.batch_size,
                checkpoints=run.checkpoints,
                meta=meta,
                data_offset=data_offset,
                clock=clock,
                writer=writer,
                on_sample=_preview(stage),
                on_model=lambda step, state: _write_model(stage, state, workdir / "models" / f"{step:07d}"),
            )
    except SaveFailed as error:
        tell(f"error: {error}; free some space or make it writable, and run again")
        return SAVE_FAILED
    finally:
        clock.write()
        if writer is not None:
            writer.close()
    if stage.unread.count:
        tell(f"warning: {stage.unread}")
    if stopped == SIGNAL:  # the machine may be gone before a model is written
        tell(f"stopped at step {int(state.step)} without a model: run again to go on and write it at the end")
    else:
        _write_model(stage, state, workdir / "model")
        tell(f"model at step {int(state.step)} written to {workdir / 'model'}")
    clock.write()
    tell(str(clock))
    processes.wait_for_all()
    return 0 if stopped is None else STOPPED_EARLY


def _first_state(run: Run, key: jax.Array, meta: dict[str, Any]) -> tuple[TrainState, int]:
    """(state born sharded, or of the newest checkpoint; how far the data are ahead of its step)."""

    def fresh() -> TrainState:
        return init_sharded_state(run.stage.init, run.optimizer, key, run.mesh, start=run.stage.start)[0]

    if run.checkpoints.latest_step is None:
        return fresh(), 0
    rest = fresh() if run.train.partial_restore else None
    state, saved = run.checkpoints.restore(run.abstract, _shardings(run.abstract), fresh=rest)
    tell(f"resumed at step {int(state.step)}")
    _report_changes(saved, meta)
    return state, saved.get("data_offset", 0)


def _shardings(abstract: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _write_model(stage: Stage, state: TrainState, folder: Path) -> None:
    """Called by all processes; the first one writes."""
    params = parallel.to_host(state.ema)
    if jax.process_index() == 0:
        with parallel.on_this_process():
            stage.finish(params, folder)


def _preview(stage: Stage):
    """What `fit` calls, by all processes; the first one shows."""
    show = stage.on_sample

    def on_sample(step: int, state: TrainState, writer: MetricWriter | None) -> None:
        params = parallel.to_host(state.ema)
        if writer is not None and show is not None:
            try:
                with parallel.on_this_process():
                    show(step, params, writer)
            except OSError as error:  # as of a full disk: no reason to end a run
                warnings.warn(f"the preview of step {step} cannot be written: {error}", stacklevel=2)

    return on_sample if show is not None else None


def _report_changes(saved: dict[str, Any], meta: dict[str, Any]) -> None:
    """Say what differs between the run that wrote a checkpoint and this one."""
    serious, mild = describe_changes(saved.get("config", {}), meta["config"])
    if serious:
        tell(f"warning: settings changed, so this is not the run it would have been: {serious}")
    if mild:
        tell(f"settings changed: {mild}")
    if saved.get("code") != meta["code"]:
        tell(f"code changed: {saved.get('code')} -> {meta['code']}")


def tell(text: str) -> None:
    """To the console, by the first process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)
