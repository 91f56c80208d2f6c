"""Ready edits for `capture`: what would the model say if this were otherwise?

Each is a function `(array, layer) -> array` that changes one layer and leaves the others as they are. Layer, head and
arrays are its arguments, so that a model that goes through all heads is compiled once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from flax_decoder.nn.call import Edit


def zero_head(layer: ArrayLike, head: ArrayLike) -> Edit:
    """An edit of "heads": what one head has gathered counts for nothing."""
    return Partial(_zero_head, jnp.asarray(layer), jnp.asarray(head))


def _zero_head(its_layer: jax.Array, head: jax.Array, heads_BTNH: jax.Array, layer: jax.Array) -> jax.Array:
    zeroed_BTNH = heads_BTNH.at[:, :, head].set(0)
    return jnp.where(layer == its_layer, zeroed_BTNH, heads_BTNH)


def replace_weights(layer: ArrayLike, head: ArrayLike, weights_TS: ArrayLike) -> Edit:
    """An edit of "weights": one head looks where it is told, at any position; rows should be 0 or more and sum to 1.

    Args:
        layer: of the head.
        head: its number, from 0 to N - 1.
        weights_TS: the new pattern, the same for all rows of a batch, or weights_BTS.
    """
    return Partial(_replace_weights, jnp.asarray(layer), jnp.asarray(head), jnp.asarray(weights_TS))


def _replace_weights(
    its_layer: jax.Array, head: jax.Array, new: jax.Array, weights_BNTS: jax.Array, layer: jax.Array
) -> jax.Array:
    replaced_BNTS = weights_BNTS.at[:, head].set(new.astype(weights_BNTS.dtype))
    return jnp.where(layer == its_layer, replaced_BNTS, weights_BNTS)


def patch(layer: ArrayLike, array: ArrayLike, at: Any = ...) -> Edit:
    """An edit of any name: one layer has what another text gave, `seen[name][layer]`, at some places or at all.

    For example the residual stream after layer 3 at position 5 of another prompt of the same length:
    `edits={"residual": patch(3, seen["residual"][3], at=np.s_[:, 5])}`.

    Args:
        layer: where to put it.
        array: what to put there, with the axes of that name without L.
        at: which part of it, an index as NumPy takes it.
    """
    array = jnp.asarray(array)
    return Partial(_patch, jnp.asarray(layer), array, jnp.zeros(array.shape, bool).at[at].set(True))


def _patch(its_layer: jax.Array, new: jax.Array, is_new: jax.Array, array: jax.Array, layer: jax.Array) -> jax.Array:
    return jnp.where((layer == its_layer) & is_new, new.astype(array.dtype), array)
