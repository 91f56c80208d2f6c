"""Which keys a query may see, and what their distance takes from a score: stated once, for all implementations."""

import jax
import jax.numpy as jnp
from flax import struct


class MaskSpec(struct.PyTreeNode):
    """The mask of causal attention, by the positions of queries and keys.

    A query sees the keys at its own position and before it, at most `window` of them.

    Attributes:
        positions_BT: positions of the queries; B may be 1.
        key_positions_BS: positions of the keys; negative for a slot of a cache that is empty.
        slopes_N: by how much each head's scores fall per position of distance (ALiBi); not learned.
        window: how many positions a query sees, its own included; None is all up to its own.
    """

    positions_BT: jax.Array
    key_positions_BS: jax.Array
    slopes_N: jax.Array | None = None
    window: int | None = struct.field(pytree_node=False, default=None)

    def visible_BTS(self) -> jax.Array:
        """True where a query sees a key."""
        distance_BTS = self._distance_BTS()
        visible_BTS = (distance_BTS >= 0) & (self.key_positions_BS >= 0)[:, None]
        return visible_BTS if self.window is None else visible_BTS & (distance_BTS < self.window)

    def bias_BNTS(self) -> jax.Array | None:
        """What is added to the scores, float32; None where that is nothing."""
        if self.slopes_N is None:
            return None
        return -self.slopes_N[None, :, None, None] * self._distance_BTS()[:, None].astype(jnp.float32)

    def any_visible(self) -> jax.Array:
        """Whether any query sees any key; exact where the positions of queries, and those of keys, have no gaps."""
        not_all_later = self.positions_BT.max() >= self.key_positions_BS.min()
        if self.window is None:
            return not_all_later
        return not_all_later & (self.positions_BT.min() - self.key_positions_BS.max() < self.window)

    def block(self, queries: slice, keys: slice) -> "MaskSpec":
        """The mask of some of the queries and some of the keys."""
        return self.replace(positions_BT=self.positions_BT[:, queries], key_positions_BS=self.key_positions_BS[:, keys])

    def _distance_BTS(self) -> jax.Array:
        """How many positions a query is behind a key."""
        return self.positions_BT[:, :, None] - self.key_positions_BS[:, None]
