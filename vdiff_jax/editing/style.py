"""The look of one style clip or image on another clip, without training: two changes of the denoiser.

| wrapper            | what it takes from the style               | how                                        |
|--------------------|--------------------------------------------|--------------------------------------------|
| StatisticsGuidance | palette and contrast: mean and covariance  | a linear map of the clean estimate         |
| SharedAttention    | what the network sees in it                | self-attention over own and style's tokens |

Both leave known tokens alone, work on any job and may be used together, `SharedAttention` first (innermost). What holds
the content is the job: FlowEdit, an inversion or SDEdit (`editing.text_edit`) from the clip that shall be styled.

Statistics are those of latents in final scale over frames and space, so where things are does not enter. Between all
linear maps that give the clean estimate the style's mean and covariance the one that moves tokens least is taken (the
optimal transport of Gaussians): with A the clip's covariance and B the style's,

    x' = mean_B + T (x - mean_A),       T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2.

With diagonal A and B this is adaptive instance normalisation (Huang & Belongie 2017). Colours are directions between
latent channels, so the covariance matters. The gradient through the denoiser, `x' = x + sigma^2 / alpha * g`, hardly
moves an estimate that is sure of its colours, and costs three times as much: docs/style.md has the numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.types import (
    Array,
    Conditioning,
    DecodeFn,
    DenoiseFn,
    DenoiserWrapper,
    Known,
    Latents,
    static,
    struct,
)

GRID = 4
"""Cells on either side of the frame that `layout` compares."""

LEAST_VARIANCE = 1e-3
"""Added to either variance of latents (1 in the mean over all clips), so that a flat clip is not blown up."""


@struct
class Statistics:
    """What is taken from latents `[b f h w c]`: mean `[b c]`, covariance `[b c c]` over frames and space, and `grid`
    `[b 4 4 c]`, the mean over the frames at the size of 4 x 4 cells."""

    mean: Array
    covariance: Array
    grid: Array


def statistics(latents: Latents, where: Array | None = None) -> Statistics:
    """Statistics of every clip. where: `[b f h w 1]` f32, 1 = counts for mean and covariance (None: everywhere)."""
    axes = (1, 2, 3)
    where = jnp.ones_like(latents[..., :1]) if where is None else where
    count = jnp.maximum(where.sum(axes), 1.0)
    mean = (where * latents).sum(axes) / count
    centred = where * (latents - mean[:, None, None, None])
    covariance = jnp.einsum("bfhwc,bfhwd->bcd", centred, centred, precision="highest") / count[:, :, None]
    return Statistics(mean, covariance, _resized(latents.mean(axis=1), GRID, GRID))


def transport(own: Statistics, style: Statistics, joint: bool = True) -> Array:
    """`[b c c]`, symmetric: T of the module, the least linear map from one covariance to the other.

    joint: False: of the variances alone, a scale per channel.
    """
    floor = LEAST_VARIANCE * jnp.eye(own.mean.shape[-1], dtype=own.mean.dtype)[None]
    a, b = own.covariance + floor, style.covariance + floor
    if not joint:
        diagonals = [jnp.diagonal(matrix, axis1=1, axis2=2) for matrix in (a, b)]
        return jnp.sqrt(diagonals[1] / diagonals[0])[:, :, None] * jnp.eye(a.shape[-1], dtype=a.dtype)[None]
    root, back = _power(a, 0.5), _power(a, -0.5)
    return _product(back, _power(_product(root, b, root), 0.5), back)


def between(own: Statistics, style: Statistics, amount: float | Array) -> Statistics:
    """Statistics on the way from one clip's to another's, amount 0..1, a scalar or `[b]`: those of a clip that went
    that far along the straight lines of `transport`. The way of the covariance is the shortest there is."""
    amount = jnp.broadcast_to(jnp.asarray(amount, own.mean.dtype), (len(own.mean),))[:, None]
    share, identity = amount[:, :, None], jnp.eye(own.mean.shape[-1], dtype=own.mean.dtype)[None]
    part = identity + share * (transport(own, style) - identity)
    return Statistics(
        own.mean + amount * (style.mean - own.mean),
        _product(part, own.covariance, part),
        own.grid + share[..., None] * (style.grid - own.grid),
    )


@struct
class StatisticsGuidance:
    """Pulls mean and covariance of the clean estimate to a style's.

    style: `statistics` of the style's latents. strength: scalar or `[b]`, 0..1, how far every estimate is pulled. Steps
        add up, so that a half is nearly the whole in the end; for half a style see `between`.
    layout: scalar or `[b]`, 0..1, how far the low-pass of every frame at 4 x 4 cells is pulled, too, to the style's at
        the same place. It moves light and dark to where the style has them, and with them the content: 0 by default.
    joint: False: mean and deviation of every channel by itself, see `transport`.

    Statistics are taken over the unknown tokens. Derivatives through the wrapper take the linear map as fixed.
    """

    style: Statistics
    strength: Any = 1.0
    layout: Any = 0.0
    joint: bool = static(True)

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        def styled(z, logsnr, known, cond, *, next_logsnr, keys):
            x0_hat = denoise_fn(z, logsnr, known, cond, next_logsnr=next_logsnr, keys=keys)
            unknown = known.mask < 0.5
            style = _repeated(self.style, len(z))
            height, width = z.shape[2:4]
            low_pass = jax.vmap(lambda x: _resized(x, height, width), in_axes=1, out_axes=1)
            cells = jax.vmap(lambda x: _resized(x, GRID, GRID), in_axes=1, out_axes=1)(x0_hat)
            placed = x0_hat + _per_row(self.layout, z) * low_pass(style.grid[:, None] - cells)

            own = statistics(placed, unknown.astype(z.dtype))
            fixed = jax.lax.stop_gradient(transport(own, style, self.joint))
            centred = placed - own.mean[:, None, None, None]
            moved = jnp.einsum("bfhwc,bcd->bfhwd", centred, fixed, precision="highest")
            moved = moved + style.mean[:, None, None, None]
            return jnp.where(unknown, x0_hat + _per_row(self.strength, z) * (moved - x0_hat), known.latents)

        return styled


@struct
class SharedAttention:
    """The style runs beside the clip in one doubled batch, at the same level, and lends it its keys and values.

    StyleAligned (Hertz et al. 2024): in the spatial self-attention of every block, frame t of a clip attends to its own
    tokens and to those of frame t of its style, see `models.attention.share_attention`. Temporal attention is not
    shared: it carries motion. Costs twice a plain call. Works on networks conditioned by `types.Conditioning`; a
    guidance of the same denoiser goes around it.

    style: `[b f h w c]`, an image repeated over the frames or a clip. cond: what the network is told of it.
    noise: `[b f h w c]` unit noise that the style is shown under, the same at all levels. weight: scalar or `[b]`,
        0 = not at all, 1 = a token of the style counts like an own one, above 1 = more.

    A clip that equals its style, in its noise too, comes out as without the wrapper.
    """

    style: Latents
    cond: Conditioning
    noise: Latents
    weight: Any = 1.0

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        def shared(z, logsnr, known, cond, *, next_logsnr, keys):
            if not isinstance(cond, Conditioning):
                raise ValueError(f"shared attention needs a network conditioned by Conditioning, not {type(cond)}")
            style, noise, style_cond = _repeated((self.style, self.noise, self.cond), len(z))
            nothing = Known(jnp.zeros_like(known.latents), jnp.zeros_like(known.mask), known.logsnr)
            weight = jnp.broadcast_to(jnp.asarray(self.weight, z.dtype), (len(self.style),))
            both = denoise_fn(
                _joined(z, add_noise(style, noise, logsnr)),
                _joined(logsnr, logsnr),
                _joined(known, nothing),
                dataclasses.replace(_joined(cond, style_cond), style_weight=_repeated(weight, len(z))),
                next_logsnr=_joined(next_logsnr, next_logsnr),
                keys=_joined(keys, keys),
            )
            return both[: len(z)]

        return shared


@struct
class Composition:
    """Wrappers as one, each around the one before: for a place that takes a single one, as a branch of `FlowEdit`."""

    wrappers: tuple[DenoiserWrapper, ...]

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        for wrapper in self.wrappers:
            denoise_fn = wrapper.wrap(denoise_fn, decode_fn)
        return denoise_fn


def _repeated(tree: Any, batch: int) -> Any:
    """Each row as often as fills the batch: guidance calls with the clips twice, the two rows of each side by side."""

    def fill(leaf: Array) -> Array:
        if batch % len(leaf):
            raise ValueError(f"a style of {len(leaf)} rows does not fit {batch} clips: give one per clip")
        return jnp.repeat(leaf, batch // len(leaf), axis=0)

    return jax.tree.map(fill, tree)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _per_row(value: Any, like: Latents) -> Array:
    """A scalar or `[b]` as `[b 1 1 1 1]`, repeated like the style's rows."""
    value = jnp.asarray(value, like.dtype)
    value = jnp.broadcast_to(value, (len(like),)) if value.ndim == 0 else _repeated(value, len(like))
    return value[:, None, None, None, None]


def _resized(x: Array, height: int, width: int) -> Array:
    """`[b h w c]` to another size, averaging where it shrinks."""
    return jax.image.resize(x, (len(x), height, width, x.shape[-1]), "linear", antialias=True)


def _power(matrix: Array, exponent: float) -> Array:
    """A power of symmetric positive matrices `[b c c]`."""
    values, vectors = jnp.linalg.eigh(matrix)
    powers = jnp.maximum(values, LEAST_VARIANCE**2)[:, None] ** exponent
    return jnp.einsum("bij,bkj->bik", vectors * powers, vectors, precision="highest")


def _product(a: Array, b: Array, c: Array) -> Array:
    return jnp.einsum("bij,bjk,bkl->bil", a, b, c, precision="highest")
