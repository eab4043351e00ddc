"""Sampling given a measurement: y = A(x) + noise, for any differentiable A, without training for it.

Moment matching posterior sampling (MMPS, Rozet et al. 2024). At every level x given z is taken as Gaussian, with the
denoiser's estimate as its mean and Tweedie's covariance C, and A as linear around that mean. Then

    E[x | z, y] = x0_hat + C A^T (S + A C A^T)^-1 (y - A(x0_hat)),        S = diag(noise_std^2)

which replaces the clean estimate; the sampler does not change. C carries what the prior knows of which latents move
together. A multiple of the identity in its place, as in other methods, leaves the mean of the samples wrong by a good
part of the posterior's deviation behind a decoder (tests/sampling/test_posterior.py). C costs one product with the
transposed derivative of the denoiser per use.

The system is solved by conjugate gradients, every sample on its own, in units of the noise: with W = S^-1/2

    (1 + W A C A^T W) v = W (y - A(x0_hat)),        x' = x0_hat + C A^T W v.

No eigenvalue lies below 1, and at no level does the large `sigma^2 / alpha` (150 at log-SNR -10) meet the solver alone:
it stands in C, which is about as large as the prior's covariance. So fp32 is enough. Entries of different noise are on
one scale, and a missing one (W = 0) is an equation 0 = 0. Fewer iterations than needed leave the directions in which
the measurement says least to the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.sampling.guidance import tweedie_covariance
from vdiff_jax.types import Array, DecodeFn, DenoiseFn, Latents, static, struct

SMALLEST_NOISE_STD = 1e-4
"""Noise below this is taken as this: a hundredth of a step of 8 bits, and its square is safe in fp32."""


@struct
class PosteriorSampling:
    """MMPS as a `DenoiserWrapper`.

    observed: y, an array `[b ...]` or a pytree of them; a leading axis of 1 serves all samples. What it holds where
        `noise_std` is infinite is not read.
    measure: video `[b f h w 3]` (or latents) -> y, each sample on its own and differentiable in both modes, as an
        `editing.degradations.Degradation`, or a `jax.tree_util.Partial`; its arrays are traced.
    noise_std: standard deviation of y about measure(x): a scalar, `[b]`, an array of y's shape, or a pytree of these
        as a prefix of y's. inf = not observed. Behind a decoder, the autoencoder's own error belongs to it:
        sqrt(noise^2 + mse(measure(decode(encode(x))), measure(x))), or the sampler is made to fit what it cannot.
    iterations: of conjugate gradients, each one product with the transposed derivatives of denoiser and decoder, and
        one with the decoder's derivative.
    in_pixels: True: `measure` sees decode_fn(x0_hat). False: the latents themselves, and no decoder is needed.
    """

    observed: Any
    measure: Any
    noise_std: Any
    iterations: int = static(8)
    in_pixels: bool = static(True)

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn:
        """The denoiser of x given z and y. Known tokens stay as they are, and so do frames that are clean.

        Raises:
            ValueError: no decode_fn for a measure in pixels, less than one iteration; when the denoiser is first
                called, a y or noise_std that does not fit what `measure` returns.
        """
        if self.in_pixels and decode_fn is None:
            raise ValueError("posterior sampling in pixels needs a decode_fn; give one, or set in_pixels=False.")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} of conjugate gradients must be at least 1.")

        def predict(x0: Latents) -> Any:
            y = self.measure(decode_fn(x0) if self.in_pixels and decode_fn is not None else x0)
            return jax.tree.map(lambda leaf: leaf.astype(x0.dtype), y)  # a half-precision decoder is solved in fp32

        def restored(z, logsnr, known, cond, *, next_logsnr, keys):
            x0_hat, covariance = tweedie_covariance(
                denoise_fn, z, logsnr, known, cond, next_logsnr=next_logsnr, keys=keys
            )
            y_hat, push = jax.linearize(predict, x0_hat)
            pull = jax.linear_transpose(push, x0_hat)
            weights, residual = _whitened(self.observed, y_hat, self.noise_std)

            def spread(direction: Array) -> Latents:
                """C A^T W."""
                return covariance(pull(_scaled(weights, _split(direction, y_hat)))[0])

            def seen(latents: Latents) -> Array:
                """W A."""
                return _joined(_scaled(weights, push(latents)))

            shift = conjugate_gradients(spread, seen, _joined(residual), self.iterations)
            return jnp.where(known.mask > 0.5, known.latents, x0_hat + shift)

        return restored


def conjugate_gradients(
    spread: Callable[[Array], Array], seen: Callable[[Array], Array], residual: Array, iterations: int
) -> Array:
    """G v with (1 + H G) v = residual, for linear maps G = `spread` and H = `seen`, H G symmetric and not negative.

    Lanczos's form of conjugate gradients: H G is projected on the Krylov space of the residual, T = V^T H G V, and the
    small system solved by eigenvalues, G v = (G V) Q (1 + Lambda)^-1 Q^T V^T residual. All directions are kept and each
    new one is made orthogonal to them twice. In exact arithmetic this is plain conjugate gradients; in fp32 the plain
    recurrence has lost that within eight steps, where few directions are much stronger than the others. It also bears
    an imperfect network, whose C at high noise is neither symmetric nor positive: T is symmetrised, and a direction in
    which its variance comes out negative is left alone.

    Every sample is solved on its own; one whose residual is zero, or used up early, stops there. An iteration applies
    each map once, and there is no call at the end.

    Args:
        residual: `[b m]`. spread: `[b m]` -> `[b ...]`. seen: `[b ...]` -> `[b m]`.
    """
    b, _ = residual.shape
    precision = jax.lax.Precision.HIGHEST
    tiny = 10 * jnp.finfo(residual.dtype).eps

    def normalised(x: Array, floor: Array | float) -> tuple[Array, Array]:
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=1))
        norm = jnp.where(norm > floor, norm, 0.0)
        return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)[:, None] * x, norm

    def body(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, moved, projected = state
        reached = spread(basis[k])
        image = seen(reached)
        size = jnp.sqrt(jnp.sum(jnp.square(image), axis=1))
        for _ in range(2):
            share = jnp.einsum("kbm,bm->bk", basis, image, precision=precision)
            projected = projected.at[:, :, k].add(share)
            image = image - jnp.einsum("kbm,bk->bm", basis, share, precision=precision)
        direction, norm = normalised(image, tiny * size)
        # At the last step there is no next direction: what lies outside is dropped.
        projected = projected.at[:, k + 1, k].set(norm, mode="drop")
        return basis.at[k + 1].set(direction, mode="drop"), moved.at[k].set(reached), projected

    first, length = normalised(residual, 0.0)
    basis = jnp.zeros((iterations, *residual.shape), residual.dtype).at[0].set(first)
    reached = jax.eval_shape(spread, residual)
    moved = jnp.zeros((iterations, *reached.shape), reached.dtype)
    projected = jnp.zeros((b, iterations, iterations), residual.dtype)
    _, moved, projected = jax.lax.fori_loop(0, iterations, body, (basis, moved, projected))

    values, vectors = jnp.linalg.eigh((projected + jnp.swapaxes(projected, 1, 2)) / 2)
    kept = jnp.where(values > 0, vectors[:, 0] / (1 + values), 0.0) * length[:, None]
    weights = jnp.einsum("bkj,bj->kb", vectors, kept, precision=precision)
    return jnp.sum(weights.reshape(weights.shape + (1,) * (moved.ndim - 2)) * moved, axis=0)


def chi_square(y: Any, y_hat: Any, noise_std: Any) -> Array:
    """Mean over the observed entries of ((y - y_hat) / noise_std)^2, `[b]`.

    1 = the answer explains the measurement up to its noise. Of several candidates the smallest has found the most
    likely clip, where the others have come to rest in wrong ones. Arguments as the fields of `PosteriorSampling`,
    y_hat = measure(answer). nan where nothing is observed.

    Raises:
        ValueError: shapes that do not fit.
    """
    weights, residual = _whitened(y, y_hat, noise_std)
    return jnp.sum(jnp.square(_joined(residual)), axis=1) / jnp.sum(_joined(weights) > 0, axis=1)


def _whitened(observed: Any, y_hat: Any, noise_std: Any) -> tuple[Any, Any]:
    """1 / noise_std of every entry (0 = missing), and the residual in units of it; both of y_hat's structure."""
    if jax.tree.structure(observed) != jax.tree.structure(y_hat):
        given, made = jax.tree.structure(observed), jax.tree.structure(y_hat)
        raise ValueError(f"observed is {given}, but measure returns {made}; give what measure returns.")
    stds = jax.tree.broadcast(noise_std, y_hat)
    weights = jax.tree.map(_weight, stds, y_hat)

    def difference(weight: Array, y: Any, y_hat: Array) -> Array:
        y = jnp.asarray(y, y_hat.dtype)
        if y.shape != y_hat.shape and y.shape != (1, *y_hat.shape[1:]):
            raise ValueError(f"observed has shape {y.shape}, but measure returns {y_hat.shape}; they must agree.")
        return jnp.where(weight > 0, weight * (y - y_hat), 0.0)

    return weights, jax.tree.map(difference, weights, observed, y_hat)


def _weight(std: Any, y_hat: Array) -> Array:
    std = jnp.asarray(std, y_hat.dtype)
    shape = std.shape + (1,) * (y_hat.ndim - std.ndim) if std.ndim <= 1 else std.shape
    if len(shape) != y_hat.ndim or any(n not in (1, m) for n, m in zip(shape, y_hat.shape)):
        raise ValueError(f"noise_std of shape {std.shape} must be a scalar, [b] or of y's shape {y_hat.shape}.")
    return jnp.broadcast_to(1 / jnp.maximum(std.reshape(shape), SMALLEST_NOISE_STD), y_hat.shape)


def _scaled(weights: Any, y: Any) -> Any:
    return jax.tree.map(jnp.multiply, weights, y)


def _joined(y: Any) -> Array:
    """A pytree of `[b ...]` as `[b m]`."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(y)], axis=1)


def _split(joined: Array, like: Any) -> Any:
    """The inverse of `_joined`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
    parts = jnp.split(joined, ends[:-1], axis=1)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)])
