"""Layers on `[b f h w c]` arrays: dense, convolutions, norms, embeddings.

Each costly operation has one function here, so its lowering is chosen in one place. The forms below are the
fastest measured for XLA:CPU and at least as good elsewhere: 1 x 1 convolutions and dense layers are 2-D matmuls,
1 x 3 x 3 convolutions fold frames into the batch, 3 x 1 x 1 convolutions are three shifted matmuls, and group norm
is one statistics pass and one multiply-add. Parameters and norm statistics are fp32; matmuls run in `dtype`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import linear_call

from vdiff_jax.models import frame_axis
from vdiff_jax.models.functional import parameter
from vdiff_jax.types import Array

Scope = Literal["frame", "video"]


class Dense(nnx.Module):
    """`y = x W + b` on the last axis, `[... in] -> [... out]`; kernel `[in out]`.

    init_scale: standard deviation of the kernel in units of 1/sqrt(in); 0 gives a zero-initialised layer.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias=True, init_scale=1.0, dtype=jnp.float32):
        self.kernel = parameter((in_features, out_features), std=init_scale / math.sqrt(in_features))
        self.bias = parameter((out_features,)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = x.reshape(-1, kernel.shape[0]).astype(self.dtype) @ kernel
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], kernel.shape[1])


def convolve(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """2-D convolution `[n h w i] -> [n h' w' o]` with a kernel `[k k i o]`, the same padding on both axes.

    XLA:CPU takes 45 times as long for the derivative with respect to x as for the convolution where it stands inside a
    loop, as every denoiser that is differentiated while sampling does: it asks for a reversed window, and for that the
    fast kernels are not chosen. There the kernel is turned around beforehand.

    Where the frame is smaller than the kernel, as at the last level of small videos, it exchanges the two before it
    looks for a fast kernel, finds none and takes 40 to 90 times as long; there the convolution is a matmul.
    """
    if stride == 1 and jax.default_backend() == "cpu" and x.shape[1] * x.shape[2] < kernel.shape[0] * kernel.shape[1]:
        return _convolve_as_matmul(x, kernel, padding)
    if stride == 1 and jax.default_backend() == "cpu":
        return _convolve_on_cpu(x, kernel, padding)
    return _convolve(x, kernel, stride, padding)


def _convolve(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_as_matmul(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """Every token's neighbourhood as one long row."""
    size, _, in_features, out_features = kernel.shape
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = padded.shape[1] - size + 1, padded.shape[2] - size + 1
    shifted = [padded[:, y : y + height, z : z + width] for y in range(size) for z in range(size)]
    rows = jnp.concatenate(shifted, axis=-1).reshape(-1, size * size * in_features)
    return (rows @ kernel.reshape(-1, out_features)).reshape(-1, height, width, out_features)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve_on_cpu(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    return _convolve(x, kernel, 1, padding)


@_convolve_on_cpu.defjvp
def _convolve_on_cpu_jvp(padding: tuple[int, int], primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    reach = kernel.shape[0] - 1

    def forward(kernel: Array, dx: Array) -> Array:
        return _convolve(dx, kernel, 1, padding)

    def transposed(kernel: Array, dy: Array) -> Array:
        # Without the barrier the compiler folds the reversal back into the convolution.
        turned = jax.lax.optimization_barrier(jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
        return _convolve(dy, turned, 1, (reach - padding[0], reach - padding[1]))

    through_x = linear_call(forward, transposed, kernel, dx)
    return _convolve(x, kernel, 1, padding), through_x + _convolve(x, dkernel, 1, padding)


class FrameConv(nnx.Module):
    """2-D convolution of every frame, `[b f h w in] -> [b f h' w' out]`; kernel `[k k in out]`.

    padding: (before, after) on both space axes; None keeps the size at stride 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        init_scale: float = 1.0,
        dtype=jnp.float32,
    ):
        fan_in = in_features * kernel_size**2
        self.kernel = parameter(
            (kernel_size, kernel_size, in_features, out_features), std=init_scale / math.sqrt(fan_in)
        )
        self.bias = parameter((out_features,))
        self.stride = stride
        self.padding = padding if padding is not None else (kernel_size // 2, kernel_size // 2)
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        batch, num_frames, *size = x.shape
        x = x.reshape(batch * num_frames, *size).astype(self.dtype)
        y = convolve(x, self.kernel[...].astype(self.dtype), self.stride, self.padding)
        y = y + self.bias[...].astype(self.dtype)[None, None, None]
        return y.reshape(batch, num_frames, *y.shape[1:])


class TemporalConv(nnx.Module):
    """3 x 1 x 1 convolution over frames, `[b f h w in] -> [b f h w out]`, zero padded; kernel `[3 in out]`.

    valid: `[b f]`, frames that count; the others are zeros to their neighbours. See `frame_axis`.
    """

    def __init__(self, in_features: int, out_features: int, *, init_scale: float = 1.0, dtype=jnp.float32):
        self.kernel = parameter((3, in_features, out_features), std=init_scale / math.sqrt(3 * in_features))
        self.bias = parameter((out_features,))
        self.dtype = dtype

    def __call__(self, x: Array, valid: Array | None = None) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        num_frames = x.shape[1]
        padded = frame_axis.with_neighbours(x.astype(self.dtype), valid)
        y = jnp.zeros((), self.dtype)
        for tap in range(3):  # shifted dots: XLA:CPU runs them several times faster than a 3-D convolution
            shifted = jax.lax.slice_in_dim(padded, tap, tap + num_frames, axis=1)
            y = y + (shifted.reshape(-1, kernel.shape[1]) @ kernel[tap])
        y = y + self.bias[...].astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], kernel.shape[2])


class GroupNorm(nnx.Module):
    """Group normalisation with a named scope (Wu & He 2018), in fp32, optionally modulated (FiLM).

    scope "frame" (`frame_norm`): statistics over h, w and the channels of a group, each frame by itself, as in an
    image model. scope "video" (`video_norm`): jointly over frames too, those that are `valid` (see `frame_axis`).
    `x [b f h w c]`; `scale, shift [b f c]` modulate the output as `(1 + scale) * y + shift`.
    """

    def __init__(self, features: int, *, groups: int, scope: Scope, epsilon: float, dtype=jnp.float32):
        if features % groups:
            raise ValueError(f"norm_groups={groups} does not divide {features} channels: choose a divisor")
        self.scale = parameter((features,), fill=1.0)
        self.bias = parameter((features,))
        self.groups, self.scope, self.epsilon, self.dtype = groups, scope, epsilon, dtype

    def __call__(
        self, x: Array, scale: Array | None = None, shift: Array | None = None, *, valid: Array | None = None
    ) -> Array:
        x32 = x.astype(jnp.float32)
        # Per channel first, then over the channels of a group: the big reduction stays contiguous.
        mean = self._over_group(self._mean(x32, valid))
        square = self._over_group(self._mean(jnp.square(x32), valid))
        gain = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon) * self._per_channel(self.scale)
        offset = self._per_channel(self.bias) - mean * gain
        if scale is not None and shift is not None:
            modulation = 1.0 + scale.astype(jnp.float32)[:, :, None, None, :]
            gain, offset = gain * modulation, offset * modulation + shift.astype(jnp.float32)[:, :, None, None, :]
        return (x32 * gain + offset).astype(self.dtype)

    def _mean(self, x: Array, valid: Array | None) -> Array:
        return jnp.mean(x, (2, 3), keepdims=True) if self.scope == "frame" else frame_axis.clip_mean(x, valid)

    def _over_group(self, statistic: Array) -> Array:
        grouped = statistic.reshape(*statistic.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(statistic.shape)

    @staticmethod
    def _per_channel(value: nnx.Param) -> Array:
        return value[...][None, None, None, None]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in fp32."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, dtype=jnp.float32):
        self.scale = parameter((features,), fill=1.0)
        self.bias = parameter((features,))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        shape = (1,) * (x.ndim - 1) + (-1,)
        normed = (x32 - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(self.dtype)


class Downsample(nnx.Module):
    """Halve height and width by a stride-2 3 x 3 convolution.

    padding: (1, 1) in UNets; (0, 1) in the Stable Diffusion autoencoder's encoder.
    """

    def __init__(self, features: int, *, padding: tuple[int, int] = (1, 1), dtype=jnp.float32):
        self.conv = FrameConv(features, features, stride=2, padding=padding, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double height and width: nearest neighbour, then a 3 x 3 convolution to `out_features` (default: unchanged)."""

    def __init__(self, features: int, out_features: int | None = None, *, dtype=jnp.float32):
        self.conv = FrameConv(features, out_features or features, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


def sinusoidal_embedding(position: Array, features: int, *, max_period: float = 10_000.0) -> Array:
    """`[...] -> [... features]`: cosines, then sines, of frequencies 1 .. 1/max_period (Vaswani et al. 2017)."""
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = position.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * position.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


COORDINATE_FEATURES = 14


def coordinate_embedding(height: int, width: int) -> Array:
    """`[h w 14]`: where a token stands in its frame, whatever the resolution.

    Token centres `y, x` in [-1, 1], and sine and cosine of each at a half, one and two turns over the frame.
    """
    y = (2.0 * jnp.arange(height, dtype=jnp.float32) + 1.0) / height - 1.0
    x = (2.0 * jnp.arange(width, dtype=jnp.float32) + 1.0) / width - 1.0
    centre = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), axis=-1)
    angles = (centre[..., None] * (jnp.pi * jnp.array([0.5, 1.0, 2.0]))[None, None, None]).reshape(height, width, 6)
    return jnp.concatenate([centre, jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Feedforward(nnx.Module):
    """Transformer feed-forward, `[... d] -> [... d]`: GEGLU with exact GELU (Shazeer 2020); output scale settable."""

    def __init__(self, features: int, *, expansion: int = 4, init_scale: float = 1.0, dtype=jnp.float32):
        self.proj_in = Dense(features, 2 * expansion * features, dtype=dtype)
        self.proj_out = Dense(expansion * features, features, init_scale=init_scale, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        hidden, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(hidden * jax.nn.gelu(gate, approximate=False))
