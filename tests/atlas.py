"""A small enumerated world of captioned clips, and its exact denoiser.

The data are finitely many clips x_k (atoms), equally likely under a caption, so

    E[x | z, caption] = sum_k p_k x_k,    log p_k = -1/2 sum over tokens (alpha / sigma)^2 (z / alpha - x_k)^2 + const

over the atoms that the caption allows. This is what a perfect network would output: multi-modal, captioned, and with
posteriors known by enumeration. An object of one colour and shape moves in one direction over grey, in a palette whose
colours share a luminance contrast.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.process import token_logsnr

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
SHAPES = ("circle", "square")
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
NUM_FRAMES, SIZE, SPEED, RADIUS = 4, 12, 1.0, 2.2
BACKGROUND = 0.1  # two colours are much nearer to each other than either to it, so a recoloured clip is the nearest one


@dataclasses.dataclass(frozen=True)
class Atlas:
    """atoms: `[k f h w 3]` f32, zero mean and unit variance; names: the (colour, shape, direction) of every atom."""

    atoms: np.ndarray
    names: tuple[tuple[str, str, str], ...]
    centres: np.ndarray

    def allowed(self, *words: str) -> np.ndarray:
        """`[k]` bool, the atoms whose caption holds all the words."""
        return np.array([set(words) <= set(name) for name in self.names])

    def cond(self, batch: int, *words: str) -> jax.Array:
        """The conditioning of a caption: log-prior over atoms, `[b k]`."""
        return jnp.broadcast_to(jnp.where(jnp.asarray(self.allowed(*words)), 0.0, -jnp.inf), (batch, len(self.names)))

    def denoise_fn(self, z, logsnr, known, cond, *, next_logsnr, keys):
        """The exact posterior mean under the log-prior `cond` `[b k]`."""
        level = jnp.broadcast_to(token_logsnr(logsnr, known.mask, known.logsnr), z.shape).reshape(z.shape[0], -1)
        ratio = jnp.exp(level)  # (alpha / sigma)^2, and alpha / sigma^2 = ratio / alpha
        atoms = jnp.asarray(self.atoms).reshape(len(self.names), -1)
        pull = (ratio / jnp.sqrt(jax.nn.sigmoid(level)) * z.reshape(z.shape[0], -1)) @ atoms.T
        log_p = cond + pull - 0.5 * ratio @ jnp.square(atoms).T
        return (jax.nn.softmax(log_p, axis=1) @ atoms).reshape(z.shape)

    def nearest(self, latents) -> tuple[np.ndarray, np.ndarray]:
        """Index of the nearest atom of every sample, and the root mean squared distance to it."""
        flat = np.asarray(latents, np.float64).reshape(len(latents), -1)
        atoms = self.atoms.reshape(len(self.names), -1).astype(np.float64)
        square = (flat**2).sum(1)[:, None] - 2 * flat @ atoms.T + (atoms**2).sum(1)[None]
        best = square.argmin(1)
        return best, np.sqrt(np.maximum(square.min(1), 0) / flat.shape[1])


def draw_clip(colour: str, shape: str, direction: str, centre: tuple[float, float]) -> np.ndarray:
    """`[f h w 3]` in [0, 1]: anti-aliased by signed distance; `centre` is the middle of the path."""
    grid = np.arange(SIZE)
    time = (np.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2) * SPEED
    dy, dx = DIRECTIONS[direction]
    y = grid[None, :, None] - (centre[0] + dy * time)[:, None, None]
    x = grid[None, None, :] - (centre[1] + dx * time)[:, None, None]
    distance = np.hypot(y, x) - RADIUS if shape == "circle" else np.maximum(np.abs(y), np.abs(x)) - RADIUS
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    return BACKGROUND + cover * (0.6 + 0.35 * np.array(COLOURS[colour]) - BACKGROUND)


@functools.cache
def atlas() -> Atlas:
    """All colours, shapes and directions at 5 x 5 places: 600 clips of 4 x 12 x 12 pixels."""
    places = np.linspace(4, SIZE - 5, 5)
    keys = list(itertools.product(COLOURS, SHAPES, DIRECTIONS, itertools.product(places, places)))
    clips = np.stack([draw_clip(*key) for key in keys])
    clips = (clips - clips.mean()) / clips.std()
    return Atlas(
        atoms=clips.astype(np.float32),
        names=tuple(key[:3] for key in keys),
        centres=np.array([key[3] for key in keys]),
    )
