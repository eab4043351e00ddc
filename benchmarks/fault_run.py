"""A small run under the real step, loop, loader and checkpoints, which logs every clip that it trains on.

    python benchmarks/fault_run.py '{"workdir": "somewhere", "steps": 20, "interval": 2}'

`checkpoint_faults.py` and `two_processes.py` start it, kill it and start it again. With "processes", "process" and
"port" it is one of several; "heartbeat" is `train.heartbeat_s`, "stall" the step whose batch never comes,
"broken" the one whose batch cannot be read, "pause" seconds before each batch. Exit codes are those of `train.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from vdiff_jax import parallel, processes
from vdiff_jax.data.loader import Loader
from vdiff_jax.training.checkpoint import Checkpoints
from vdiff_jax.training.goodput import Goodput
from vdiff_jax.training.loop import LoopConfig, fit
from vdiff_jax.training.step import init_sharded_state, make_train_step

BATCH_SIZE, CLIPS = 8, 37


class Clips:
    """A source of 37 clips `[2 4 4 3]` whose names are their numbers."""

    def __len__(self) -> int:
        return CLIPS

    def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        frames = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
        return {"frames": frames, "caption": "", "name": str(index)}


def make_loader() -> Loader:
    return Loader(
        Clips(), None, BATCH_SIZE, seed=3, process_index=jax.process_index(), process_count=jax.process_count()
    )


def start(mesh: jax.sharding.Mesh):
    """(state, shardings, step): a small regression under the real step, with noise drawn from its keys."""

    def init(key):
        return {"kernel": jax.random.normal(key, (96, 256)) / 10, "bias": jnp.zeros(256)}

    def loss_fn(params, batch, keys):
        video = batch["video"].reshape(batch["video"].shape[0], -1)
        noise = jax.vmap(lambda key: jax.random.normal(key, (256,)))(keys)
        return jnp.mean(jnp.square(video @ params["kernel"] + params["bias"][None] - noise)), {}

    # A large epsilon: rounding, which the devices decide, would else be blown up where gradients are small.
    optimizer = optax.adamw(1e-2, eps=1e-3)
    state, shardings = init_sharded_state(init, optimizer, jax.random.key(1), mesh)
    return state, shardings, make_train_step(loss_fn, optimizer, mesh, shardings, ema_decay=0.9)


def train(
    workdir: Path,
    steps: int,
    interval: int,
    *,
    heartbeat: float = 100.0,
    stall: int = -1,
    broken: int = -1,
    pause: float = 0.0,
    clock: Goodput | None = None,
) -> Any:
    """Run or take up a run; `workdir/clips.<process>.jsonl` gets a line at each start and each step's clips."""
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh), (workdir / f"clips.{jax.process_index()}.jsonl").open("a") as log:
        state, shardings, step = start(mesh)
        checkpoints = Checkpoints(workdir, keep=2)
        checkpoints.begin()
        if checkpoints.latest_step is not None:
            state, _ = checkpoints.restore(jax.eval_shape(lambda tree: tree, state), shardings)
        print(json.dumps({"start": int(state.step)}), file=log, flush=True)

        def batches(first: int) -> Iterator[Any]:
            for number, batch in enumerate(make_loader().host_batches(first), first):
                time.sleep(10**6 if number == stall else pause)
                if number == broken:
                    raise OSError(f"no clip for step {number}")
                print(json.dumps({"step": number, "clips": batch.names}), file=log, flush=True)
                yield parallel.shard_batch({"video": batch.arrays["video"]}, mesh)

        config = LoopConfig(steps, log_steps=0, checkpoint_steps=interval, heartbeat_s=heartbeat)
        with checkpoints:
            state, _ = fit(
                state,
                step,
                batches,
                jax.random.key(2),
                config,
                batch_size=BATCH_SIZE,
                checkpoints=checkpoints,
                meta={},
                clock=clock,
            )
        return state


def main(workdir: str, steps: int, interval: int = 2, **settings: Any) -> int:
    flags.FLAGS(sys.argv[:1])  # grain reads them
    logging.set_verbosity(logging.WARNING)
    count, process, port = (settings.pop(name, 0) for name in ("processes", "process", "port"))
    if count > 1:
        heartbeat = settings.get("heartbeat", 100)
        processes.start_distributed(f"localhost:{port}", count, process, heartbeat_s=heartbeat)
    clock = Goodput()
    with processes.one_ends_all(lambda: f"after step {clock.step}"):
        state = train(Path(workdir), steps, interval, clock=clock, **settings)
        return 0 if int(state.step) >= steps else 75


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
