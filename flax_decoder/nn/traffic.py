"""How often a training step on a GPU reads and writes its memory, which decides the speed of all but matrix products.

The compiler decides what is computed together, in one pass over memory. Here are the places where it is told more,
because it decides badly in a training step; `benchmarks/memory_traffic.py` counts the bytes of compiled programs.
Numbers stay the same, up to rounding, and without a gradient, or on other devices, the programs stay the same as well.
"""

import jax
import jax.numpy as jnp

from flax_decoder.nn.axes import may_be_split, num_parts
from flax_decoder.nn.kernels.platform import target_platform


def saves_traffic() -> bool:
    """Whether the program that is being traced should save passes over memory: it is for GPUs."""
    return target_platform() == "gpu"


def written_once(x: jax.Array) -> jax.Array:
    """The same array. In training on a GPU it is written to memory once, in its own dtype, and so is its gradient.

    The gradient of a projection has three readers: two products and the sum for the bias. The compiler would write it
    in float32 for the sum, too. And it would add the residual stream in the product before, which overwrites one of its
    arguments, so it would copy the stream, which the backward pass needs.
    """
    return _written_once(x) if saves_traffic() else x


@jax.custom_jvp
def _written_once(x: jax.Array) -> jax.Array:
    return x


@_written_once.defjvp
def _change_written_once(x: tuple[jax.Array], change: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jax.lax.optimization_barrier(x[0]), jax.lax.optimization_barrier(change[0])


def copies(x: jax.Array, num_copies: int) -> jax.Array:
    """Copies of an array along a new first axis, whose gradient adds slices instead of summing over the axis.

    For a sum over the rows of a batch, the compiler for GPUs would let these vary fastest in memory, in the residual
    stream of all layers, and transpose it for each product.
    """
    if may_be_split() or not isinstance(num_copies, int):
        return jnp.broadcast_to(x[None], (num_copies, *x.shape))
    X = num_parts("batch") if num_copies % num_parts("batch") == 0 else 1  # each device adds the slices that it has
    per_device = jnp.broadcast_to(x[None], (X, *x.shape))
    return jnp.stack([per_device] * (num_copies // X), axis=1).reshape(num_copies, *x.shape)


Moments = tuple[jax.Array, jax.Array, jax.Array]
"""Count and mean of some numbers, and the sum of their squared distances from the mean."""


def mean_and_variance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the last axis, which has length 1 in the results: x is read once."""
    zero = jnp.zeros((), x.dtype)
    numbers = jnp.ones_like(x), x, jnp.zeros_like(x)
    count, mean, squares = jax.lax.reduce(numbers, (zero, zero, zero), _moments_of_both, (x.ndim - 1,))
    return mean[..., None], (squares / count)[..., None]


def _moments_of_both(one: Moments, other: Moments) -> Moments:
    """Chan et al. 1979: as exact as two passes, and unlike the mean of squares less the square of the mean."""
    (count_a, mean_a, squares_a), (count_b, mean_b, squares_b) = one, other
    distance, part = mean_b - mean_a, count_b / jnp.maximum(count_a + count_b, 1)
    squares = squares_a + squares_b + jnp.square(distance) * count_a * part
    return count_a + count_b, mean_a + distance * part, squares


@jax.custom_jvp
def log_sum_exp(x: jax.Array) -> jax.Array:
    """log sum exp(x) over the last axis: x is read once, with a sum relative to the maximum so far.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """

    def both(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (max_a, sum_a), (max_b, sum_b) = one, other
        shrinks = jnp.exp(-jnp.abs(max_a - max_b))  # the sum that belongs to the smaller maximum
        is_first = max_a >= max_b
        return jnp.where(is_first, max_a, max_b), jnp.where(is_first, sum_a + shrinks * sum_b, shrinks * sum_a + sum_b)

    nothing = jnp.array(jnp.finfo(x.dtype).min, x.dtype), jnp.zeros((), x.dtype)
    largest, total = jax.lax.reduce((x, jnp.ones_like(x)), nothing, both, (x.ndim - 1,))
    return largest + jnp.log(total)


@log_sum_exp.defjvp
def _change_of_log_sum_exp(x: tuple[jax.Array], change: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    log_z = log_sum_exp(*x)
    return log_z, jnp.sum(jnp.exp(x[0] - log_z[..., None]) * change[0], axis=-1)
