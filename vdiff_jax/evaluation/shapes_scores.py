"""Scores of generated shapes clips: do they show what the prompt says, and do they keep what they should?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from vdiff_jax.data.shapes_captions import Attributes
from vdiff_jax.data.shapes_world import ShapesWorld
from vdiff_jax.evaluation.shapes_reader import ObjectReading, Reading
from vdiff_jax.evaluation.shapes_segments import segment, to_unit

OBJECT_KEYS = ("colour", "shape", "size", "motion", "direction", "speed", "target")
SCENE_KEYS = ("background", "texture", "weather", "camera")


def score(reading: Reading, attributes: Attributes) -> dict[str, bool]:
    """Which stated attributes the clip shows: a bool per key that `attributes` states, and "readable", "count", "all".

    With several objects, the assignment of readings to stated objects that agrees best counts, and a key is right if
    it is right for all of them; so swapped bindings ("red circle and blue square") are wrong. A clip that is
    unreadable or shows another number of objects is wrong for every attribute.
    """
    stated = attributes["objects"]
    result = {key: False for key in OBJECT_KEYS if any(key in item for item in stated)}
    result |= {key: False for key in SCENE_KEYS if key in attributes}
    count = reading.readable and len(reading.objects) == len(stated)
    if count:
        orders = itertools.permutations(reading.objects)
        agreed = max(
            ([_matches(seen, item) for seen, item in zip(order, stated)] for order in orders),
            key=lambda rows: sum(sum(row.values()) for row in rows),
        )
        for key in OBJECT_KEYS:
            if key in result:
                result[key] = all(row.get(key, True) for row in agreed)
        for key in SCENE_KEYS:
            if key in result:
                result[key] = getattr(reading, key) == attributes[key]
    return {"readable": reading.readable, "count": count, **result, "all": count and all(result.values())}


def _matches(seen: ObjectReading, item: dict[str, str]) -> dict[str, bool]:
    return {key: getattr(seen, key) == value for key, value in item.items()}


def mean_scores(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of right clips per key, each over the clips whose prompt states the key."""
    keys = dict.fromkeys(key for row in scores for key in row)
    return {key: float(np.mean([row[key] for row in scores if key in row])) for key in keys}


def centroid_track(reading: Reading, index: int = 0) -> np.ndarray:
    """Centre (x, y) in pixels of one object in every frame, [f 2] f64, NaN where it was not seen.

    Raises ValueError where the clip has no such object.
    """
    if index >= len(reading.objects):
        raise ValueError(f"The clip shows {len(reading.objects)} objects, there is no number {index}.")
    return reading.objects[index].track


def track_rmse(track: np.ndarray, truth: np.ndarray) -> float:
    """Root mean squared distance in pixels of two tracks [f 2], over the frames seen in both; NaN if there is none."""
    distance = ((track - truth) ** 2).sum(axis=-1)
    seen = np.isfinite(distance)
    return float(np.sqrt(distance[seen].mean())) if seen.any() else float("nan")


def count_objects_per_frame(frames: np.ndarray, world: ShapesWorld) -> np.ndarray:
    """Number of crisp coloured objects in every frame, i64 [f]: 2 where there is a ghost, 0 where nothing is crisp."""
    return segment(to_unit(frames), world).per_frame()


def psnr_outside(video: np.ndarray, truth: np.ndarray, mask: np.ndarray, margin: int = 2) -> float:
    """PSNR in dB between clips [f h w c] in -1..1 where `mask` [f h w] (or [f h w 1], > 0.01), widened by `margin`
    pixels, is 0. Infinite for equal clips.

    Raises ValueError where the mask covers everything.
    """
    mask = np.asarray(mask).reshape(np.asarray(truth).shape[:3]) > 0.01
    if margin:
        mask = ndimage.maximum_filter(mask, size=(1, 2 * margin + 1, 2 * margin + 1))
    if mask.all():
        raise ValueError("The widened mask covers the whole clip, so there is no outside to compare.")
    error = (np.asarray(video, np.float64) - np.asarray(truth, np.float64))[~mask]
    mse = float((error**2).mean())
    return float("inf") if mse == 0 else 10 * float(np.log10(4 / mse))


def flicker_ratio(video: np.ndarray, truth: np.ndarray) -> float:
    """Energy of the second temporal difference of `video` over that of `truth`, [f h w c] with f >= 3; 1 is ideal."""

    def energy(clip: Any) -> float:
        return float((np.diff(np.asarray(clip, np.float64), n=2, axis=0) ** 2).mean())

    return energy(video) / max(energy(truth), 1e-12)
