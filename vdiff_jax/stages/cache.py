"""The latent cache of a stage: clips encoded once, before anything else reads them."""

from __future__ import annotations

import sys

import jax
import numpy as np

from vdiff_jax import parallel
from vdiff_jax.components import Component
from vdiff_jax.data.cache_build import ensure_latent_cache
from vdiff_jax.recipe import DataConfig
from vdiff_jax.types import Array, Params


def fill_latent_cache(data: DataConfig, autoencoder: Component, params: Params, digest: str) -> None:
    """Encode the clips once, each process its share on its first device. Nothing without `data.latent_cache`.

    Raises TimeoutError where the share of another process does not come.
    """
    if not data.latent_cache:
        return
    # A mesh of its own, hence no collectives: processes have different numbers of frames to encode.
    alone = parallel.own_mesh()
    mine = jax.device_put(jax.tree.map(_here, params), parallel.replicated(alone))
    first = jax.process_index() == 0

    @jax.jit
    def encode_moments(params: Params, video: Array) -> Array:
        return autoencoder.apply(params, video, method="encode_moments")

    def encode(video: np.ndarray) -> np.ndarray:
        with jax.set_mesh(alone):
            return np.asarray(encode_moments(mine, jax.device_put(video, parallel.replicated(alone))))

    def progress(done: int, total: int) -> None:
        if first and (done == total or done * 10 // total != (done - 1) * 10 // total):  # every tenth
            share = "" if jax.process_count() == 1 else " of this process"
            print(f"latent cache {data.latent_cache}: {done} of {total} clips{share} encoded", file=sys.stderr)

    report = ensure_latent_cache(
        data,
        encode,
        digest,
        progress=progress,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if first and report is not None and report.count:
        print(report, file=sys.stderr)


def _here(value: Array) -> np.ndarray:
    """A parameter that is whole on every device, on the host."""
    return np.asarray(value.addressable_data(0)) if isinstance(value, jax.Array) else np.asarray(value)
