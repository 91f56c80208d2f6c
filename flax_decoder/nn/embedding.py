"""Rows of a table by their number, with a gradient that is summed in float32 whatever the dtype of the model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_decoder.nn.axes import num_parts
from flax_decoder.nn.kernels.platform import target_platform
from flax_decoder.nn.precision import accumulation_dtype

# Up to this many rows, as of bytes and characters, their gradient is a product. It takes 2 V D operations per token.
SMALL_TABLE = 512


@jax.custom_jvp
def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """The rows of a table; NaN for an id outside of it, where JAX would by default return another row."""
    return jnp.asarray(table_VD).at[ids_BT].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


@look_up.defjvp
def _derivative(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The same rows of a change of the table. JAX transposes it to the gradient, so it decides how that is summed."""
    (table_VD, ids_BT), (change_VD, _) = primals, tangents
    change_VD = jnp.asarray(change_VD).astype(accumulation_dtype(change_VD.dtype))
    rows_BTD = lookup_by_backend(table_VD.shape[0])(change_VD, ids_BT)
    return look_up(table_VD, ids_BT), rows_BTD.astype(table_VD.dtype)


def lookup_by_backend(num_rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The lookup whose gradient is fastest where the program will run."""
    # A CPU adds one row after the other. On GPUs many threads would add to a row that is frequent, and wait for each
    # other; some versions of jaxlib do that up to 2000 times slower still (jax issue 38806).
    if target_platform() == "cpu":
        return look_up_plain
    if num_rows <= SMALL_TABLE:
        return look_up_by_product
    # To sort the tokens of all devices would send them all to each.
    return look_up_plain if num_parts("copies") * num_parts("embed") * num_parts("length") > 1 else look_up_sorted


def look_up_plain(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Its gradient adds one token's after the other to their rows."""
    return look_up.fun(table_VD, ids_BT)


def look_up_by_product(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Its gradient is a product too, (V, B T) by (B T, D)."""
    is_row_BTV = jax.nn.one_hot(ids_BT, table_VD.shape[0], dtype=table_VD.dtype)
    # By default GPUs and TPUs round the factors of float32 products.
    return jnp.dot(is_row_BTV, table_VD, precision=jax.lax.Precision.HIGHEST)


def look_up_sorted(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Its gradient adds tokens in the order of their ids, so that those of one row are beside each other."""
    ids_R = jnp.asarray(ids_BT).reshape(-1)
    order_R = jnp.argsort(ids_R)
    sorted_RD = table_VD.at[ids_R[order_R]].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, indices_are_sorted=True
    )
    # Each row back to its place, as a sum that is transposed to a lookup.
    rows_RD = jnp.zeros_like(sorted_RD).at[order_R].add(sorted_RD, unique_indices=True, mode="promise_in_bounds")
    return rows_RD.reshape(*ids_BT.shape, -1)
