"""Where metrics go: `metrics.jsonl`, TensorBoard, and a progress line on the console."""

from __future__ import annotations

import errno
import io
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Scalars = dict[str, float]


class MetricWriter:
    """Appends scalars to `<workdir>/metrics.jsonl` and to TensorBoard, and images to TensorBoard.

    Only the first process should make one. Lines already written survive a resumed run; a step may appear twice after
    a crash, the later line is the one that counts. A line that cannot be written is left out, with one warning.
    """

    def __init__(self, workdir: str | Path):
        from tensorboardX import SummaryWriter

        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._lines = self._path.open("ab", buffering=0)  # a buffer would keep what a full disk has refused
        # Its queue has no bound: it is emptied by a thread that a full disk ends, and no one must wait for that.
        self._board = SummaryWriter(str(folder / "tensorboard"), max_queue=0)
        self._warned = False

    def scalars(self, step: int, values: Scalars) -> None:
        record: dict[str, Any] = {"step": step, **{name: float(value) for name, value in values.items()}}
        line = (json.dumps(record) + "\n").encode()
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            if self._lines.write(line) != len(line):
                self._lines.truncate(before)  # no half a line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn(error)
        if self._alive():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """image: u8 [h w 3]."""
        if not self._alive():
            return
        self._board.add_image(name, image, step, dataformats="HWC")

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """frames: u8 [b f h w 3]; stored as one animated gif, clips side by side."""
        from PIL import Image
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if not self._alive():
            return
        # The board's own add_video asks for another package; its summary is only an encoded gif.
        wide = np.concatenate(list(frames), axis=2)
        first, *rest = [Image.fromarray(frame) for frame in wide]
        encoded = io.BytesIO()
        first.save(encoded, "gif", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        height, width = wide.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
        assert self._board.file_writer is not None
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self._lines.close()
        if not self._alive():
            return
        try:
            self._board.close()
        except OSError as error:
            self._warn(error)

    def _alive(self) -> bool:
        """Whether TensorBoard's thread still writes."""
        writer: Any = self._board.file_writer
        events = writer.event_writer
        if events._worker is None or events._worker.is_alive():
            return events._worker is not None
        events._event_queue.cancel_join_thread()  # what is left in it would keep the process from ending
        self._warn(OSError(errno.EIO, "TensorBoard's file could not be written, and is not gone on with"))
        return False

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(f"metrics in {self._path.parent} are not complete: {error.strerror or error}", stacklevel=3)
        self._warned = True


class ProgressLine:
    """One live line: step, loss, clips per second, time left. Plain lines when the console is not a terminal.

    quiet: show nothing, as in all processes but the first.
    """

    def __init__(self, num_steps: int, start_step: int, batch_size: int, quiet: bool = False):
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} clips/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=start_step, loss=float("nan"), speed=0.0)
        self._num_steps, self._batch_size = num_steps, batch_size
        self._since, self._since_step = time.monotonic(), start_step
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Scalars) -> float:
        """Show a metrics line; returns clips per second since the last report."""
        now = time.monotonic()
        speed = (step - self._since_step) * self._batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        self._bar.update(self._task, completed=step, loss=values.get("loss", float("nan")), speed=speed)
        if not self._live:
            left = (self._num_steps - step) * self._batch_size / max(speed, 1e-9)
            self._console.print(
                f"step {step}/{self._num_steps}  loss {values.get('loss', float('nan')):.4f}  {speed:.1f} clips/s  "
                f"{left / 60:.0f} min left",
                highlight=False,
            )
        return speed

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        self._bar.stop()
