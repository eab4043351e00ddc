"""Models on the Hugging Face hub: fetched once into its cache, safetensors and json only, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = ("*.json", "*.txt", "*.model")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name has the form owner/name, and is no path that exists."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def download(
    name: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: Any = None,
    parts: Sequence[str] = (),
) -> Path:
    """The folder of a hub model in the local cache; what is there already is not fetched again.

    variant: "fp16" and the like fetches only those weights; None only the plain ones. revision: branch, tag or commit.
    cache_dir: default that of huggingface_hub (HF_HOME); HF_HUB_OFFLINE=1 keeps to the cache.
    parts: subfolders to fetch, with the texts beside them: a pipeline's repository often holds the same weights once
        more in one large file. None named: the whole repository's safetensors.
    Raises FileNotFoundError, with the reason, if the model cannot be had or holds no weights of that variant.
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
    wanted = [*TEXTS, weights]
    if parts:  # a star also stands for the slash
        wanted = ["model_index.json", *(f"{part}/{pattern}" for part in parts for pattern in (*TEXTS, weights))]
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=wanted, ignore_patterns=ignore or None
        )
    except Exception as error:  # its errors have no common class: missing, private, offline, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no folder {name!r} here, and the hub does not give it: {reason}") from error
    if not any(Path(folder).rglob("*.safetensors")):
        raise FileNotFoundError(
            f"{name} on the hub has no {'plain' if variant is None else variant} safetensors weights: it may hold "
            "another variant (variant='fp16'), or pickles only, which are never opened: look for a converted copy"
        )
    return Path(folder)
