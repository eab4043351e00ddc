"""Train, sample and edit video with latent diffusion in JAX."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Clip": "vdiff_jax.data.video_io",
    "read_video": "vdiff_jax.data.video_io",
    "VideoDiffusion": "vdiff_jax.pipeline",
    "load": "vdiff_jax.pipeline",
    "Editor": "vdiff_jax.editor",
    "Degradation": "vdiff_jax.editing.degradations",
    "apply_effects": "vdiff_jax.data.effects",
    "make_mask": "vdiff_jax.data.masks",
    "Conditioning": "vdiff_jax.types",
    "Job": "vdiff_jax.types",
    "Known": "vdiff_jax.types",
    "UNetConfig": "vdiff_jax.models.unet_config",
    "AutoencoderConfig": "vdiff_jax.models.autoencoder",
    "TextEncoderConfig": "vdiff_jax.models.text_encoder",
    "make_sampler": "vdiff_jax.sampling.samplers",
    "sample": "vdiff_jax.sampling.samplers",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import vdiff_jax` is cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vdiff_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
