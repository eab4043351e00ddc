"""Shape templates: what every shape of the shapes world looks like at unit area, rotated and blurred.

A template lives on a 21 x 21 grid whose unit is the radius of the disc of equal area, so one table serves objects of
any size. Similarity is the soft intersection over union, sum(min(a, b)) / sum(max(a, b)).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import ndimage

from vdiff_jax.data.shapes_render import UNIT_AREA, unit_sdf

SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "star": 5}
"""Order of the rotation symmetry; 0 where every rotation looks alike."""
GRID_EXTENT = 2.0
GRID_POINTS = 21
_OVERSAMPLING = 4
_TURNS = 6
_BLUR_RATIO = 1.15  # templates are cached at blurs of this geometric spacing


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (x, y), each [21 * 21], of the template grid in units of the equal-area radius."""
    line = np.linspace(-GRID_EXTENT, GRID_EXTENT, GRID_POINTS)
    y, x = np.meshgrid(line, line, indexing="ij")
    return x.ravel(), y.ravel()


def templates(shapes: tuple[str, ...], blur: float) -> tuple[np.ndarray, np.ndarray]:
    """All rotations of all shapes, blurred by a Gaussian of std `blur` (in equal-area radii, rounded to 15 %).

    Returns f32 [t 441] coverage and i64 [t], the index into `shapes` of each row.
    """
    return _templates(tuple(shapes), round(math.log(max(blur, 0.02), _BLUR_RATIO)))


@functools.lru_cache(maxsize=128)
def _templates(shapes: tuple[str, ...], blur_step: int) -> tuple[np.ndarray, np.ndarray]:
    step = 2 * GRID_EXTENT / (GRID_POINTS - 1) / _OVERSAMPLING
    pad = GRID_EXTENT + 4 * step * _OVERSAMPLING
    line = np.arange(-round(pad / step), round(pad / step) + 1) * step
    y, x = np.meshgrid(line, line, indexing="ij")
    first = (len(line) - 1) // 2 - (GRID_POINTS - 1) // 2 * _OVERSAMPLING
    picked = slice(first, first + _OVERSAMPLING * (GRID_POINTS - 1) + 1, _OVERSAMPLING)
    rows, owners = [], []
    for index, shape in enumerate(shapes):
        radius = math.sqrt(math.pi / UNIT_AREA[shape])
        turns = _TURNS if SYMMETRY[shape] else 1
        for turn in range(turns):
            angle = 2 * math.pi * turn / (turns * max(SYMMETRY[shape], 1))
            u = (math.cos(angle) * x + math.sin(angle) * y) / radius
            v = (math.cos(angle) * y - math.sin(angle) * x) / radius
            cover = np.clip(0.5 - unit_sdf(shape, u, v, np) * radius / step, 0.0, 1.0)
            cover = ndimage.gaussian_filter(cover, _BLUR_RATIO**blur_step / step, mode="constant", truncate=3.0)
            rows.append(cover[picked, picked].ravel())
            owners.append(index)
    return np.array(rows, np.float32), np.array(owners)


def soft_iou(cover: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Soft intersection over union of coverages [m p] with templates [t p]: [m t]."""
    # sum(min) = (sum a + sum b - sum|a - b|) / 2 and sum(max) = (sum a + sum b + sum|a - b|) / 2.
    total = cover.sum(axis=1)[:, None] + table.sum(axis=1)[None]
    gap = np.abs(cover[:, None] - table[None]).sum(axis=-1)
    return (total - gap) / np.maximum(total + gap, 1e-9)
