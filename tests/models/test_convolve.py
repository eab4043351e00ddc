"""The convolution whose derivative is written out for CPUs equals the plain one in value and in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.models.layers import convolve


def plain(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, (1, 1)), (3, 1, (0, 1)), (5, 1, (0, 0)), (3, 2, (1, 1))]
)
def test_values_and_derivatives_equal_the_plain_convolution(size, stride, padding):
    keys = jax.random.split(jax.random.key(0), 5)
    x, kernel = jax.random.normal(keys[0], (2, 8, 7, 3)), jax.random.normal(keys[1], (size, size, 3, 4))
    dx, dkernel = jax.random.normal(keys[2], x.shape), jax.random.normal(keys[3], kernel.shape)
    dy = jax.random.normal(keys[4], plain(x, kernel, stride, padding).shape)

    def everything(function):
        def value(x, kernel):
            return function(x, kernel, stride, padding)

        y, tangent = jax.jvp(value, (x, kernel), (dx, dkernel))
        pulled = jax.vjp(value, x, kernel)[1](dy)
        # Forward over reverse: what a Gauss-Newton product through a decoder needs.
        _, second = jax.jvp(lambda x: jax.vjp(value, x, kernel)[1](jnp.tanh(value(x, kernel)))[0], (x,), (dx,))
        looped = jax.lax.map(lambda u: jax.vjp(lambda x: value(x, kernel), x)[1](u)[0], jnp.stack([dy, 2 * dy]))
        return y, tangent, *pulled, second, looped

    for ours, theirs in zip(jax.jit(lambda: everything(convolve))(), jax.jit(lambda: everything(plain))()):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * float(jnp.abs(theirs).max()))
