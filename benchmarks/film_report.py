"""Measure a film model on held-out shots: reconstruction, and prediction against repeating the last frame.

    python benchmarks/film_report.py --model=runs/film --folder=runs/film64 --docs=docs

Prediction: windows of `known + ahead` frames of every held-out shot; the first `known` are given, the others are
generated and compared with the film, in pixels, through the real decoder. Three answers are scored, PSNR in dB averaged
over windows: one sample; the mean of several samples; and the one-step estimate, which is the network's own conditional
mean E[x | known frames] because at the start of the plan the noise says nothing. The rival repeats the last known frame
of the film itself, untouched by the autoencoder. Writes DOCS/film_results.md, film_report.json, film_prediction.png,
film_samples.png and film_loss.png.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from vdiff_jax.command import run_script
from vdiff_jax.data.sources import FolderSource, Windows
from vdiff_jax.data.video_io import contact_sheet, save_image
from vdiff_jax.evaluation.metrics import psnr
from vdiff_jax.pipeline import VideoDiffusion, load
from vdiff_jax.sampling.job import known_frames

PICTURES = """

Held-out prediction, three rows a window: the film; the given frames and one sample; the given frames and the one-step
mean.

![prediction](film_prediction.png)

Training loss of the diffusion network:

![loss](film_loss.png)

Clips from noise alone, nothing given:

![samples](film_samples.png)
"""

_MODEL = flags.DEFINE_string("model", "runs/film", "Run folder or saved folder of the film model.")
_FOLDER = flags.DEFINE_string("folder", "runs/film64", "Folder of shots with a heldout/ subfolder.")
_DOCS = flags.DEFINE_string("docs", "docs", "Where the report and the pictures go.")
_KNOWN = flags.DEFINE_integer("known", 4, "Frames given.", lower_bound=1)
_AHEAD = flags.DEFINE_integer("ahead", 4, "Frames to predict.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Samples whose mean is scored.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Denoising steps of a sample.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 4, "A window starts at every so many frames.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Windows at a time.", lower_bound=1)
_SPLIT = flags.DEFINE_string("split", "heldout", "heldout or train.")


def main(_: list[str]) -> int:
    model = load(_MODEL.value)
    docs = Path(_DOCS.value)
    docs.mkdir(parents=True, exist_ok=True)
    length = _KNOWN.value + _AHEAD.value
    source = FolderSource(
        _FOLDER.value, Windows(length), model.settings.size, _SPLIT.value, holdout=0.1, fps=model.settings.fps
    )
    shots = [source.read_whole(index)["frames"] for index in range(len(source))]
    report = {"shots": len(shots), "fps": model.settings.fps, "known": _KNOWN.value, "samples": _SAMPLES.value}
    report |= reconstruction(model, shots)
    print(f"reconstruction of {report['frames']} frames: {report['reconstruction_psnr']:.2f} dB", file=sys.stderr)

    starts = [(shot, start) for shot in shots for start in range(0, len(shot) - length + 1, _EVERY.value)]
    windows = np.stack([shot[start : start + length] for shot, start in starts])
    answers = predict(model, windows)
    report["windows"] = len(windows)
    report["prediction_psnr"] = {name: scores(frames, windows, _KNOWN.value) for name, frames in answers.items()}
    for name, values in report["prediction_psnr"].items():
        ahead = "  ".join(f"+{index + 1}: {value:.2f}" for index, value in enumerate(values["ahead"]))
        print(f"{name:22s} mean {values['mean']:.2f} dB   {ahead}   pooled {values['pooled']:.2f}", file=sys.stderr)

    write_text(docs / "film_report.json", json.dumps(report, indent=1) + "\n")
    write_text(docs / "film_results.md", results_table(report, training(Path(_MODEL.value))))
    save_image(docs / "film_prediction.png", prediction_sheet(windows, answers))
    clips = model.generate([""] * 4, num_frames=length, seed=0)
    save_image(docs / "film_samples.png", contact_sheet([clip.frames for clip in clips], columns=length))
    metrics = Path(_MODEL.value) / "metrics.jsonl"
    if metrics.is_file():
        plot_loss(metrics, docs / "film_loss.png")
    return 0


def reconstruction(model: VideoDiffusion, shots: list[np.ndarray]) -> dict[str, float]:
    """PSNR of decode(encode(frame)), mean over all frames, and of the frames of the worst shot."""
    by_shot = []
    for shot in shots:
        pieces = _pieces(shot, 16)
        decoded = np.concatenate([model.decode(model.encode(piece))[0] for piece in pieces])
        by_shot.append([psnr(a, b, 255) for a, b in zip(decoded, shot)])
    every = np.concatenate(by_shot)
    return {
        "frames": len(every),
        "reconstruction_psnr": float(every.mean()),
        "reconstruction_psnr_worst_shot": float(min(np.mean(values) for values in by_shot)),
    }


def predict(model: VideoDiffusion, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Frames u8 or float `[n ahead h w 3]` of every answer, by name."""
    known, ahead = _KNOWN.value, _AHEAD.value
    drawn: list[list[np.ndarray]] = [[] for _ in range(_SAMPLES.value)]
    mean, decoded = [], []
    for start in range(0, len(windows), _BATCH.value):
        rows = windows[start : start + _BATCH.value]
        filled = _pieces(rows, _BATCH.value)[0]  # one shape, so that nothing compiles twice
        video = filled.astype(np.float32) / 127.5 - 1
        video[:, known:] = 0  # the answer never enters the network
        context = known_frames(model.encode(video), range(known))
        for sample in range(_SAMPLES.value):
            keys = jax.vmap(jax.random.key)(np.arange(start, start + len(filled)) + 100_000 * sample)
            latents = model.complete(context, keys=keys, steps=_STEPS.value)
            drawn[sample].append(model.decode(latents)[: len(rows), known:])
        keys = jax.vmap(jax.random.key)(np.arange(start, start + len(filled)))
        latents = model.complete(context, keys=keys, steps=1)
        mean.append(model.decode(latents)[: len(rows), known:])
        decoded.append(model.decode(context.latents)[: len(rows), known - 1 : known])
        print(f"predicted {start + len(rows)} of {len(windows)} windows", file=sys.stderr)
    samples = np.stack([np.concatenate(parts) for parts in drawn])
    return {
        "repeat_last": np.repeat(windows[:, known - 1 : known], ahead, axis=1),
        "repeat_last_decoded": np.repeat(np.concatenate(decoded), ahead, axis=1),
        "sample": samples[0],
        "mean_of_samples": samples.mean(axis=0, dtype=np.float32),
        "one_step_mean": np.concatenate(mean),
    }


def scores(frames: np.ndarray, windows: np.ndarray, known: int) -> dict[str, Any]:
    """How near the answers `[n ahead h w 3]` are to windows u8 `[n known+ahead h w 3]`, in dB.

    mean: PSNR over windows and frames; ahead: by distance; pooled: PSNR of the error over all windows at once;
    wins: share of windows better than repeating the last frame; moving, still: the same of either half, see
    `moving_half`; without those halves where nothing given can move.
    """
    truth, last = windows[:, known:].astype(np.float32), windows[:, known - 1 : known].astype(np.float32)
    error = np.square(frames.astype(np.float32) - truth).mean(axis=(2, 3, 4))
    rival = np.square(last - truth).mean(axis=(2, 3, 4))
    parts = {}
    if known > 1 and len(windows) > 1:
        moving = moving_half(windows, known)
        parts = {name: _summary(error[rows], rival[rows]) for name, rows in (("moving", moving), ("still", ~moving))}
    return {**_summary(error, rival), "ahead": _decibels(error).mean(axis=0).tolist(), **parts}


def moving_half(windows: np.ndarray, known: int) -> np.ndarray:
    """`[n]` bool: the half of the windows whose last two given frames differ most. What follows plays no part."""
    before, last = (windows[:, known - back].astype(np.float32) for back in (2, 1))
    change = np.square(last - before).mean(axis=(1, 2, 3))
    return np.argsort(np.argsort(change, kind="stable"), kind="stable") >= len(change) // 2


def _summary(error: np.ndarray, rival: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(_decibels(error).mean()),
        "pooled": float(_decibels(error.mean())),
        "wins": float(np.mean(error.mean(axis=1) < rival.mean(axis=1))),
    }


def _decibels(error: np.ndarray) -> np.ndarray:
    return 10 * np.log10(255**2 / np.maximum(error, 1e-2))  # equal frames count as 68 dB


def prediction_sheet(windows: np.ndarray, answers: dict[str, np.ndarray], count: int = 4) -> np.ndarray:
    """For `count` windows spread over the film three rows: the film, one sample, the one-step mean."""
    known = _KNOWN.value
    rows = []
    for index in np.linspace(0, len(windows) - 1, count).astype(int):
        rows.append(windows[index])
        for name in ("sample", "one_step_mean"):
            rows.append(np.concatenate([windows[index, :known], answers[name][index]]))
    return contact_sheet(rows, columns=windows.shape[1])


def plot_loss(metrics: Path, path: Path) -> None:
    """The loss of a run over its steps, with a running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {line["step"]: line["loss"] for line in lines if "loss" in line}
    steps, losses = np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)])
    width = min(10, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(steps, losses, linewidth=0.6, alpha=0.5, label="loss of one batch")
    axes.plot(steps[width - 1 :], smooth, label=f"mean of {width} logged steps")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=90)
    os.replace(temporary, path)
    plt.close(figure)


def training(folder: Path) -> str:
    """One sentence on how long the run was trained, or nothing for a saved model without its run."""
    metrics, recipe = folder / "metrics.jsonl", folder / "recipe.json"
    if not (metrics.is_file() and recipe.is_file()):
        return ""
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    batch = json.loads(recipe.read_text())["data"]["batch_size"]
    return f"The model was trained for {last} steps of {batch} windows. "


def results_table(report: dict, trained: str) -> str:
    """The report in words, for the documentation."""
    rows = {
        "repeat_last": "repeat the last frame of the film",
        "repeat_last_decoded": "repeat it after the autoencoder",
        "sample": "one sample",
        "mean_of_samples": f"mean of {report['samples']} samples",
        "one_step_mean": "one-step conditional mean",
    }
    ahead = len(report["prediction_psnr"]["sample"]["ahead"])
    lines = [
        "# Film: results",
        "",
        f"Written by `benchmarks/film_report.py`. {trained}Held-out shots: {report['shots']}, at {report['fps']:g} "
        "frames a second.",
        "",
        f"Reconstruction by the autoencoder: **{report['reconstruction_psnr']:.2f} dB** over {report['frames']} "
        f"frames, {report['reconstruction_psnr_worst_shot']:.2f} dB for the worst shot.",
        "",
        f"Prediction from {report['known']} known frames, {report['windows']} windows, PSNR in dB. Pooled: of the "
        "error over all windows at once. Wins: windows with a smaller error than repeating the last frame.",
        "",
        "| answer | mean | " + " | ".join(f"+{index + 1}" for index in range(ahead)) + " | pooled | wins |",
        "| --- " * (ahead + 4) + "|",
    ]
    for name, title in rows.items():
        values = report["prediction_psnr"][name]
        numbers = " | ".join(f"{value:.2f}" for value in (values["mean"], *values["ahead"], values["pooled"]))
        lines.append(f"| {title} | {numbers} | {_wins(name, values)} |")
    if "moving" not in report["prediction_psnr"]["sample"]:
        return "\n".join(lines) + PICTURES
    lines += [
        "",
        "The same by halves. Moving: the windows whose last two given frames differ most; still: the others.",
        "",
        "| answer | moving: mean | pooled | wins | still: mean | pooled | wins |",
        "| --- " * 7 + "|",
    ]
    for name, title in rows.items():
        halves = [report["prediction_psnr"][name][part] for part in ("moving", "still")]
        cells = [f"{half['mean']:.2f} | {half['pooled']:.2f} | {_wins(name, half)}" for half in halves]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + PICTURES


def _wins(name: str, values: dict[str, Any]) -> str:
    return "" if name == "repeat_last" else f"{100 * values['wins']:.0f} %"


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _pieces(frames: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts of one length along the first axis; the last is filled up with its last entry."""
    missing = -len(frames) % size
    filled = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    return [filled[start : start + size] for start in range(0, len(filled), size)]


if __name__ == "__main__":
    run_script(main)
