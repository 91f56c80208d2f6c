"""Ready-made edits for `capture`.

Each is a function `(array, layer) -> array` that changes one layer. Layer, head and arrays are arguments of the
compiled program, so trying all heads compiles it once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from flax_decoder.nn.call import Edit


def zero_head(layer: ArrayLike, head: ArrayLike) -> Edit:
    """An edit of "heads": sets the output of one head to zero."""
    return Partial(_zero_head, jnp.asarray(layer), jnp.asarray(head))


def _zero_head(target: jax.Array, head: jax.Array, heads_BTNH: jax.Array, layer: jax.Array) -> jax.Array:
    return jnp.where(layer == target, heads_BTNH.at[:, :, head].set(0), heads_BTNH)


def replace_weights(layer: ArrayLike, head: ArrayLike, weights_TS: ArrayLike) -> Edit:
    """An edit of "weights": replaces the attention weights of one head.

    Args:
        layer: of the head.
        head: its number, from 0 to N - 1.
        weights_TS: the new weights for all rows of a batch, or weights_BTS. Each query's should be non-negative and
            sum to 1.
    """
    return Partial(_replace_weights, jnp.asarray(layer), jnp.asarray(head), jnp.asarray(weights_TS))


def _replace_weights(
    target: jax.Array, head: jax.Array, new: jax.Array, weights_BNTS: jax.Array, layer: jax.Array
) -> jax.Array:
    return jnp.where(layer == target, weights_BNTS.at[:, head].set(new.astype(weights_BNTS.dtype)), weights_BNTS)


def patch(layer: ArrayLike, array: ArrayLike, at: Any = ...) -> Edit:
    """An edit of any name: replaces the array of one layer, or a part of it (activation patching).

    For example the residual stream after layer 3 at position 5 of another prompt of the same length:
    `edits={"residual": patch(3, other["residual"][3], at=np.s_[:, 5])}`.

    Args:
        layer: the layer to change.
        array: the new array, with the axes of that name without L.
        at: which part of it to use, as a NumPy index.
    """
    array = jnp.asarray(array)
    return Partial(_patch, jnp.asarray(layer), array, jnp.zeros(array.shape, bool).at[at].set(True))


def _patch(target: jax.Array, new: jax.Array, is_new: jax.Array, array: jax.Array, layer: jax.Array) -> jax.Array:
    return jnp.where((layer == target) & is_new, new.astype(array.dtype), array)
