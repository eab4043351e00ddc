"""The latent cache of a stage: clips encoded once, before anything else reads them."""

from __future__ import annotations

import sys
from typing import Any

import jax

from vdiff_jax.components import Component
from vdiff_jax.data.latent_cache import ensure_latent_cache
from vdiff_jax.recipe import DataConfig
from vdiff_jax.types import Params


def fill_latent_cache(data: DataConfig, autoencoder: Component, params: Params, digest: str) -> None:
    """Encode the clips once, by the first process; the others wait for it. Nothing without `data.latent_cache`."""
    if not data.latent_cache:
        return
    if jax.process_index() == 0:
        encode: Any = jax.jit(lambda video: autoencoder.apply(params, video, method="encode_moments"))

        def progress(done: int, total: int) -> None:
            if done == total or done * 10 // total != (done - 1) * 10 // total:  # every tenth
                print(f"latent cache {data.latent_cache}: {done} of {total} clips encoded", file=sys.stderr)

        report = ensure_latent_cache(data, encode, digest, progress=progress)
        if report is not None and report.count:
            print(report, file=sys.stderr)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("latent cache")
