"""A long sequence in blocks: which queries meet which keys, so that only some of their scores exist at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Most queries, and most keys, of a block: enough to keep matrix units busy, and 1 MiB of scores a head.
BLOCK_TOKENS = 512
# Where padding stands: its queries before all keys, its keys after all queries, so that it neither sees nor is seen.
BEFORE_ALL, AFTER_ALL = -1, 2**30

# The arrays of one block of queries or keys, or of all blocks, with a leading axis P; positions come first.
Blocks = tuple[jax.Array, ...]


def meet(
    update: Callable[[Blocks, Blocks, Blocks, Blocks], tuple[Blocks, Blocks]],
    queries: Blocks,
    window: jax.Array,
    keys: Blocks,
    of_queries: Blocks,
    of_keys: Blocks,
) -> tuple[Blocks, Blocks]:
    """Brings each block of queries together with each block of keys where one may see the other.

    Args:
        update: from a block of queries, a block of keys, and what belongs to either, to the new of what belongs.
        queries: their blocks; the first array are positions.
        window: how many positions a query sees.
        keys: as `queries`.
        of_queries: what belongs to the blocks of queries.
        of_keys: what belongs to the blocks of keys.

    Returns:
        The new `of_queries` and `of_keys`.
    """

    def with_key(of_queries: Blocks, block: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
        key, of_key = block

        def with_query(of_key: Blocks, block: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
            query, of_query = block
            sees = may_see(query[0], key[0], window)
            of_query, of_key = jax.lax.cond(sees, update, lambda *blocks: blocks[2:], query, key, of_query, of_key)
            return of_key, of_query

        of_key, of_queries = jax.lax.scan(with_query, of_key, (queries, of_queries))
        return of_queries, of_key

    return jax.lax.scan(with_key, of_queries, (keys, of_keys))


def may_see(positions_BT: jax.Array, key_positions_BS: jax.Array, window: jax.Array | int) -> jax.Array:
    """Whether a query of a block may see a key of another: certain where the positions of each have no gaps."""
    any_before = positions_BT.max() >= key_positions_BS.min()
    return any_before & (positions_BT.min() - key_positions_BS.max() < window)


def cut(
    positions_BT: jax.Array, queries: list[jax.Array], keys: list[jax.Array], block_tokens: int
) -> tuple[Blocks, Blocks]:
    """Arrays of queries (B, T, N, ...) and of keys (B, S, K, H) in blocks, after the blocks of their positions.

    Args:
        positions_BT: where queries and keys stand.
        queries: what each query has.
        keys: what each key has.
        block_tokens: most queries, and most keys, of a block.

    Returns:
        The blocks of queries, (P, B, K, G, T, ...), and of keys, (P, B, K, S, H), P the number of blocks.
    """
    K = keys[0].shape[2]

    def heads_first(array: jax.Array) -> jax.Array:
        blocks = _to_blocks(array, block_tokens)
        P, B, size, num_heads, *rest = blocks.shape
        return jnp.moveaxis(blocks.reshape(P, B, size, K, num_heads // K, *rest), 2, 4)

    query_blocks = (heads_first(array) for array in queries)
    key_blocks = (heads_first(array)[:, :, :, 0] for array in keys)
    query_positions = _to_blocks(positions_BT, block_tokens, BEFORE_ALL)
    return (query_positions, *query_blocks), (_to_blocks(positions_BT, block_tokens, AFTER_ALL), *key_blocks)


def _to_blocks(array: jax.Array, block_tokens: int, padding: int = 0) -> jax.Array:
    """(B, T, ...) as (P, B, at most block_tokens, ...); P is even, so that the halves of the array share no block."""
    B, length, *rest = array.shape
    num_blocks = 2 * -(-length // (2 * block_tokens))
    size = -(-length // num_blocks)
    widths = [(0, 0), (0, num_blocks * size - length)] + [(0, 0)] * len(rest)
    array = jnp.pad(array, widths, constant_values=padding)
    return jnp.moveaxis(array.reshape(B, num_blocks, size, *rest), 1, 0)


def whole(array: jax.Array, length: int) -> jax.Array:
    """Blocks (P, B, K, G, T, ...) as one array (B, length, N, ...) again."""
    array = jnp.moveaxis(array, (0, 4), (1, 2))
    B, P, size, K, G, *rest = array.shape
    return array.reshape(B, P * size, K * G, *rest)[:, :length]


def count_blocks(positions_T: np.ndarray, ring_size: int, window: int, block_tokens: int = BLOCK_TOKENS) -> np.ndarray:
    """The work of each device: how many pairs of a block of queries and a block of keys are computed.

    Args:
        positions_T: where the tokens stand, in the order in which they lie on the devices.
        ring_size: C, number of devices.
        window: how many positions a query sees, its own included.
        block_tokens: most queries, and most keys, of a block.

    Returns:
        (C, C): row i is the device, column j the turn; it then has the keys of device i - j.
    """
    parts = jnp.asarray(positions_T.reshape(ring_size, 1, -1))
    queries = [np.asarray(_to_blocks(part, block_tokens, BEFORE_ALL)) for part in parts]
    keys = [np.asarray(_to_blocks(part, block_tokens, AFTER_ALL)) for part in parts]

    def count(i: int, j: int) -> int:
        return sum(bool(may_see(query, key, window)) for query in queries[i] for key in keys[j])

    return np.array([[count(i, (i - j) % ring_size) for j in range(ring_size)] for i in range(ring_size)])
