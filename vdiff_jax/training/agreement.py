"""What all processes of a run must agree on, outside the jitted step. With one process, nothing is sent."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST = 2048  # bytes of a message


def from_first(value: Any) -> Any:
    """What process 0 passes, on every process. value: anything JSON can hold; that of other processes is not read."""
    if jax.process_count() == 1:
        return value
    first = jax.process_index() == 0
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if first else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = text if first else np.zeros(length, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8)))


def first_message(message: str | None) -> str | None:
    """The message of the first process that has one, on every process; None if none has. Cut at 2048 bytes."""
    if jax.process_count() == 1:
        return message
    own = (message or "").encode()[:_LONGEST]
    padded = np.frombuffer(own.ljust(_LONGEST, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8).reshape(-1, _LONGEST)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return next((text for text in texts if text), None)
