"""Keys and values already computed, and where the next ones go.

In generation the keys and values of earlier tokens do not change; keeping them makes a new token cost one position
instead of all. A cache is a value: `logits, cache = model.apply(variables, tokens, cache=cache)`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from flax_decoder.config import ModelConfig

LayerKV = tuple[jax.Array, jax.Array]
"""The part of one layer: k_BSKH and v_BSKH."""


class KVCache(struct.PyTreeNode):
    """Slot s of each row holds the key and value of position s.

    Attributes:
        k_LBSKH: keys of every layer, turned already where positions are rotary.
        v_LBSKH: values of every layer.
        length_B: how many tokens each row holds. Lowering it forgets the last ones; what is left in their slots is
            never read, and is written over.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """S, the most tokens a row can hold."""
        return self.k_LBSKH.shape[2]


def empty_cache(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
    """A cache that holds nothing yet; it takes 2 · L · B · S · K · H numbers.

    Args:
        config: the model.
        batch_size: B.
        capacity: S, the most tokens a row will hold.

    Raises:
        ValueError: learned positions end before `capacity`.
    """
    if config.positions == "learned" and capacity > config.context_length:
        raise ValueError(
            f"a cache of {capacity} tokens goes beyond context_length = {config.context_length}, "
            "where learned positions end"
        )
    shape_LBSKH = (config.num_layers, batch_size, capacity, config.kv_heads, config.head_width)
    zeros_LBSKH = jnp.zeros(shape_LBSKH, config.dtype)
    return KVCache(zeros_LBSKH, zeros_LBSKH, jnp.zeros(batch_size, jnp.int32))


def write(cached_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Puts each row's new keys or values into the slots of their positions, which follow each other."""

    def place(row_SKH: jax.Array, new_TKH: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_SKH, new_TKH, (start, 0, 0))

    return jax.vmap(place)(cached_BSKH, new_BTKH, positions_BT[:, 0])
