"""The report of an evaluation: every figure with its count, its standard error and what it was measured with.

    report = evaluate(load("shapes"), world, metrics=("alignment", "prediction"), splits=("iid", "combo"))
    print(table(report))

A share p of n clips has the binomial standard error sqrt(p (1 - p) / n); other figures that of their mean.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vdiff_jax import __version__
from vdiff_jax.data.shapes import SPLITS, ShapesWorld
from vdiff_jax.evaluation import shapes_tasks
from vdiff_jax.evaluation.prompt_influence import influence
from vdiff_jax.evaluation.shapes_tasks import Evaluation
from vdiff_jax.progress import ProgressTimer

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion

METRICS = ("alignment", "prediction", "interpolation", "codec", "influence")


def evaluate(
    model: VideoDiffusion,
    world: ShapesWorld,
    *,
    metrics: Sequence[str] = METRICS,
    splits: Sequence[str] = ("iid",),
    num_clips: int = 500,
    batch_size: int = 20,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
) -> dict[str, Any]:
    """All asked metrics of a model of the shapes world, as a json-ready dict.

    splits: for alignment, the other metrics use "iid". steps, guidance_scale, sampler: None = the model's own.
    Raises ValueError for an unknown metric or split, no clips, or a world of another image size than the model's.
    """
    for kind, values, known in (("metric", metrics, METRICS), ("split", splits, SPLITS)):
        for value in values:
            if value not in known:
                raise ValueError(f"unknown {kind} {value!r}: choose from {', '.join(known)}")
    for name, count in (("num_clips", num_clips), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name}={count}: it must be at least 1")
    settings = model.settings
    if world.size != settings.size:
        raise ValueError(
            f"the world has {world.size} pixels a side, the model {settings.size}: give the model's recipe"
        )
    sampling = {
        "steps": settings.steps if steps is None else steps,
        "guidance_scale": settings.guidance_scale if guidance_scale is None else guidance_scale,
        "sampler": sampler or settings.sampler,
    }
    num_frames = min(world.num_frames, settings.num_frames)
    ev = Evaluation(model, world, num_clips, min(batch_size, num_clips), seed, num_frames, sampling)
    results: dict[str, Any] = {}
    started = time.monotonic()
    for metric in metrics:
        tasks = _tasks(metric, splits)
        results[metric] = {
            name: run(dataclasses.replace(ev, progress=ProgressTimer(f"{metric} {name}")))
            for name, run in tasks.items()
        }
    return {
        "made_by": f"vdiff_jax {__version__}",
        "model": model.digest,
        "world": dataclasses.asdict(world),
        "settings": {**sampling, "num_clips": num_clips, "num_frames": num_frames, "seed": seed},
        "seconds": round(time.monotonic() - started, 1),
        "results": results,
    }


def _tasks(metric: str, splits: Sequence[str]) -> dict[str, Callable[[Evaluation], dict[str, Any]]]:
    """The runs of a metric by name."""
    if metric == "alignment":
        return {split: lambda ev, split=split: shapes_tasks.alignment(ev, split) for split in splits}
    if metric == "codec":
        return {"iid": shapes_tasks.codec}
    if metric == "influence":
        return {"iid": influence}
    task = {"prediction": shapes_tasks.prediction, "interpolation": shapes_tasks.interpolation}[metric]
    return {
        "without prompt": lambda ev: task(ev, prompted=False),
        "with prompt": lambda ev: task(ev, prompted=True),
    }


def rounded(value: Any, digits: int = 6) -> Any:
    """A json-ready copy: floats rounded, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(name): rounded(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    return value


def table(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    settings = report["settings"]
    lines = [
        f"model {report['model']}  {settings['sampler']}, {settings['steps']} steps, "
        f"guidance {settings['guidance_scale']:g}, {settings['num_clips']} clips of {settings['num_frames']} frames, "
        f"seed {settings['seed']}, {report['seconds']:.0f} s"
    ]
    for metric, runs in report["results"].items():
        for name, result in runs.items():
            lines += ["", f"{metric}, {name} (n = {result['n']})"]
            lines += _alignment_lines(result) if metric == "alignment" else _figure_lines(result)
    return "\n".join(lines)


def _alignment_lines(result: dict[str, Any]) -> list[str]:
    columns = ("model", "wrong_prompt", "codec", "clean")
    lines = [f"  {'':<12}" + "".join(f"{column.replace('_', ' '):>16}" for column in columns)]
    for key in result["model"]:
        cells = [_figure(result[column][key]) for column in columns]
        lines.append(f"  {key:<12}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def _figure_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for key, figure in result.items():
        if isinstance(figure, dict):
            nested = "value" not in figure
            text = "  ".join(f"{k}: {_figure(v)}" for k, v in figure.items()) if nested else _figure(figure)
            lines.append(f"  {key:<18}{text}")
    return lines


def _figure(figure: dict[str, float]) -> str:
    value, error = figure["value"], figure["se"]
    return f"{value:.3f} ± {error:.3f}" if math.isfinite(error) else f"{value:.3f}"
