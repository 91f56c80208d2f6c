"""The learned matrix product, of which every projection of the network is one."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import Adapter
from flax_decoder.nn.axes import num_parts
from flax_decoder.nn.precision import add_parameter
from flax_decoder.nn.traffic import written_once


class Linear(nn.Module):
    """y = x W + b, over the last axes of x; the equation at the call says which.

    The kernel keeps its axes apart, so that heads stay visible: `Linear((N, H), ...)("BTD,DNH->BTNH", x)` has one of
    shape (D, N, H).

    Attributes:
        features: shape of the last axes of y, such as (N, H).
        dtype: of the product; the kernel itself is float32.
        use_bias: whether b is there.
        init_stddev: standard deviation of the kernel at the start; 0 starts it at zero.
        adapter: how much "lora_a" and "lora_b" beside the kernel add, where its params have them: scale (x A) B.
    """

    features: tuple[int, ...]
    dtype: str = "float32"
    use_bias: bool = False
    init_stddev: float = 0.02
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        """Maps (..., *inputs) to (..., *features), as `jnp.einsum(equation, x, kernel)`.

        Args:
            equation: such as "BTD,DNH->BTNH". It sums over the last axes of x, which are the first of the kernel.
            x: the input.
        """
        num_inputs = num_summed_axes(equation)
        rest, inputs = x.shape[:-num_inputs], x.shape[-num_inputs:]
        kernel = self.param("kernel", nn.initializers.normal(self.init_stddev), (*inputs, *self.features))
        matrix = kernel.reshape(math.prod(inputs), math.prod(self.features)).astype(self.dtype)
        x = x.astype(self.dtype).reshape(*rest, -1)
        y = project(x, matrix)
        if self.has_variable("params", "lora_a"):
            if self.adapter is None:
                raise ValueError("the params have adapters: make a Decoder(config.model, config.lora.adapter)")
            a: jax.Array = self.get_variable("params", "lora_a").astype(self.dtype)
            b: jax.Array = self.get_variable("params", "lora_b").astype(self.dtype)
            h = nn.Dropout(self.adapter.dropout, deterministic=False)(x)
            # A behind a barrier, transposed: its gradient is then (rank, inputs), which CPUs sum three times as fast.
            a = jax.lax.optimization_barrier(a.reshape(matrix.shape[0], -1).T).T
            h = project(h, a) * self.adapter.scale
            y += project(h, b.reshape(-1, matrix.shape[1]))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y = add_parameter(y, bias.reshape((1,) * len(rest) + (-1,)))
        y = written_once(y).reshape(*rest, *self.features)
        self.sow("intermediates", "output", y)
        return y


def num_summed_axes(equation: str) -> int:
    """How many axes an equation such as "BTNH,NHD->BTD" sums over.

    Raises:
        ValueError: they are not the last axes of the input and the first of the kernel.
    """
    x, kernel, y = equation.replace("->", ",").split(",")
    summed = "".join(axis for axis in x if axis in kernel)
    rest, features = x.removesuffix(summed), kernel.removeprefix(summed)
    if not summed or (rest + summed, summed + features, rest + features) != (x, kernel, y):
        raise ValueError(f"{equation}: a product sums over the last axes of the input, the first of the kernel")
    return len(summed)


def project(x: jax.Array, matrix: jax.Array, dtype: str | jnp.dtype | None = None) -> jax.Array:
    """x W over the last axis of x.

    Args:
        x: (batch, length, inputs).
        matrix: (inputs, outputs).
        dtype: of the result, where it is not that of `x`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    is_summed_by_devices = num_parts("batch") * num_parts("length") > 1
    if x.dtype == jnp.bfloat16 and (dtype == jnp.float32 or is_summed_by_devices):
        multiply = functools.partial(bfloat16_product, dtype)
    else:
        multiply = functools.partial(jnp.dot, preferred_element_type=dtype)
    if num_parts("length") > 1:
        return multiply(x, matrix)  # merged with the batch, a split axis would be gathered
    # Two axes only. With three, the gradient of the kernel sums over two of them at once, which CPUs do slowly.
    rows = multiply(x.reshape(-1, matrix.shape[0]), matrix)
    return rows.reshape(*x.shape[:-1], matrix.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bfloat16_product(dtype: jnp.dtype, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x W over the last axis of x, of bfloat16 factors, in the given dtype.

    Products of the backward pass have bfloat16 factors as well: by default they would be float32 where the result is,
    and GPUs multiply these at half the speed. And the gradient of W is summed in float32, by all devices that have rows
    of x, and rounded then: by default each device would round its part first.
    """
    return jnp.dot(x, matrix, preferred_element_type=dtype)


def _forward(dtype: jnp.dtype, x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return bfloat16_product(dtype, x, matrix), (x, matrix)


def _backward(
    dtype: jnp.dtype, factors: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, matrix = factors
    rounded = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    matrix_gradient = jnp.tensordot(x, rounded, (rows, rows), preferred_element_type=jnp.float32)
    # Not `matrix.T`, which devices that each have a part of it would gather once more.
    return jnp.tensordot(rounded, matrix, (-1, 1)), matrix_gradient.astype(matrix.dtype)


bfloat16_product.defvjp(_forward, _backward)
