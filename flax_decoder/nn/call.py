"""What one call of a model gives to all of its layers, and the names by which values can be recorded and edited."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from flax_decoder.config import Adapter

Edit = Callable[[jax.Array, jax.Array], jax.Array]
"""From a value and the index of its layer (an int32 scalar, traced where layers are scanned) to a new value."""
Hook = Callable[[str, jax.Array], jax.Array]
"""From a name and a value to the value that is used from there on."""

EDITABLE = (
    *("embeddings", "q", "k", "v", "q_rotated", "k_rotated", "scores", "weights", "heads", "attention_write"),
    *("hidden", "feed_forward_write", "residual", "logits"),
)
"""What can be edited, in the order in which it is computed."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        positions_BT: positions of the tokens, counted from 0; B may be 1.
        segments_BT: documents of the tokens, which do not see each other, as in `MaskSpec`; None is one document. Not
            with a cache.
        end_B: with a cache, the position from which on the tokens of a row are padding; None means no padding.
        rollback_slots: with a cache, see `KVCache`.
        in_order: each row is a whole sequence, from position 0 on in order: what fused kernels compute.
        deterministic: False applies dropout.
        adapter: how low-rank adapters count, where layers have them; without dropout if deterministic.
        records: "intermediates" are asked for.
        edits: by name, what replaces a value.
        layer: index of the layer; only edits read it.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    end_B: jax.Array | None = None
    rollback_slots: int = 0
    in_order: bool = False
    deterministic: bool = True
    adapter: Adapter | None = None
    records: bool = False
    edits: Mapping[str, Edit] | None = None
    layer: ArrayLike | None = 0

    def lengths_BT(self) -> jax.Array:
        """How many positions the text of each token has so far, the new tokens included.

        Returns:
            (B, 1), or (B, T) where a row holds several documents; B may be 1.
        """
        positions_BT = self.positions_BT
        if self.end_B is not None:
            positions_BT = jnp.minimum(positions_BT, self.end_B[:, None] - 1)
        if self.segments_BT is None:
            return positions_BT.max(axis=1, keepdims=True) + 1

        def of_row(segments_T: jax.Array, positions_T: jax.Array) -> jax.Array:
            T = len(segments_T)
            _, documents_T = jnp.unique(segments_T, return_inverse=True, size=T)
            return jax.ops.segment_max(positions_T, documents_T, num_segments=T)[documents_T] + 1

        return jax.vmap(of_row)(*jnp.broadcast_arrays(self.segments_BT, positions_BT))

    def at_layer(self, layer: ArrayLike | None) -> "Call":
        """The same call, for the layer of this index."""
        return dataclasses.replace(self, layer=layer)

    def hook(self, module: nn.Module) -> Hook:
        """The function that edits a value, records it in the "intermediates" of a module, and returns it."""

        def record(name: str, value: jax.Array) -> jax.Array:
            value = self.edit(name, value)
            module.sow("intermediates", name, value)
            return value

        return record

    def edit(self, name: str, value: jax.Array) -> jax.Array:
        """The value, or what an edit of that name makes of it.

        Scores and weights (B, K, G, T, S) are edited as (B, N, T, S): heads that share a key are beside each other.

        Raises:
            ValueError: the edit returns another shape or dtype.
        """
        if self.edits is None or name not in self.edits:
            return value
        shape = value.shape
        if name in ("scores", "weights"):
            value = value.reshape(shape[0], -1, *shape[-2:])
        edited = self.edits[name](value, jnp.asarray(self.layer, jnp.int32))
        if edited.shape != value.shape or edited.dtype != value.dtype:
            raise ValueError(
                f"the edit of {name} must give {value.dtype}{list(value.shape)}, not {edited.dtype}{list(edited.shape)}"
            )
        return edited.reshape(shape)


def check_edits(names: Iterable[str], *, has_rotation: bool) -> None:
    """Raises ValueError for the name of an edit that the model does not compute."""
    for name in names:
        if name not in EDITABLE:
            raise ValueError(f"there is no {name!r} to edit, only {', '.join(EDITABLE)}")
        if name.endswith("_rotated") and not has_rotation:
            raise ValueError(f"edit {name.removesuffix('_rotated')} in place of {name}: positions are not rotary")
