"""The contracts of the house on one page: shapes, structs and function types, no logic.

Axes are `b f h w c` (batch, frames, height, width, channels); text tokens `n`, features `d`.

Representations, in the order data meets them:

| name      | dtype | range or scale                      | shape       |
|-----------|-------|-------------------------------------|-------------|
| `frames`  | u8    | 0..255                              | [f h w c]   |
| `video`   | f32   | -1..1                               | [b f h w c] |
| `latents` | f32   | zero mean, unit variance (final)    | [b f h w c] |
| `z`       | f32   | `alpha * x + sigma * eps`, VP scale | [b f h w c] |

The noise level is `logsnr = 2 log(alpha / sigma)`, one number per frame, `[b f]`; high is clean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, dataclass_transform

import jax
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array
Params: TypeAlias = dict[str, Any]  # plain nested dict of arrays; paths equal checkpoint paths
Frames: TypeAlias = Int[Array, "f h w c"]
Video: TypeAlias = Float[Array, "b f h w c"]
Latents: TypeAlias = Float[Array, "b f h w c"]
LogSNR: TypeAlias = Float[Array, "b f"]
KnownMask: TypeAlias = Float[Array, "b f h w 1"]
Batch: TypeAlias = dict[str, Array]
"""What a loader yields, all arrays with the batch axis first.

    video       f32  [b f h w c]   -1..1           (or `moments` below, from the latent cache)
    moments     f32  [b f h w 2c]  raw posterior mean and log-variance of the autoencoder
    tokens      i32  [b n]         prompt token ids, padded
    token_mask  bool [b n]         True at real tokens
    times       f32  [b f]         time stamp of each frame, in native frame intervals
    anchor      bool [b]           True where frame 0 is a far anchor frame (optional)
    valid       bool [b f]         True at real frames, which come first; the rest fills the clip up (optional)
"""


@dataclass_transform(frozen_default=True)
def struct(cls):
    """Frozen dataclass that is a pytree: all fields are children, but for those made by `static(default)`."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names: dict[bool, list[str]] = {True: [], False: []}
    for field in dataclasses.fields(cls):
        names[bool(field.metadata.get("static"))].append(field.name)
    return jax.tree_util.register_dataclass(cls, data_fields=names[False], meta_fields=names[True])


def static(default: Any) -> Any:
    """A field of a `struct` that chooses what is compiled: hashable, not traced."""
    return dataclasses.field(default=default, metadata={"static": True})


@struct
class Conditioning:
    """What the network is told beside the noisy latents.

    text: token features `[b n d]` f32, or None for an unconditional model.
    text_mask: `[b n]` bool, True at real tokens.
    times: `[b f]` f32, real-valued time stamps in native frame intervals (0, 1, 2, ... by default;
        strides, slow motion and anchors are other numbers).
    style_weight: `[b/2]` f32, or None for rows that do not see each other. Row `i` of the first half of the batch takes
        its looks from row `i + b/2`, its style, by shared attention (see `editing.style.SharedAttention`): 0 = not at
        all, 1 = as from itself, above 1 = more.

    Public networks that animate an image or know a clip's rate (Stable Video Diffusion, I2VGen-XL) read, beside these:

    image_latents: `[b f h w c]` f32, the image's latents on every frame, as further input channels.
    image_embedding: `[b d]` f32, of an image encoder (I2VGen-XL; SVD reads its own as the one token of `text`).
    added: `[b k]` f32, numbers about the clip: fps - 1, motion bucket, noise augmentation (SVD); fps (I2VGen-XL).

    And all networks:

    valid: `[b f]` bool, True at real frames, or None where all are. Frames that fill a clip up to the length of its
        batch change nothing in the real ones, if `times` goes on over them in the clip's last step.
    """

    text: Float[Array, "b n d"] | None
    text_mask: Bool[Array, "b n"] | None
    times: Float[Array, "b f"]
    style_weight: Float[Array, " half_b"] | None = None
    image_latents: Latents | None = None
    image_embedding: Float[Array, "b d"] | None = None
    added: Float[Array, "b k"] | None = None
    valid: Bool[Array, "b f"] | None = None


@struct
class Known:
    """What is given inside the window.

    latents: `[b f h w c]` f32, final scale; only read where `mask` is 1.
    mask: `[b f h w 1]` f32, 1 = known context, 0 = to generate.
    logsnr: `[b f]` f32, the level at which known tokens are shown (the noise is really added).
    """

    latents: Latents
    mask: KnownMask
    logsnr: LogSNR


@struct
class Job:
    """A task as data for the one scan: `sampling.sample(denoise_fn, job, sampler, keys)`.

    z: `[b f h w c]` f32, start latents at level `plan[0]`, VP scale.
    plan: `[s+1 b f]` f32, the log-SNR of every frame before each of the `s` steps and after the last.
        A frame whose level does not change in a step is frozen in it. Plans may run backwards.
    known: what is given (a mask of zeros: nothing).
    cond: the conditioning, a pytree handed to the denoiser untouched.
    noise: optional tape `[s b f h w c]` of unit noise for stochastic steps; None draws it from the keys.
    """

    z: Latents
    plan: Float[Array, "s1 b f"]
    known: Known
    cond: Any
    noise: Float[Array, "s b f h w c"] | None = None


class PredictFn(Protocol):
    """A network with its parameters as first argument; `z` in VP scale, known tokens at their level.

    z `[b f h w c]`, logsnr `[b f]` (level of the unknown tokens), known_mask `[b f h w 1]`,
    context_logsnr `[b f]` (level of the known tokens), cond -> prediction `[b f h w c]` f32.
    """

    def __call__(
        self, params: Params, z: Latents, logsnr: LogSNR, known_mask: KnownMask, context_logsnr: LogSNR, cond: Any
    ) -> Latents: ...


class DenoiseFn(Protocol):
    """The one currency between model, guidance, restoration, edits and sampler.

    z: `[b f h w c]`, always VP scale, known tokens already pinned at their level.
    logsnr: `[b f]`, level of the unknown tokens. known: see `Known`. cond: any pytree.
    next_logsnr: `[b f]`, the level this step goes to (few-step models need it).
    keys: `[b]` PRNG keys of this step, one per sample (denoisers that draw noise need them).
    Returns x0_hat `[b f h w c]` f32, the clean estimate.
    """

    def __call__(
        self, z: Latents, logsnr: LogSNR, known: Known, cond: Any, *, next_logsnr: LogSNR, keys: Array
    ) -> Latents: ...


DecodeFn: TypeAlias = Callable[[Latents], Video]
"""Final latents `[b f h w c]` -> video `[b f H W 3]` f32, differentiable, nominally -1..1."""


class DenoiserWrapper(Protocol):
    """A change of the denoiser as data: guidance, restoration, an edit, a style.

    Implementations are `struct`s, so that one compiled function takes them as arguments: other values of the same
    shapes do not compile again.
    """

    def wrap(self, denoise_fn: DenoiseFn, decode_fn: DecodeFn | None = None) -> DenoiseFn: ...
