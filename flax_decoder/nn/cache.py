"""The key-value cache: keys and values of earlier tokens, kept so that a new token costs one position instead of all.

A cache is a value: `logits, cache = model.apply(variables, tokens, cache=cache)`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from flax_decoder.config import ModelConfig
from flax_decoder.errors import as_whole_number, require_type
from flax_decoder.nn.call import Call

LayerKV = tuple[jax.Array, jax.Array]
"""The part of one layer: k_BKSH and v_BKSH."""


class KVCache(struct.PyTreeNode):
    """Position p of a row is in slot p mod S of each layer, until position p + S takes its place.

    A layer with a window has no more slots than it sees, so S may differ between layers. A row may outgrow its slots: a
    layer then sees the last S positions, a window that rolls over the text.

    Attributes:
        layers: keys (after rotation) and values of each layer, both (B, K, S, H): matrix products read this order
            without a transposed copy.
        length_B: number of tokens in each row. Lowering it forgets the last ones.
        rollback_slots: slots that a layer has beyond those it sees: so many of the last tokens can be forgotten even
            where they have taken the place of others.
    """

    layers: tuple[LayerKV, ...]
    length_B: jax.Array
    rollback_slots: int = struct.field(pytree_node=False, default=0)


def empty_cache(config: ModelConfig, batch_size: int, capacity: int, rollback_slots: int = 0) -> KVCache:
    """An empty cache.

    A layer takes 2 · B · K · S · H numbers, S = min(window, capacity) + rollback_slots.

    Args:
        config: the model.
        batch_size: B.
        capacity: the most tokens that a position of a layer without a window sees.
        rollback_slots: how many tokens can be forgotten again, see `KVCache`.

    Raises:
        ValueError: learned positions end before `capacity`, or what is no size.
    """
    require_type("config", config, ModelConfig, "such as model.config")
    batch_size, capacity = as_whole_number("batch_size", batch_size, 1), as_whole_number("capacity", capacity, 1)
    rollback_slots = as_whole_number("rollback_slots", rollback_slots, 0)
    if config.positions == "learned" and capacity > config.context_length:
        raise ValueError(
            f"a cache of {capacity} tokens goes beyond context_length = {config.context_length}, "
            "where learned positions end"
        )

    def empty(window: int | None) -> LayerKV:
        num_slots = min(window or capacity, capacity) + rollback_slots
        shape_BKSH = (batch_size, config.kv_heads, num_slots, config.head_width)
        return jnp.zeros(shape_BKSH, config.dtype), jnp.zeros(shape_BKSH, config.dtype)

    return KVCache(tuple(map(empty, config.windows)), jnp.zeros(batch_size, jnp.int32), rollback_slots)


def write(cached_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array, end_B: jax.Array) -> jax.Array:
    """Puts new keys or values into the slots of their positions.

    Not written are those from `end_B` on, which are padding, and those that the last S would overwrite.
    """
    B, K, S, _ = cached_BKSH.shape
    is_kept_BT = (positions_BT < end_B[:, None]) & (positions_BT >= end_B[:, None] - S)
    slots_BT = jnp.where(is_kept_BT, positions_BT % S, S)
    # One index per head instead of a slice of all heads: XLA then writes in place and does not copy the whole cache.
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    return cached_BKSH.at[rows, heads, slots_BT[:, None]].set(new_BTKH.swapaxes(1, 2), mode="drop")


def positions_of_slots(num_slots: int, length_B: jax.Array) -> jax.Array:
    """positions_BS: the newest position in each slot of rows of that length; negative if it is empty."""
    slots_S = jnp.arange(num_slots, dtype=jnp.int32)
    newest_B1 = length_B[:, None] - 1
    return newest_B1 - (newest_B1 - slots_S[None]) % num_slots


def append_to_cache(
    cached: LayerKV, k_BTKH: jax.Array, v_BTKH: jax.Array, call: Call, window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array, int, LayerKV]:
    """All keys and values that the new queries may see, and the cache with the new ones in it.

    A single token may take its slot first: what it overwrites is out of its window. Of several, the first still sees
    what the last ones overwrite, so they see the cache as it was, and each other.

    Args:
        cached: k_BKSH and v_BKSH of the layer.
        k_BTKH: keys of the new tokens.
        v_BTKH: values of the new tokens.
        call: positions of the new tokens, and where padding begins.
        window: how many positions a query of the layer sees; None is all up to its own.

    Returns:
        k_BSKH, v_BSKH, key_positions_BS, the window that the slots allow, and the new cache of the layer.
    """
    positions_BT, num_slots = call.positions_BT, cached[0].shape[2]
    window = min(window or num_slots, num_slots - call.rollback_slots)
    end_B = positions_BT[:, -1] + 1 if call.end_B is None else call.end_B
    written = write(cached[0], k_BTKH, positions_BT, end_B), write(cached[1], v_BTKH, positions_BT, end_B)
    if k_BTKH.shape[1] == 1:
        k_BSKH, v_BSKH = (array_BKSH.swapaxes(1, 2) for array_BKSH in written)
        return k_BSKH, v_BSKH, positions_of_slots(num_slots, positions_BT[:, 0] + 1), window, written
    before = (array_BKSH.swapaxes(1, 2) for array_BKSH in cached)
    k_BSKH, v_BSKH = (jnp.concatenate(parts, axis=1) for parts in zip(before, (k_BTKH, v_BTKH), strict=True))
    earlier = positions_of_slots(num_slots, positions_BT[:, 0])
    return k_BSKH, v_BSKH, jnp.concatenate([earlier, positions_BT], axis=1), window, written
