"""What `public_weights.py` asks of both sides: networks and pipelines by family, and how a worker answers.

Neither torch nor JAX is imported here: each side runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

FULL: dict[str, dict[str, Any]] = {
    "modelscope": dict(_class_name="UNet3DConditionModel"),
    "svd": dict(_class_name="UNetSpatioTemporalConditionModel"),
    "animatediff": dict(_class_name="UNetMotionModel", cross_attention_dim=768),
    "i2vgen": dict(_class_name="I2VGenXLUNet"),
    "image": dict(_class_name="UNet2DConditionModel", cross_attention_dim=768),
}
"""The networks of the published checkpoints: the defaults of their classes, with SD 1.5's text features."""

PIPELINES: dict[str, dict[str, Any]] = {
    "modelscope": dict(attention_head_dim=32, cross_attention_dim=256),
    "animatediff": dict(attention_head_dim=4, cross_attention_dim=256),
    "svd": dict(
        num_attention_heads=(2, 4, 8, 8),
        cross_attention_dim=256,
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=192,
    ),
}
"""Pipelines whose speed is compared: all levels and layers of the published ones at a fifth of their width."""
CHANNELS = (64, 128, 256, 256)
AUTOENCODER_CHANNELS = (32, 64, 128, 128)
PROMPT, NEGATIVE, GUIDANCE = "a red circle moving right", "", 4.0


def full_inputs(config: dict[str, Any], num_frames: int, height: int, width: int) -> dict[str, Any]:
    """One clip of latents and everything else the network reads."""
    from golden.unet_cases import inputs

    return inputs(config, batch=1, frames=num_frames, height=height, width=width)


class MemoryWatch(threading.Thread):
    """The highest anonymous memory of this process (what is not backed by a file) since `start()`, in bytes.

    Pages of a file that is mapped while it is read come and go with the system's cache, so they are not counted.
    placed: bytes the caller says are where they shall stay; `transient` is the most there ever was beyond them.
    """

    def __init__(self, period_s: float = 0.002):
        super().__init__(daemon=True)
        self.period_s, self.done = period_s, threading.Event()
        self.baseline = self.peak = anonymous_bytes()
        self.placed = self.transient = 0

    def run(self) -> None:
        while not self.done.wait(self.period_s):
            self.look()

    def look(self) -> None:
        placed, now = self.placed, anonymous_bytes()
        self.peak = max(self.peak, now)
        self.transient = max(self.transient, now - self.baseline - placed)

    def finish(self) -> int:
        """Bytes above the beginning, at the highest."""
        self.look()
        self.done.set()
        self.join()
        return self.peak - self.baseline


def anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def peak_resident_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def answer(tasks: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The main function of a worker: its one argument names the task and its settings, the last line is the result."""
    request = json.loads(sys.argv[1])
    result = tasks[request.pop("task")](**request)
    result["peak_resident_gb"] = round(peak_resident_bytes() / 1e9, 3)
    print("\n" + json.dumps(result), flush=True)
    # Some libraries' threads outlive the interpreter's own end and crash there.
    os._exit(0)
