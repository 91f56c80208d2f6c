"""Long sequences in pairs of a block of queries and a block of keys: only the scores of one pair exist at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.nn.mask import MaskSpec

# Most queries, and most keys, of a block: enough to keep matrix units busy, and 1 MiB of scores per head.
MAX_PAIR_TOKENS = 512
# Positions of padding: its queries are before all keys and its keys after all queries, so it neither sees nor is seen.
BEFORE_ALL, AFTER_ALL = -1, 2**30

# The arrays of one block of queries or keys, or of all blocks with a leading axis P. The first two are positions and
# documents, None if there are none.
Blocks = tuple[Any, ...]


def for_each_block_pair(
    update: Callable[[MaskSpec, Blocks, Blocks, Blocks, Blocks], tuple[Blocks, Blocks]],
    mask: MaskSpec,
    queries: Blocks,
    keys: Blocks,
    query_state: Blocks,
    key_state: Blocks,
) -> tuple[Blocks, Blocks]:
    """Updates the states of each block of queries and each block of keys where any query sees any key.

    Args:
        update: from the mask of a pair, its block of queries and of keys and their states to the new states.
        mask: slopes and window; the positions are those of the blocks.
        queries: blocks of queries, as `split_blocks` returns them.
        keys: blocks of keys, likewise.
        query_state: state per block of queries.
        key_state: state per block of keys.

    Returns:
        The new `query_state` and `key_state`.
    """

    def with_key(query_state: Blocks, block: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
        key, own_key_state = block

        def with_query(key_state: Blocks, block: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
            query, query_state = block
            (positions_BT, segments_BT, *_), (key_positions_BS, key_segments_BS, *_) = query, key
            pair = MaskSpec(positions_BT, key_positions_BS, mask.slopes_N, mask.window, segments_BT, key_segments_BS)

            def visit(states: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
                return update(pair, query, key, *states)

            query_state, key_state = jax.lax.cond(
                pair.any_visible(), visit, lambda states: states, (query_state, key_state)
            )
            return key_state, query_state

        own_key_state, query_state = jax.lax.scan(with_query, own_key_state, (queries, query_state))
        return query_state, own_key_state

    return jax.lax.scan(with_key, query_state, (keys, key_state))


def split_blocks(
    mask: MaskSpec, queries: list[jax.Array], keys: list[jax.Array], max_tokens: int
) -> tuple[Blocks, Blocks]:
    """Splits arrays of queries (B, T, N, ...) and of keys (B, S, K, H), their positions and documents, into blocks.

    Args:
        mask: for positions and documents.
        queries: arrays per query.
        keys: arrays per key.
        max_tokens: most queries, and most keys, of a block.

    Returns:
        The blocks of queries, (P, B, K, G, T, ...), and of keys, (P, B, K, S, H), P the number of blocks. Each tuple
        begins with positions and documents, (P, B, T) and (P, B, S).
    """
    K = keys[0].shape[2]

    def heads_first(array: jax.Array) -> jax.Array:
        blocks = _to_blocks(array, max_tokens)
        P, B, size, num_heads, *rest = blocks.shape
        return jnp.moveaxis(blocks.reshape(P, B, size, K, num_heads // K, *rest), 2, 4)

    query_blocks = (heads_first(array) for array in queries)
    key_blocks = (heads_first(array)[:, :, :, 0] for array in keys)
    query_positions = _to_blocks(mask.positions_BT, max_tokens, BEFORE_ALL)
    key_positions = _to_blocks(mask.key_positions_BS, max_tokens, AFTER_ALL)
    segments = mask.segments_BT, mask.key_segments_BS
    query_segments, key_segments = (None if array is None else _to_blocks(array, max_tokens) for array in segments)
    return (query_positions, query_segments, *query_blocks), (key_positions, key_segments, *key_blocks)


def _to_blocks(array: jax.Array, max_tokens: int, padding: int = 0) -> jax.Array:
    """(B, T, ...) as (P, B, at most max_tokens, ...); P is even, so that the halves of the array share no block."""
    B, length, *rest = array.shape
    num_blocks = 2 * -(-length // (2 * max_tokens))
    size = -(-length // num_blocks)
    widths = [(0, 0), (0, num_blocks * size - length)] + [(0, 0)] * len(rest)
    array = jnp.pad(array, widths, constant_values=padding)
    return jnp.moveaxis(array.reshape(B, num_blocks, size, *rest), 1, 0)


def merge_blocks(array: jax.Array, length: int) -> jax.Array:
    """Blocks (P, B, K, G, T, ...) as one array (B, length, N, ...) again."""
    array = jnp.moveaxis(array, (0, 4), (1, 2))
    B, P, size, K, G, *rest = array.shape
    return array.reshape(B, P * size, K * G, *rest)[:, :length]
