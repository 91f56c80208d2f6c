"""What the axes of arrays mean, so that they can be split over devices.

The names are logical: "batch", "length", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers". What
splits which of them is not the network's business; where nothing is split, nothing here has an effect.
"""

import math
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

# The axes of each projection: those it sums over, those it writes to. A kernel has both, a bias the second.
PROJECTIONS = {
    "query": (("embed",), ("heads", "head_dim")),
    "key": (("embed",), ("kv_heads", "head_dim")),
    "value": (("embed",), ("kv_heads", "head_dim")),
    "out": (("heads", "head_dim"), ("embed",)),
    "up": (("embed",), ("mlp",)),
    "gate": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
}
TABLES = {"embedding": ("vocab", "embed"), "head": ("embed", "vocab"), "positions": (None, "embed")}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """The same array, lying on the devices as the logical names of its axes say.

    Args:
        x: any array.
        axes: a name for each axis; None is an axis that no one splits. One that the devices do not divide, such as a
            batch of one row, stays whole too.
    """
    divided = (axis if axis and mesh_axes(axis, size) else None for axis, size in zip(axes, x.shape, strict=True))
    return nn.with_logical_constraint(x, tuple(divided))


def num_parts(axis: str) -> int:
    """Over how many devices an axis is split where the code is being compiled for a mesh; else 1."""
    return _count(mesh_axes(axis))


def mesh_axes(axis: str, *sizes: int) -> tuple[str, ...]:
    """The axes of the mesh over which a logical axis is split; none where one of the sizes is no multiple of them."""
    (entry,) = nn.logical_to_mesh_axes((axis,)) or (None,)
    there = jax.sharding.get_abstract_mesh().axis_names
    names = tuple(name for name in ([entry] if isinstance(entry, str) else entry or ()) if name in there)
    return names if all(size % _count(names) == 0 for size in sizes) else ()


def _count(names: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def logical_axes(params: Any) -> Any:
    """The logical axes of each parameter, as a PartitionSpec of names; a tree like `params`.

    A tree that has such trees as its branches will do as well, such as the state of an optimizer, whose moments are
    named as their parameters are. None stands for an axis that is never split.
    """
    return jax.tree.map_with_path(_axes_of, params)


def _axes_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
    axes: tuple[str | None, ...] = ()
    if names and names[-1] in TABLES:
        axes = TABLES[names[-1]]
    elif len(names) > 1 and names[-2] in PROJECTIONS:
        inputs, outputs = PROJECTIONS[names[-2]]
        # A vector costs next to nothing on each device, and to gather it costs a message.
        axes = (*inputs, *outputs) if names[-1] == "kernel" else (None,) * len(outputs)
    stacked = ("layers",) if "layers" in names and leaf.ndim > len(axes) else ()
    return PartitionSpec(*stacked, *axes)
