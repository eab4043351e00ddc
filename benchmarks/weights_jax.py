"""Our side of `public_weights.py`: the same folders loaded, predicted with and sampled from."""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from weights_cases import GUIDANCE, NEGATIVE, PROMPT, MemoryWatch, answer, full_inputs

import vdiff_jax as vd
from vdiff_jax import parallel
from vdiff_jax.components import Component, make_component
from vdiff_jax.interop.pretrained import load_json
from vdiff_jax.interop.unet_rules import unet_rules
from vdiff_jax.interop.unets import IGNORED_KEYS, unet_settings
from vdiff_jax.interop.weight_files import Weights, open_weights
from vdiff_jax.interop.weights import load_params
from vdiff_jax.types import Conditioning, Params


def on_one_device(abstract: Params) -> Any:
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)


def over_all_devices(abstract: Params) -> Any:
    return parallel.tree_shardings(abstract, parallel.make_mesh(data=1, fsdp=jax.device_count()))


PLACES = {"host": None, "one_device": on_one_device, "all_devices": over_all_devices}


def load_unet(folder: str, place: str, dtype: str = "float32") -> tuple[Component, Params]:
    component = make_component("unet", unet_settings(load_json(Path(folder) / "config.json")))
    abstract, weights, shard = component.abstract, open_weights(folder), PLACES[place]
    shardings = None if shard is None else shard(abstract)
    rules = unet_rules(component.config)
    return component, load_params(weights, rules, abstract, ignore=IGNORED_KEYS, dtype=dtype, shardings=shardings)


def predict(family: str, folder: str, out: str, num_frames: int, height: int, width: int) -> dict[str, Any]:
    """The full-size UNet's prediction, `[b f h w c]`, as an array file."""
    config = json.loads((Path(folder) / "config.json").read_text())
    values = full_inputs(config, num_frames, height, width)
    began = time.perf_counter()
    component, params = load_unet(folder, "one_device")
    loaded = time.perf_counter()
    shape = values["z"].shape
    times = jnp.arange(shape[1], dtype=jnp.float32)[None]
    extra = {
        name: jnp.asarray(values[name]) for name in ("image_latents", "image_embedding", "added") if name in values
    }
    cond = Conditioning(jnp.asarray(values["text"]), None, times, **extra)
    timestep = jnp.full(shape[:2], values["timestep"], jnp.float32)
    nothing = jnp.zeros((*shape[:4], 1)), jnp.full(shape[:2], 10.0)
    args = (params, jnp.asarray(values["z"]), timestep, *nothing, cond)
    compiled = jax.jit(component.apply).lower(*args).compile()
    ready = time.perf_counter()
    np.save(out, np.asarray(compiled(*args)))
    return {"load_s": loaded - began, "compile_s": ready - loaded, "predict_s": time.perf_counter() - ready}


def load_memory(folder: str, place: str, dtype: str) -> dict[str, Any]:
    """What loading takes: memory of the process above that before, beyond the parameters themselves, and the time.

    place "host": arrays of numpy, then all of them to the device.
    """
    jax.block_until_ready(jnp.zeros(()) + 1)  # the runtime's own memory comes before what is counted
    watch = MemoryWatch()
    largest = _watch_reads(watch, jnp.dtype(dtype).itemsize)
    began = time.perf_counter()
    watch.start()
    _, params = load_unet(folder, place, dtype)
    if place == "host":
        params = jax.tree.map(jnp.asarray, params)
    jax.block_until_ready(params)
    seconds, above = time.perf_counter() - began, watch.finish()
    leaves = jax.tree.leaves(params)
    total = sum(leaf.nbytes for leaf in leaves)
    return {
        "devices": len(leaves[0].sharding.device_set),
        "parameters_gb": total / 1e9,
        "shard_gb": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / 1e9,
        "peak_above_start_gb": above / 1e9,
        "peak_ratio": above / total,
        "beyond_what_is_placed_gb": watch.transient / 1e9,
        "largest_tensor_gb": largest[0] / 1e9,
        "load_s": seconds,
    }


def _watch_reads(watch: MemoryWatch, itemsize: int) -> list[int]:
    """Tell the watch of every tensor that is placed: when the next one is read. The list holds the largest's bytes."""
    read, largest, before = Weights.read, [0], [0]

    def measured(weights: Weights, name: str) -> np.ndarray:
        watch.placed += before[0]
        tensor = read(weights, name)
        largest[0], before[0] = max(largest[0], tensor.nbytes), tensor.size * itemsize
        return tensor

    Weights.read = measured  # type: ignore[method-assign]
    return largest


def sample(family: str, folder: str, steps: int, num_frames: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of the model from prompt, or picture, to frames; the first run, which compiles, is told by itself."""
    model = vd.load(folder)
    asked: dict[str, Any] = dict(size=size, num_frames=num_frames, steps=steps)
    if family == "svd":
        picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        generate = functools.partial(model.animate, picture, guidance_scale=3.0, **asked)
    else:
        generate = functools.partial(model.generate, PROMPT, negative_prompt=NEGATIVE, guidance_scale=GUIDANCE, **asked)
    runs = []
    for _ in range(1 + repeats):
        wall, processor = time.perf_counter(), time.process_time()
        frames = generate().frames
        runs.append((time.perf_counter() - wall, time.process_time() - processor))
    assert frames.shape == (num_frames, size, size, 3) and frames.std() > 2
    return {"first_s": runs[0][0], "runs": runs[1:], "flags": os.environ.get("XLA_FLAGS", "")}


if __name__ == "__main__":
    answer({"predict": predict, "load_memory": load_memory, "sample": sample})
