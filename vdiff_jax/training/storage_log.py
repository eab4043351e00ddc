"""Keeps a full disk to one sentence: what the storage library logs of its own errors, it also raises."""

from __future__ import annotations

import logging
import os
import traceback

_LIBRARY = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


def log_storage_errors_once() -> None:
    """Drop error records that come from within orbax, as their errors reach us as exceptions and are told.

    For each array that could not be written it would log a traceback. `VDIFF_TRACEBACK=1` keeps them.
    """
    if not os.environ.get("VDIFF_TRACEBACK"):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_repeated)


def _is_not_repeated(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return True
    raised = record.exc_info[2] if record.exc_info else None
    places = [frame.filename for frame in traceback.extract_tb(raised)]
    return not any(_LIBRARY in place for place in [record.pathname, *places])
