"""Models on the Hugging Face hub: fetched once into its cache, safetensors and json only, never a pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TEXTS = ("*.json", "*.txt", "*.model")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name has the form owner/name, and is no path that exists."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def download(name: str, *, variant: str | None = None, revision: str | None = None, cache_dir: Any = None) -> Path:
    """The folder of a hub model in the local cache; what is there already is not fetched again.

    variant: "fp16" and the like fetches only those weights; None only the plain ones. revision: branch, tag or commit.
    cache_dir: default that of huggingface_hub (HF_HOME); HF_HUB_OFFLINE=1 keeps to the cache.
    Raises FileNotFoundError, with the reason, if the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"no folder {name!r} here, and to fetch it from the hub huggingface_hub is needed: "
            "pip install 'vdiff_jax[hub]'"
        ) from error
    weights = f"*.{variant}*.safetensors*" if variant else "*.safetensors*"
    ignore = None if variant else ["*.fp16*", "*.bf16*", "*non_ema*"]
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=[*TEXTS, weights], ignore_patterns=ignore
        )
    except Exception as error:  # its errors have no common class: missing, private, offline, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no folder {name!r} here, and the hub does not give it: {reason}") from error
    return Path(folder)
