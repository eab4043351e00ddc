"""The frames of a clip where they are not all here: split over devices, or filled up to a common length.

Long clips are split: every device along the mesh axis `context` holds `f / s` of the frames, in order. What looks at
one frame is computed where the frame is. What mixes frames asks here: statistics are summed over the axis, convolutions
fetch one frame from either side, and attention over frames exchanges frames for pixels (all-to-all), after which a
device has all frames of its share of the pixels. Off a split clip, every function is the plain one.

Clips of different lengths in a batch are filled up, and `valid [b f]` says which frames are real. It is always given
for all frames, wherever they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from vdiff_jax.types import Array

AXIS = "context"


def shards() -> int:
    """Over how many devices the frames are split where this is traced; 1 outside of `parallel.split_clips`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def here(value: Array) -> Array:
    """The part that belongs to this device's frames of a `[b f ...]` that holds all."""
    count = shards()
    if count == 1:
        return value
    length = value.shape[1] // count
    return jax.lax.dynamic_slice_in_dim(value, jax.lax.axis_index(AXIS) * length, length, axis=1)


def first_frame(x: Array) -> Array:
    """`[b f ...] -> [b 1 ...]`: the clip's first frame, on every device."""
    if shards() == 1:
        return x[:, :1]
    return jax.lax.psum(jnp.where(jax.lax.axis_index(AXIS) == 0, x[:, :1], 0), AXIS)


def clip_mean(x: Array, valid: Array | None = None) -> Array:
    """`[b f h w c] -> [b 1 1 1 c]`: mean over all tokens of the clip that are real."""
    if valid is None:
        mean = jnp.mean(x, (1, 2, 3), keepdims=True)
        return mean if shards() == 1 else jax.lax.pmean(mean, AXIS)
    total = jnp.sum(jnp.where(_on_tokens(here(valid)), x, 0.0), (1, 2, 3), keepdims=True)
    count = valid.sum(1).astype(x.dtype) * (x.shape[2] * x.shape[3])
    total = total if shards() == 1 else jax.lax.psum(total, AXIS)
    return total / count[:, None, None, None, None]


def with_neighbours(x: Array, valid: Array | None = None) -> Array:
    """`[b f ...] -> [b f+2 ...]`: one more frame on either side; zeros beyond the clip, and in frames that fill it."""
    if valid is not None:
        x = jnp.where(_on_tokens(here(valid)), x, 0)
    count = shards()
    if count == 1:
        return jnp.pad(x, ((0, 0), (1, 1), *((0, 0),) * (x.ndim - 2)))
    before = jax.lax.ppermute(x[:, -1:], AXIS, [(i, i + 1) for i in range(count - 1)])
    after = jax.lax.ppermute(x[:, :1], AXIS, [(i + 1, i) for i in range(count - 1)])
    return jnp.concatenate([before, x, after], axis=1)


def to_pixels(x: Array) -> Array:
    """`[b f/s h w c] -> [(b n) f c]`: all frames of the n pixels that are this device's; n = ceil(h w / s)."""
    return rearrange(all_frames(x), "b f n 1 c -> (b n) f c")


def to_frames(tokens: Array, like: Array) -> Array:
    """Undo `to_pixels`; like: an array `[b f/s h w ...]`."""
    return own_frames(rearrange(tokens, "(b n) f c -> b f n 1 c", b=len(like)), like)


def all_frames(x: Array) -> Array:
    """`[b f/s h w c] -> [b f n 1 c]`: all frames of the n = ceil(h w / s) pixels that are this device's."""
    x = rearrange(x, "b f h w c -> b f (h w) 1 c")
    if (count := shards()) > 1:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % count), (0, 0), (0, 0)))
        x = jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)
    return x


def own_frames(x: Array, like: Array) -> Array:
    """Undo `all_frames`; like: an array `[b f/s h w ...]`."""
    height, width = like.shape[2:4]
    if shards() > 1:
        x = jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)[:, :, : height * width]
    return rearrange(x, "b f (h w) 1 c -> b f h w c", h=height)


def per_pixel(value: Array, tokens: Array) -> Array:
    """`[b ...] -> [(b n) ...]`: repeated for the rows that `to_pixels` made of each clip."""
    return repeat(value, "b ... -> (b n) ...", n=tokens.shape[0] // value.shape[0])


def attention_mask(valid: Array | None, tokens: Array) -> Array | None:
    """`[b f] -> [(b n) 1 1 f]`: which frames may be looked at by rows that `to_pixels` made."""
    return None if valid is None else per_pixel(valid, tokens)[:, None, None]


def _on_tokens(valid: Array) -> Array:
    return valid[:, :, None, None, None]
