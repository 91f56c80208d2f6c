"""The dtypes that numbers are computed in."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.nn.traffic import copies, saves_traffic


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, angles, scores and logits for activations in `dtype`: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


@jax.custom_jvp
def add_parameter(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """The sum, in the dtype of x. The gradient of the parameter sums over the axes that x has more, in float32."""
    return x + parameter.astype(x.dtype)


@add_parameter.defjvp
def _change_of_sum(arguments: tuple[jax.Array, jax.Array], changes: tuple[jax.Array, jax.Array]) -> Any:
    x, parameter = arguments
    dtype = accumulation_dtype(x.dtype)
    x_change, parameter_change = (change.astype(dtype) for change in changes)
    if saves_traffic() and parameter.shape == (1, *x.shape[1:]):  # positions, whose gradient is summed over rows
        parameter_change = copies(parameter_change[0], x.shape[0])
    return add_parameter(x, parameter), (x_change + parameter_change).astype(x.dtype)


def in_float32(compute: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of numbers by themselves, computed in at least float32, with a result in the dtype of its arguments.

    The arguments are arrays of one dtype and shape.
    """

    @functools.wraps(compute)
    def widened_compute(*xs: jax.Array) -> jax.Array:
        dtype, narrow = accumulation_dtype(xs[0].dtype), xs[0].dtype
        if narrow == dtype:
            return compute(*xs)
        # What it computes on the way is not kept for the backward pass: it would be twice as large as an argument.
        return jax.checkpoint(lambda *xs: compute(*(x.astype(dtype) for x in xs)).astype(narrow))(*xs)

    return widened_compute


def in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module whose products, and those of its gradient, have the `matmul_precision` of its config."""

    @functools.wraps(method)
    def precise(self: Any, *arguments: Any, **options: Any) -> Any:
        # What is no config is refused inside of the method.
        highest = getattr(self.config, "matmul_precision", "default") == "highest"
        with jax.default_matmul_precision("highest") if highest else contextlib.nullcontext():
            return method(self, *arguments, **options)

    return precise


def rounding_of_products(config: ModelConfig, platform: str) -> str | None:
    """A line that says to what the factors of float32 products are rounded on these devices; None if they are not."""
    rounded = {"gpu": "TF32 (10 bits)", "cuda": "TF32 (10 bits)", "tpu": "bfloat16 (7 bits)"}.get(platform)
    if rounded is None or config.dtype != "float32" or config.matmul_precision == "highest":
        return None
    return f"factors of float32 products are rounded to {rounded}; --model.matmul-precision highest keeps all 23 bits"


def widened_to(parameter: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A parameter as it is, or in `dtype` where that is wider: never rounded, so neither is its gradient."""
    return parameter.astype(dtype) if jnp.dtype(dtype).itemsize > parameter.dtype.itemsize else parameter


def widened(params: Any) -> Any:
    """Params of which those in bfloat16 and float16 are in float32, exactly the same numbers; a tree like `params`."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf, params
    )


def check_float64(dtype: str) -> None:
    """Raises UserError for float64 if JAX would compute in float32 instead, its default."""
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError('model.dtype = "float64" needs JAX_ENABLE_X64=1: without it JAX computes in float32')
