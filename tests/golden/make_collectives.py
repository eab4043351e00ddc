"""Writes `collectives.json`: what one training step sends on 8 simulated devices, by mesh.

PYTHONPATH=tests python tests/golden/make_collectives.py
"""

import json
from pathlib import Path

import conftest  # noqa: F401, devices and compiler settings of the tests
import jax
from test_parallel import three_steps

from vdiff_jax.collectives import histogram

meshes = {name: histogram(three_steps(name).sent) for name in ("8x1x1", "2x2x2")}
record = {"jax": jax.__version__, "meshes": meshes}
Path(__file__).with_name("collectives.json").write_text(json.dumps(record, indent=1) + "\n")
