"""Renders shape scenes as video by signed distances: `cover = clip(0.5 - sdf, 0, 1)` with the distance in pixels.

Everything is closed form in the record and the time stamp, `jax.numpy` only, and jit-able with the world static.
Pixel `i` has its centre at coordinate `i`, so a position p in units of H lies at pixel `p * H - 0.5`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdiff_jax.data.shapes_world import (
    BACKGROUND_LEVEL,
    PALETTE,
    RADIUS,
    SHAPES,
    TEXTURES,
    WEATHERS,
    ShapesWorld,
    positions,
)
from vdiff_jax.types import Array, Video

SQUARE = 0.87  # half side; all lengths here are in units of the nominal radius
TRIANGLE = 0.625  # inscribed radius; the corners lie at twice that
CROSS = (1.05, 0.38)  # half length and half width of an arm
RING = (0.775, 0.275)  # middle radius and half thickness
STAR = 1.45 * math.cos(math.radians(72))  # distance of the five edge lines; the points lie at 1.45
UNIT_AREA = {
    "circle": math.pi,
    "square": 4 * SQUARE**2,
    "triangle": 3 * math.sqrt(3) * TRIANGLE**2,
    "cross": 8 * CROSS[0] * CROSS[1] - 4 * CROSS[1] ** 2,
    "ring": 4 * math.pi * RING[0] * RING[1],
    "star": 10 * 0.5 * 1.45 * (STAR / math.cos(math.radians(36))) * math.sin(math.radians(36)),
}
"""Area of every shape at nominal radius 1, so that `radius = sqrt(area / UNIT_AREA[shape])`."""
TEXTURE_STD = 0.06
NIGHT_GAIN = 0.5


def unit_sdf(shape: str, x: Any, y: Any, xp: Any = jnp) -> Any:
    """Signed distance to `shape` of nominal radius 1, negative inside (a bound, exact along edges, at sharp corners).

    x right and y down, any equal shapes, in units of the nominal radius. `xp` is jax.numpy or numpy.
    """
    if shape == "circle":
        return xp.sqrt(x * x + y * y) - 1.0
    if shape == "square":
        return xp.maximum(xp.abs(x), xp.abs(y)) - SQUARE
    if shape == "triangle":
        return xp.maximum(y, math.sqrt(0.75) * xp.abs(x) - 0.5 * y) - TRIANGLE
    if shape == "cross":
        a, b = xp.abs(x), xp.abs(y)
        return xp.maximum(xp.maximum(a, b) - CROSS[0], xp.minimum(a, b) - CROSS[1])
    if shape == "ring":
        return xp.abs(xp.sqrt(x * x + y * y) - RING[0]) - RING[1]
    if shape == "star":
        # Inside a five-pointed star means inside at least four of its five edge lines: the second largest distance.
        first = second = xp.full_like(x, -np.inf)
        for turn in np.radians(90 + 72 * np.arange(5)):
            d = math.cos(turn) * x + math.sin(turn) * y
            first, second = xp.maximum(first, d), xp.maximum(second, xp.minimum(first, d))
        return second - STAR
    raise ValueError(f"Unknown shape {shape!r}; choose one of {SHAPES}.")


def tracks(records: Any, times: Array, world: ShapesWorld) -> Array:
    """True object centres in pixels at `times` [n f]: f32 [n f k 2], (x, y)."""
    return positions(_device(records), times, world, jnp) * world.size - 0.5


def masks(records: Any, times: Array, world: ShapesWorld) -> Array:
    """True coverage 0..1 of every object, not counting what hides it, at `times` [n f]: f32 [n f H H k]."""
    records = _device(records)
    count = records["shape"].shape[1]
    centre = tracks(records, times, world)
    covers = [_cover(records, times, centre, world, index) for index in range(count)]
    return jnp.stack(covers, axis=-1)


def render(records: Any, times: Array, world: ShapesWorld) -> Video:
    """Video f32 [n f H H 3] in -1..1 of the scenes at real-valued time stamps `times` f32 [n f]."""
    records = _device(records)
    times = jnp.asarray(times, jnp.float32)
    image = jnp.asarray(BACKGROUND_LEVEL)[records["background"]][:, None, None, None]
    if "textured" in world.textures:
        image = jnp.maximum(image + _texture(records, times, world), 0.0)
    image = jnp.broadcast_to(image, (*times.shape, world.size, world.size))
    image = jnp.broadcast_to(image[..., None], (*image.shape, 3))
    centre = tracks(records, times, world)
    for index in range(records["shape"].shape[1]):
        cover = _cover(records, times, centre, world, index)[..., None]
        colour = jnp.asarray(PALETTE)[records["colour"][:, index]][:, None, None, None, :]
        image = image * (1.0 - cover) + colour * cover
    if {"snow", "rain"} & set(world.weathers):
        white = _precipitation(records, times, world)[..., None]
        image = image * (1.0 - white) + 0.9 * white
    if "night" in world.weathers:
        night = (records["weather"] == WEATHERS.index("night"))[:, None, None, None, None]
        image = jnp.where(night, NIGHT_GAIN * image, image)
    return 2.0 * image - 1.0


def _device(records: Any) -> dict[str, Array]:
    return {name: jnp.asarray(value) for name, value in records.items()}


def _cover(records: dict[str, Array], times: Array, centre: Array, world: ShapesWorld, index: int) -> Array:
    """Anti-aliased coverage [n f H H] of object `index`, zero where the scene has fewer objects."""
    field = {name: records[name][:, index][:, None] for name in ("shape", "size", "angle", "spin", "growth")}
    grown = jnp.exp(jnp.clip(field["growth"] * (times - world.middle), -0.45, 0.45))
    radius = (jnp.asarray(RADIUS)[field["size"]] * world.size * grown)[..., None, None]
    angle = field["angle"] + field["spin"] * times
    cos, sin = (jnp.cos(angle)[..., None, None] / radius, jnp.sin(angle)[..., None, None] / radius)
    pixel = jnp.arange(world.size, dtype=jnp.float32)
    dx = pixel[None, None, None, :] - centre[:, :, index, 0][..., None, None]
    dy = pixel[None, None, :, None] - centre[:, :, index, 1][..., None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    chosen = field["shape"][..., None, None]
    distance = unit_sdf(world.shapes[0], x, y)
    for shape in world.shapes[1:]:
        distance = jnp.where(chosen == SHAPES.index(shape), unit_sdf(shape, x, y), distance)
    present = (records["count"] > index)[:, None, None, None]
    return jnp.where(present, jnp.clip(0.5 - distance * radius, 0.0, 1.0), 0.0)


def _texture(records: dict[str, Array], times: Array, world: ShapesWorld) -> Array:
    """Smooth Gaussian noise [n f H H] that moves with the camera: a sum of plane waves, so it shifts exactly."""
    grid = (jnp.arange(world.size, dtype=jnp.float32) + 0.5) / world.size
    shift = records["pan"][:, None] * (times[..., None] - world.middle)  # [n f 2]
    wave = records["waves"]
    phase_x = wave[:, None, None, :, 0] * (grid[None, None, :, None] - shift[:, :, 0][..., None, None])
    phase_y = wave[:, None, None, :, 1] * (grid[None, None, :, None] - shift[:, :, 1][..., None, None])
    phase_y = phase_y + wave[:, None, None, :, 2]
    noise = jnp.einsum("nfyw,nfxw->nfyx", jnp.cos(phase_y), jnp.cos(phase_x))
    noise = noise - jnp.einsum("nfyw,nfxw->nfyx", jnp.sin(phase_y), jnp.sin(phase_x))
    noise = noise * (TEXTURE_STD * math.sqrt(2.0 / wave.shape[1]))
    textured = (records["texture"] == TEXTURES.index("textured"))[:, None, None, None]
    return jnp.where(textured, jnp.clip(noise, -0.15, 0.15), 0.0)


def _precipitation(records: dict[str, Array], times: Array, world: ShapesWorld) -> Array:
    """Opacity [n f H H] of snow specks or rain streaks that fall and wrap around."""
    snow = (records["weather"] == WEATHERS.index("snow"))[:, None, None]
    rain = (records["weather"] == WEATHERS.index("rain"))[:, None, None]
    pixel = jnp.arange(world.size, dtype=jnp.float32)[None, None, :, None]
    scale = world.size / 32
    x, y, pace = (records["specks"][:, None, :, i] for i in range(3))
    fall = jnp.where(rain, 2.5, 0.6) * (0.75 + 0.5 * pace) / world.intervals  # H per frame interval
    top = jnp.mod(y + fall * times[..., None], 1.2) - 0.1
    width = jnp.broadcast_to(jnp.where(rain, 0.4, 0.55), x.shape) * scale
    length = jnp.broadcast_to(jnp.where(rain, 2.2, 0.55), x.shape) * scale
    dx = (pixel - (x * world.size)[:, :, None, :]) / width[:, :, None, :]
    dy = (pixel - (top * world.size)[:, :, None, :]) / length[:, :, None, :]
    blobs = jnp.einsum("nfyp,nxp->nfyx", jnp.exp(-0.5 * dy * dy), jnp.exp(-0.5 * dx[:, 0] * dx[:, 0]))
    strength = jnp.where(snow, 0.85, jnp.where(rain, 0.5, 0.0))[..., None]
    return strength * jnp.clip(blobs, 0.0, 1.0)
