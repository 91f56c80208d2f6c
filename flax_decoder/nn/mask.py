"""Which keys a query may see, and what their distance takes from a score: stated once, for all implementations."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec


class MaskSpec(struct.PyTreeNode):
    """The mask of causal attention, by the positions of queries and keys.

    A query sees the keys at its own position and before it, at most `window` of them, in its own document only.

    Attributes:
        positions_BT: positions of the queries; B may be 1.
        key_positions_BS: positions of the keys; negative for a slot of a cache that is empty.
        slopes_N: by how much each head's scores fall per position of distance (ALiBi); not learned.
        window: how many positions a query sees, its own included; None is all up to its own.
        segments_BT: the document of each query, integers that no two documents of a row share; None is one document.
        key_segments_BS: the document of each key.
    """

    positions_BT: jax.Array
    key_positions_BS: jax.Array
    slopes_N: jax.Array | None = None
    window: int | None = struct.field(pytree_node=False, default=None)
    segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None

    def visible_BTS(self) -> jax.Array:
        """True where a query sees a key."""
        distance_BTS = self._distance_BTS()
        visible_BTS = (distance_BTS >= 0) & (self.key_positions_BS >= 0)[:, None]
        if self.window is not None:
            visible_BTS &= distance_BTS < self.window
        if self.segments_BT is not None and self.key_segments_BS is not None:
            visible_BTS &= self.segments_BT[:, :, None] == self.key_segments_BS[:, None]
        return visible_BTS

    def masked(self, scores_BKGTS: jax.Array) -> jax.Array:
        """The scores, less what distance takes from them, and minus infinity where a query does not see a key."""
        if self.slopes_N is not None:
            bias_BNTS = -self.slopes_N[None, :, None, None] * self._distance_BTS()[:, None].astype(jnp.float32)
            scores_BKGTS += bias_BNTS.reshape(-1, *scores_BKGTS.shape[1:]).astype(scores_BKGTS.dtype)
        return jnp.where(self.visible_BTS()[:, None, None], scores_BKGTS, -jnp.inf)

    def any_visible(self) -> jax.Array:
        """False only if no query sees any key, by the ends of their positions and documents.

        Of one document it is exact, if neither these positions nor those have gaps.
        """
        any_visible = self.positions_BT.max() >= self.key_positions_BS.min()
        if self.window is not None:
            any_visible &= self.positions_BT.min() - self.key_positions_BS.max() < self.window
        if self.segments_BT is not None and self.key_segments_BS is not None:
            any_visible &= self.segments_BT.max() >= self.key_segments_BS.min()
            any_visible &= self.segments_BT.min() <= self.key_segments_BS.max()
        return any_visible

    def block(self, queries: slice, keys: slice) -> "MaskSpec":
        """The mask of some of the queries and some of the keys."""
        return self.replace(
            positions_BT=self.positions_BT[:, queries],
            key_positions_BS=self.key_positions_BS[:, keys],
            segments_BT=None if self.segments_BT is None else self.segments_BT[:, queries],
            key_segments_BS=None if self.key_segments_BS is None else self.key_segments_BS[:, keys],
        )

    def partition_specs(self, rows: Any, length: Any = None, heads: Any = None) -> "MaskSpec":
        """How each array is split, for `jax.shard_map`, by the mesh axes of rows, length and heads.

        Arrays with one row for all are not split by rows.
        """

        def spec(array: jax.Array) -> PartitionSpec:
            return (
                PartitionSpec(heads) if array.ndim == 1 else PartitionSpec(rows if array.shape[0] > 1 else None, length)
            )

        specs: MaskSpec = jax.tree.map(spec, self)
        return specs

    def _distance_BTS(self) -> jax.Array:
        """How many positions a query is behind a key."""
        return self.positions_BT[:, :, None] - self.key_positions_BS[:, None]


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """starts_BT: where in its row the document of each token begins, for rows in order.

    Neighbours of one id are of one document; an id that comes back after another one is another document. So the
    starts, too, say which tokens are of one document, and no two documents of a row share one.
    """
    index_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    is_first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(is_first_BT, index_1T, 0), axis=1)
