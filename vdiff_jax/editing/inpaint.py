"""Masked editing: what the mask covers is made anew, everything else is known.

The order matters, and each step has its reason:

1. The hole is filled smoothly from its border before encoding, so that what was in it does not reach its neighbours
   through the encoder.
2. A token is known only if it lies clear of the mask by a margin, because decoder and encoder look beyond their cell.
3. Known tokens are clean context, exactly (never re-noised copies, which bias what is made).
4. The result is pasted softly inside the mask. Outside the mask every pixel is the input's.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax.sampling.job import CLEAN_LOGSNR
from vdiff_jax.types import Known, KnownMask, Latents

MARGIN = 1
"""Tokens around the mask that are made anew with it."""


def known_tokens(mask: np.ndarray, latent_height: int, latent_width: int, margin: int = MARGIN) -> KnownMask:
    """`mask [b f H W]` (above 0.5 = change) -> `[b f h w 1]` f32, 1 where a token stays.

    Every token whose cell the mask touches is made anew, and `margin` tokens around those.

    Raises:
        ValueError: the mask's size is not a multiple of the latents'.
    """
    height, width = mask.shape[2:]
    if height % latent_height or width % latent_width:
        raise ValueError(f"a mask of {height}x{width} does not fit latents of {latent_height}x{latent_width}")
    cells = (np.asarray(mask) > 0.5).reshape(
        *mask.shape[:2], latent_height, height // latent_height, latent_width, width // latent_width
    )
    touched = np.asarray(cells.any(axis=(3, 5)))
    if margin:
        side = 2 * margin + 1
        touched = np.asarray(ndimage.maximum_filter(touched, size=(1, 1, side, side)))
    return jnp.asarray(np.logical_not(touched)[..., None], jnp.float32)


def known_outside(latents: Latents, mask: np.ndarray, margin: int = MARGIN) -> Known:
    """What stays of a clip whose hole was filled before encoding: all tokens clear of `mask [b f H W]`."""
    height, width = latents.shape[2:4]
    known = known_tokens(mask, height, width, margin)
    return Known(latents, known, jnp.full(latents.shape[:2], CLEAN_LOGSNR, latents.dtype))


def fill_hole(video: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`video [b f H W 3]` with the pixels under `mask [b f H W]` (above 0.5) replaced by a smooth continuation.

    Push-pull (Gortler et al. 1996): averages over the pixels outside the mask at ever coarser scales fill what is still
    open at the finer one. A frame that the mask covers wholly gets the mean of what is outside in all frames, or grey.
    """
    video = np.asarray(video, np.float32)
    weight = (np.asarray(mask) <= 0.5).astype(np.float32)[..., None]
    outside = weight.sum(axis=(1, 2, 3), keepdims=True)
    clip_mean = (video * weight).sum(axis=(1, 2, 3), keepdims=True) / np.maximum(outside, 1)
    filled = np.where(weight.sum(axis=(2, 3), keepdims=True) > 0, _push_pull(video, weight), clip_mean)
    return np.where(weight > 0, video, filled).astype(np.float32)


def _push_pull(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Values `[b f H W c]` where weight `[b f H W 1]` is 1, and a smooth continuation of them elsewhere."""
    height, width = values.shape[2:4]
    if max(height, width) == 1 or weight.min() > 0:
        return values
    pad = ((0, 0), (0, 0), (0, height % 2), (0, width % 2), (0, 0))
    shape = (*values.shape[:2], (height + 1) // 2, 2, (width + 1) // 2, 2)
    sums = np.pad(values * weight, pad).reshape(*shape, -1).sum(axis=(3, 5))
    counts = np.pad(weight, pad).reshape(*shape, 1).sum(axis=(3, 5))
    coarse = _push_pull(sums / np.maximum(counts, 1e-6), np.minimum(counts, 1.0))
    fine = np.repeat(np.repeat(coarse, 2, axis=2), 2, axis=3)[:, :, :height, :width]
    for axis in (2, 3):
        fine = np.asarray(ndimage.uniform_filter1d(fine, 3, axis, mode="nearest"))  # no staircase at the coarser cells
    return weight * values + (1 - weight) * fine


def paste(original: np.ndarray, made: np.ndarray, mask: np.ndarray, feather: float = 1.0) -> np.ndarray:
    """`made` inside the mask, `original` outside it, bit for bit; frames u8 `[f H W 3]`, mask `[f H W]` (above 0.5).

    feather: pixels over which, inwards from the mask's edge, the one goes over into the other.

    Raises:
        ValueError: a feather below 0.
    """
    if not feather >= 0:
        raise ValueError(f"feather={feather} pixels: it must be at least 0")
    inside = np.asarray(mask) > 0.5
    # The frame's border is no edge of the mask: beyond it there is nothing to go over into.
    padded = [np.asarray(ndimage.distance_transform_edt(np.pad(m, 1, mode="edge"))) for m in inside]
    depth = np.stack([distance[1:-1, 1:-1] for distance in padded])
    depth = np.where(inside.all(axis=(1, 2), keepdims=True), np.inf, depth)
    weight = np.clip(depth / (1.0 + feather), 0.0, 1.0)[..., None]
    mixed = np.rint(original * (1 - weight) + made * weight).astype(np.uint8)
    return np.where(inside[..., None], mixed, original)
