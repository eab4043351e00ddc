"""Gaussian clips with an exact denoiser: every law that a sampler should reach is known in closed form.

x ~ N(mean, K_time (x) K_space), z = alpha x + sigma eps with a level per token, so

    E[x | z] = mean + K A (A K A + S^2)^-1 (z - A mean),    A = diag(alpha), S = diag(sigma).

Sampling without step noise is then a linear map of the start noise. Feeding the rows of a matrix root of the start
covariance as a batch gives the map's output law exactly, without Monte Carlo.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.process import alpha_sigma, token_logsnr


@dataclasses.dataclass(frozen=True)
class GaussianVideo:
    """Clips of shape (f, h, w, c) with an AR(1) covariance in time and in space; the mean is the conditioning."""

    shape: tuple[int, int, int, int] = (4, 2, 2, 1)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def covariance(self) -> np.ndarray:
        f, h, w, c = self.shape
        time = 0.8 ** np.abs(np.subtract.outer(np.arange(f), np.arange(f)))
        space = 0.5 ** np.abs(np.subtract.outer(np.arange(h * w * c), np.arange(h * w * c)))
        scale = np.linspace(0.5, 1.5, h * w * c)
        return np.kron(time, space * np.outer(scale, scale))

    def rows(self, matrix: np.ndarray) -> jax.Array:
        """`[b n]` as latents `[b f h w c]`."""
        return jnp.asarray(matrix).reshape(-1, *self.shape)

    def flat(self, latents: jax.Array) -> np.ndarray:
        return np.asarray(latents).reshape(latents.shape[0], -1)

    def noisy_covariance(self, logsnr: float) -> np.ndarray:
        """Covariance of z when all tokens have one level."""
        alpha, sigma = (float(value) for value in alpha_sigma(jnp.asarray(logsnr, float)))
        return alpha**2 * self.covariance + sigma**2 * np.eye(self.size)

    def posterior(self, given: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the tokens not `given` [n] bool, for zero prior mean and exact `values`."""
        k = self.covariance
        gain = k[~given][:, given] @ np.linalg.inv(k[given][:, given])
        return gain @ values, k[~given][:, ~given] - gain @ k[given][:, ~given]

    def denoise_fn(self, z, logsnr, known, cond, *, next_logsnr, keys):
        """The exact posterior mean; cond is the prior mean `[b f h w c]`. Levels must be equal over the batch."""
        level = token_logsnr(logsnr[:1], known.mask[:1], known.logsnr[:1])
        level = jnp.broadcast_to(level, (1, *self.shape)).reshape(-1)
        alpha, sigma = alpha_sigma(level)
        k = jnp.asarray(self.covariance, z.dtype)
        observed = alpha[:, None] * k * alpha[None] + jnp.diag(sigma**2)
        gain = jnp.linalg.solve(observed, alpha[:, None] * k).T
        mean = cond.reshape(z.shape[0], -1)
        residual = z.reshape(z.shape[0], -1) - alpha[None] * mean
        return (mean + residual @ gain.T).reshape(z.shape)


def root(matrix: np.ndarray) -> np.ndarray:
    """R with R^T R = matrix."""
    return np.linalg.cholesky(matrix).T
