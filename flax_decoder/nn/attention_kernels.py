"""Faster ways to the numbers of `attention.dot_product_attention`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Measured on CPU: smaller blocks spend their time on starting matrix products, larger ones on masked scores.
BLOCK_TOKENS = 64


def blockwise(
    attend: Callable[..., tuple[jax.Array, ...]],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """Attention of a whole sequence, one block of queries at a time.

    A block of queries meets only the keys up to its own end: half of all scores lie in the future of their query and
    need not be computed.

    Args:
        attend: attention of some queries to some keys, such as `dot_product_attention`.
        q_BTNH: queries; T = S.
        k_BSKH: keys.
        v_BSKH: values.
        mask_BTS: True where a query may look, never at a later key; B may be 1.
        bias_BNTS: added to the scores; B may be 1.

    Returns:
        heads_BTNH.
    """
    blocks = []
    for start in range(0, q_BTNH.shape[1], BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, q_BTNH.shape[1])
        bias = None if bias_BNTS is None else bias_BNTS[:, :, start:stop, :stop]
        mask = mask_BTS[:, start:stop, :stop]
        blocks.append(attend(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask, bias)[0])
    return jnp.concatenate(blocks, axis=1)
