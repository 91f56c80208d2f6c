"""Which devices hold the parts of a sequence, and how arrays travel from one to the next."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from flax_decoder.nn.axes import mesh_axes


@dataclasses.dataclass(frozen=True)
class Ring:
    """How the arrays of attention lie on the devices, and which of these are neighbours.

    Attributes:
        mesh: all devices; there is a ring for each place on the mesh axes that do not belong to it.
        rows: the mesh axes over which the batch is spread.
        axes: those over which the length is spread: the ring.
        heads: those over which the heads are spread, of queries and of keys.
    """

    mesh: AbstractMesh
    rows: tuple[str, ...]
    axes: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def size(self) -> int:
        """C, number of devices in a ring."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def spec(self) -> PartitionSpec:
        """Where arrays (batch, length, heads, ...) lie."""
        return PartitionSpec(self.rows, self.axes, self.heads)

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function, run by each device on its parts of the arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def send_to_next(self, arrays: Any) -> Any:
        """Sends arrays to the next device in the ring, and returns those of the one before."""
        to_next = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda array: jax.lax.ppermute(array, self.axes, to_next), arrays)

    def scan(self, visit: Callable[[Any, Any], Any], state: Any, kv_blocks: Any) -> Any:
        """Applies `state = visit(state, kv_blocks)` to the keys and values of each device, its own first."""

        def turn(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            state, kv_blocks = carry
            arriving = self.send_to_next(kv_blocks)  # does not depend on the visit: both happen at once
            return (visit(state, kv_blocks), arriving), None

        (state, kv_blocks), _ = jax.lax.scan(turn, (state, kv_blocks), length=self.size - 1)
        return visit(state, kv_blocks)


def find_ring(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Ring | None:
    """The ring for queries (B, T, N, H) and keys (B, S, K, H), by the ambient mesh and its rules for logical axes.

    Rows or heads that the devices do not divide are computed by all of them.

    Returns:
        None where "length" is not split; or where the devices do not divide it, as the single token that parameters
        are made with: attention as on one device gives the same numbers.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (B, T, N, _), K = q_shape, k_shape[2]
    rows, length, heads = mesh_axes("batch", B), mesh_axes("length", T), mesh_axes("heads", N, K)
    if heads != mesh_axes("kv_heads", N, K):
        heads = ()  # each head of keys must lie where its group of queries does
    ring = Ring(mesh, rows, length, heads)
    return None if ring.size == 1 or mesh.manual_axes else ring
