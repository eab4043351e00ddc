"""How well the bundled model's anomaly scores tell planted events from normal clips, and when and where they see them.

    python benchmarks/anomaly_report.py --num_clips=60 --out=anomaly_report.json

Clips are of the held-out split, 16 frames, one object each that moves straight. From a random frame (5 to 11) on,
rendered from the true scene, the object

    vanish    is gone
    teleport  goes on elsewhere, 8 pixels away or more where the frame has room
    colour    has another colour
    freeze    stands where it was in the frame before
    reverse   goes back the way it came

A clip's score is the highest of its frames. AUROC is the share of pairs of an event and a normal clip in which the
event has the higher score (ties count half). Normal clips, those with events and those that calibrate are different
scenes. `peak`, `onset`: share of events whose frame of the highest score, or whose first frame above the threshold that
5 % of the calibrating clips pass, is within 1 frame of the true one. `place_3`, `place_6`: share whose hottest pixel at
the peak is within 3 or 6 pixels of the object's centre, or of where it would be without the event. "repeat" is the
control without a model: the largest change from frame to frame over the mean change of the clip.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import stats

from vdiff_jax.anomaly import LEVELS, AnomalyEdits
from vdiff_jax.command import run_script
from vdiff_jax.data.shapes import Records, make_world, native_times, render, tracks
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.data.video_io import Clip
from vdiff_jax.evaluation.report import rounded
from vdiff_jax.evaluation.shapes_tasks import Evaluation, moving_scenes
from vdiff_jax.interop.pretrained import save_json
from vdiff_jax.pipeline import load
from vdiff_jax.progress import ProgressTimer

_MODEL = flags.DEFINE_string("model", "shapes", "The model.")
_NUM_CLIPS = flags.DEFINE_integer("num_clips", 60, "Normal clips, and clips of every event.")
_LEVELS = flags.DEFINE_list("levels", [str(level) for level in LEVELS], "Log-SNR levels.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of scenes, events and noise.")
_OUT = flags.DEFINE_string("out", "anomaly_report.json", "Where the report is written.")

EVENTS = ("vanish", "teleport", "colour", "freeze", "reverse")
MODES = ("calibrated", "own median")
FRAMES, SIZE, MARGIN, JUMP = 16, 32, 6.0, 8.0
WORLD = make_world("small", sizes=("large",), speeds=("fast",), size=SIZE, num_frames=FRAMES)
_draw = jax.jit(functools.partial(render, world=WORLD))


def main(_: list[str]) -> int:
    count, model = _NUM_CLIPS.value, load(_MODEL.value)
    options: dict[str, Any] = dict(levels=[float(level) for level in _LEVELS.value], seed=_SEED.value)
    ev = Evaluation(model, WORLD, seed=_SEED.value)
    scenes = {name: moving_scenes(ev, count, stream=20 + i) for i, name in enumerate(("calibrate", "normal", *EVENTS))}
    clips = {name: plant(name, records) for name, records in scenes.items()}
    sessions = {name: [AnomalyEdits(model, Clip(frames, 8.0)) for frames in made[0]] for name, made in clips.items()}
    normal = sessions["normal"][0].calibrate([session.clip for session in sessions["calibrate"]], **options)
    steps = {name: np.square(np.diff(made[0] / 255.0, axis=1)).mean(axis=(2, 3, 4)) for name, made in clips.items()}
    jumps = {name: step.max(axis=1) / step.mean(axis=1) for name, step in steps.items()}
    progress, done, total = ProgressTimer("anomaly"), 0, 2 * len(sessions) * count
    control = {name: auroc(jumps[name], jumps["normal"]) for name in EVENTS}
    report: dict[str, Any] = {**options, "num_clips": count, "repeat": control, "results": {}}
    for mode in MODES:
        results = {}
        for name, group in sessions.items():
            given = normal if mode == "calibrated" else None
            results[name] = [session.anomaly(calibrate=given, **options) for session in group]
            done += count
            progress(done, total)
        highest = {name: np.array([result.score[result.peak] for result in found]) for name, found in results.items()}
        limit = float(np.quantile(highest["calibrate"], 0.95))
        rows = {}
        for name in EVENTS:
            seen = located(results[name], *clips[name][1:], limit)
            rows[name] = {"auroc": auroc(highest[name], highest["normal"])} | seen
        pooled = auroc(np.concatenate([highest[name] for name in EVENTS]), highest["normal"])
        false_alarms = float((highest["normal"] > limit).mean())
        report["results"][mode] = {**rows, "pooled": pooled, "threshold": limit, "false_alarms": false_alarms}
        print(f"\n{mode}{'':<4}auroc    peak   onset   place_3 place_6 px (median)")
        for name, row in rows.items():
            print(f"{name:<12}" + "".join(f"{value:8.3f}" for value in row.values()))
        print(f"pooled      {pooled:8.3f}   false alarms at the threshold {false_alarms:.3f}", flush=True)
    print("\nrepeat, auroc:", ", ".join(f"{name} {value:.3f}" for name, value in control.items()))
    save_json(_OUT.value, rounded(report))
    print(_OUT.value)
    return 0


def plant(name: str, records: Records) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips u8 [n f h w 3] with the event (or none), its frame [n], and centres [2 n f 2]: as shown, and without it."""
    count = len(records["count"])
    rng = np.random.default_rng([_SEED.value, *name.encode()])
    at, times = rng.integers(5, 12, count), native_times(WORLD, count)
    other, other_times = {field: value.copy() for field, value in records.items()}, times
    usual = np.asarray(tracks(records, jnp.asarray(times), WORLD))[:, :, 0]
    if name == "vanish":
        other["count"][:] = 0
    elif name == "colour":
        other["colour"][:, 0] = (other["colour"][:, 0] + rng.integers(1, 6, count)) % 6  # the world has the first 6
    elif name == "freeze":
        other_times = np.minimum(times, at[:, None] - 1).astype(np.float32)
    elif name == "reverse":
        other_times = np.minimum(times, 2 * at[:, None] - 2 - times).astype(np.float32)
    elif name == "teleport":
        other["position"][:, 0] += np.stack([jump(rng, track[first:]) for track, first in zip(usual, at)]) / SIZE
    after = (np.arange(FRAMES) >= at[:, None]) & (name in EVENTS)
    changed = np.asarray(tracks(other, jnp.asarray(other_times), WORLD))[:, :, 0]
    shown = np.where(after[..., None], changed, usual)
    video = np.where(after[..., None, None, None], _draw(other, other_times), _draw(records, times))
    return to_uint8(video), at, np.stack([shown, usual])


def jump(rng: np.random.Generator, track: np.ndarray) -> np.ndarray:
    """A shift in pixels, at least JUMP long where there is room, that keeps the centres `track` [f 2] in the frame."""
    low, high = MARGIN - track.min(axis=0), SIZE - 1 - MARGIN - track.max(axis=0)
    shifts = low + rng.random((1000, 2)) * (high - low)
    length = np.linalg.norm(shifts, axis=1)
    far = np.flatnonzero(length >= JUMP)
    return shifts[far[0] if len(far) else np.argmax(length)]


def auroc(events: np.ndarray, normal: np.ndarray) -> float:
    """Area under the curve of true against false alarms, from the rank sum of Mann and Whitney."""
    return float(stats.mannwhitneyu(events, normal).statistic / (len(events) * len(normal)))


def located(results: list, at: np.ndarray, places: np.ndarray, limit: float) -> dict[str, float]:
    """When and where the events are seen, see the module."""
    peaks = np.array([result.peak for result in results])
    onsets = [result.onset(limit) for result in results]
    seen = [onset is not None and abs(onset - first) <= 1 for onset, first in zip(onsets, at)]
    away = []
    for number, (result, peak) in enumerate(zip(results, peaks)):
        y, x = np.unravel_index(np.argmax(result.heat[peak]), (SIZE, SIZE))
        away.append(np.linalg.norm(places[:, number, peak] - np.array([x, y]), axis=-1).min())
    when = {"peak": float((np.abs(peaks - at) <= 1).mean()), "onset": float(np.mean(seen))}
    return {**when, **{f"place_{px}": float(np.mean(np.array(away) <= px)) for px in (3, 6)}, "px": np.median(away)}


if __name__ == "__main__":
    run_script(main)
