"""Where the wall time of a run goes, over all its restarts: `<workdir>/goodput.json`."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from vdiff_jax.training.writers import Scalars

FILE_NAME = "goodput.json"
PHASES = ("step", "compile", "data", "checkpoint", "startup", "export", "lost")
"""step: the productive part; data: the devices wait for a batch; startup: imports, data and networks, restoring;
export: previews and models; lost: steps that were done again, after a crash or to leave a bad stretch."""
_REMEMBERED = 32  # checkpoints whose productive time is kept


class Goodput:
    """The clock of a run: each moment counts as one phase, so they add up to the wall time since the process began.

    workdir: where the totals of earlier processes are found and kept; None keeps nothing. `now` is the phase and when
    it began (`time.monotonic`), for another thread to watch; `longest` the longest time in each, the first left out.
    """

    def __init__(self, workdir: Path | None = None):
        self._path = None if workdir is None else workdir / FILE_NAME
        before = _read(self._path)
        self.seconds: dict[str, float] = before["seconds"]
        self._saved: dict[int, float] = before["saved"]
        self._starts: int = before["starts"] + 1
        self.now = ("startup", time.monotonic() - process_age_s())
        self._counted = self.now[1]
        self.step = 0
        self.longest: dict[str, float] = {}
        self._seen: set[str] = set()
        self._warned = False

    def enter(self, phase: str, count_as: str | None = None) -> None:
        """The phase before ends here; its time counts as `count_as` if that is given."""
        before, since = self.now
        moment = self._count(count_as)
        self.now = (phase, moment)
        if before in self._seen:
            self.longest[before] = max(self.longest.get(before, 0.0), moment - since)
        self._seen.add(before)

    def _count(self, count_as: str | None = None) -> float:
        """The phase so far; returns the moment."""
        moment = time.monotonic()
        self.seconds[count_as or self.now[0]] += moment - self._counted
        self._counted = moment
        return moment

    def saved(self, step: int) -> None:
        """A checkpoint of this step is under way."""
        self._count()
        self._saved[step] = self.seconds["step"]
        for old in sorted(self._saved)[:-_REMEMBERED]:
            del self._saved[old]

    def resumed(self, step: int) -> None:
        """The run goes on from this step: what was done after it is lost."""
        self._count()
        kept = max((value for saved, value in self._saved.items() if saved <= step), default=0.0)
        self._saved = {saved: value for saved, value in self._saved.items() if saved <= step}
        self.seconds["lost"] += self.seconds["step"] - kept
        self.seconds["step"] = kept

    def percent(self) -> Scalars:
        """Of all time so far, by phase; adds up to 100."""
        self._count()
        total = max(sum(self.seconds.values()), 1e-9)
        return {name: 100 * value / total for name, value in self.seconds.items()}

    def write(self) -> None:
        """Bring the file up to date; a moment's kill leaves the old or the new one. A full disk is warned of once."""
        if self._path is None:
            return
        shares = {name: round(value, 2) for name, value in self.percent().items()}
        record = {
            "wall_s": sum(self.seconds.values()),
            "percent": shares,
            "seconds": self.seconds,
            "starts": self._starts,
            "saved": self._saved,
        }
        unfinished = self._path.with_suffix(".unfinished")
        try:
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self._path)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self._path} cannot be written: {error.strerror or error}", stacklevel=2)
            self._warned = True

    def __str__(self) -> str:
        shares = self.percent()
        productive = shares.pop("step")
        rest = ", ".join(f"{name} {share:.1f}" for name, share in shares.items() if share >= 0.05)
        return f"goodput {productive:.1f} % of {sum(self.seconds.values()):.0f} s; {rest}"


def process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(uptime - float(fields[19]) / os.sysconf("SC_CLK_TCK"), 0.0)


def _read(path: Path | None) -> dict[str, Any]:
    """What an earlier process left; nothing, if that cannot be read."""
    empty: dict[str, Any] = {"seconds": dict.fromkeys(PHASES, 0.0), "saved": {}, "starts": 0}
    if path is None or not path.exists():
        return empty
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            "seconds": {name: float(record["seconds"].get(name, 0.0)) for name in PHASES},
            "saved": {int(step): float(value) for step, value in record["saved"].items()},
            "starts": int(record["starts"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return empty
