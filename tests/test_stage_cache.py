"""The latent cache of a stage built by two real processes that share one mesh: the same files as by one."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from vdiff_jax.data.video_io import Clip
from vdiff_jax.recipe import DataConfig
from vdiff_jax.stages.cache import fill_latent_cache

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
import jax
from tiny_model import tiny_model
from vdiff_jax import parallel
from vdiff_jax.recipe import DataConfig
from vdiff_jax.stages.cache import fill_latent_cache

index, port, folder, cache = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
model = tiny_model()
mesh = parallel.make_mesh()
with jax.set_mesh(mesh):  # as train.py does it, with parameters on all devices of all processes
    params = jax.device_put(jax.device_get(model.params["autoencoder"]), parallel.replicated(mesh))
    data = DataConfig(source="folder", folder=folder, split="all", size=16, num_frames=2, latent_cache=cache)
    fill_latent_cache(data, model.components["autoencoder"], params, "abc")
"""


def build_by_two(folder, cache):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROGRAM]
    arguments = [[str(index), str(port), str(folder), str(cache)] for index in range(2)]
    children = [
        subprocess.Popen(command + each, env=environment, stderr=subprocess.PIPE, text=True) for each in arguments
    ]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert not any(child.returncode for child in children), said
    return said


def test_two_processes_build_the_cache_that_one_builds(tmp_path, model):
    rng = np.random.default_rng(0)
    for index in range(5):
        Clip(rng.integers(0, 256, (3 + index, 16, 16, 3), np.uint8), 8.0).save(tmp_path / "clips" / str(index))
    data = DataConfig(source="folder", folder=str(tmp_path / "clips"), split="all", size=16, num_frames=2)
    data = dataclasses.replace(data, latent_cache=str(tmp_path / "one"))
    fill_latent_cache(data, model.components["autoencoder"], model.params["autoencoder"], "abc")
    said = build_by_two(tmp_path / "clips", tmp_path / "two")
    assert "3 of 3 clips of this process encoded" in said[0] and "encoded" not in said[1]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(names) == 5 + 5 + 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert len(json.loads((tmp_path / "two" / "index.json").read_text())["clips"]) == 5
