"""The learned matrix product that every projection of the network is."""

import math

import jax
from flax import linen as nn


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
        # Two axes only: with three, the gradient of the kernel sums over two of them at once, which CPUs do slowly.
        y = x.astype(self.dtype).reshape(-1, matrix.shape[0]) @ matrix
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, self.features).reshape(1, -1).astype(self.dtype)
        y = y.reshape(*rest, *self.features)
        self.sow("intermediates", "output", y)
        return y
