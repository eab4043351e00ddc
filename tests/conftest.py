"""Settings every test shares: simulated devices, the compile cache, strict shapes, one tiny model."""

import ctypes
import gc
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
# Most programs are large and run once or twice: what compiles soonest is best, here and in processes of scripts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/vdiff_jax/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
    flags.FLAGS(["pytest"])


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs pile up over the files; beyond 2 GB they are dropped, and come back from the disk cache."""
    yield
    if _resident_memory() > 2e9:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # the allocator keeps what was freed, unless it is told
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident_memory() -> int:
    """Bytes; 0 where it cannot be told."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(scope="session")
def model():
    """The shared toy model, see tiny_model.py; its jitted functions stay warm over the session."""
    from tiny_model import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    """The same model as a saved folder; read only."""
    folder = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def optimised():
    """Programs as fast as in use, which take twice as long to compile: for files that run theirs for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
