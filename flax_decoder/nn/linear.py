"""The learned matrix product that every projection of the network is."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.nn.axes import num_parts


class Linear(nn.Module):
    """y = x W + b, over the last axes of x.

    The kernel keeps its axes apart, so that heads stay visible: a query projection has the shape (D, N, H).

    Attributes:
        features: shape that takes the place of the input's last axes, such as (N, H).
        num_input_axes: how many of the input's last axes are summed over; 2 joins heads and head width again.
        use_bias: whether b is there.
        init_stddev: standard deviation of the kernel at the start; 0 starts it at zero.
        dtype: what the product is computed in; the kernel itself is float32.
    """

    features: tuple[int, ...]
    num_input_axes: int = 1
    use_bias: bool = False
    init_stddev: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., *inputs) to (..., *features)."""
        rest, inputs = x.shape[: -self.num_input_axes], x.shape[-self.num_input_axes :]
        kernel = self.param("kernel", nn.initializers.normal(self.init_stddev), (*inputs, *self.features))
        matrix = kernel.reshape(math.prod(inputs), math.prod(self.features)).astype(self.dtype)
        y = project(x.astype(self.dtype).reshape(*rest, -1), matrix)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features).astype(self.dtype)
            y += bias.reshape((1,) * len(rest) + (-1,))
        y = y.reshape(*rest, *self.features)
        self.sow("intermediates", "output", y)
        return y


def project(x: jax.Array, matrix: jax.Array, dtype: str | jnp.dtype | None = None) -> jax.Array:
    """x W over the last axis of x.

    Args:
        x: (batch, length, inputs).
        matrix: (inputs, outputs).
        dtype: of the result, where it is not that of `x`.
    """
    if num_parts("length") > 1:
        return jnp.dot(x, matrix, preferred_element_type=dtype)  # merged with the batch, a split axis would be gathered
    # Two axes only: with three, the gradient of the kernel sums over two of them at once, which CPUs do slowly.
    rows = jnp.dot(x.reshape(-1, matrix.shape[0]), matrix, preferred_element_type=dtype)
    return rows.reshape(*x.shape[:-1], matrix.shape[1])
