"""The formula, one block of queries after another: half of the scores are never computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_decoder.nn.mask import MaskSpec

# Measured on CPU: smaller blocks spend their time on starting matrix products, larger ones on masked scores.
QUERIES_PER_BLOCK = 64


def blockwise(
    formula: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: MaskSpec
) -> jax.Array:
    """`formula`, which is `dot_product_attention`, for whole sequences (T = S) whose tokens are in order.

    A block of queries meets the keys from the window of its first query to its own end only: later ones are in the
    future of all its queries.
    """
    blocks = []
    for start in range(0, q_BTNH.shape[1], QUERIES_PER_BLOCK):
        queries = slice(start, min(start + QUERIES_PER_BLOCK, q_BTNH.shape[1]))
        keys = slice(0 if mask.window is None else max(start - mask.window + 1, 0), queries.stop)
        blocks.append(formula(q_BTNH[:, queries], k_BSKH[:, keys], v_BSKH[:, keys], mask.block(queries, keys)))
    return jnp.concatenate(blocks, axis=1)
