"""Logical names of the axes of arrays, by which they can be split over devices.

"batch", "length", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers". `parallel/mesh.py` maps them to
axes of a mesh; without a mesh nothing here has an effect.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from flax_decoder.errors import UserError

# The axes of each projection: those it sums over, and those of its output. A kernel has both, a bias the second.
PROJECTIONS = {
    "query": (("embed",), ("heads", "head_dim")),
    "key": (("embed",), ("kv_heads", "head_dim")),
    "value": (("embed",), ("kv_heads", "head_dim")),
    "out": (("heads", "head_dim"), ("embed",)),
    "up": (("embed",), ("mlp",)),
    "gate": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
}
TABLES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "head_bias": ("vocab",),
    "positions": (None, "embed"),
}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an array by the logical names of its axes.

    Args:
        x: any array.
        axes: a name per axis; None is an axis that is never split. An axis that the devices do not divide, such as a
            batch of one row, is not split either.
    """
    divided = (axis if axis and mesh_axes(axis, size) else None for axis, size in zip(axes, x.shape, strict=True))
    return nn.with_logical_constraint(x, tuple(divided))


def num_parts(axis: str) -> int:
    """Over how many devices an axis is split in the program that is being compiled; 1 without a mesh."""
    return _count(mesh_axes(axis))


def may_be_split() -> bool:
    """Whether arrays may be split over devices in a way that is unknown here: there are several, and no mesh."""
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def mesh_axes(axis: str, *sizes: int) -> tuple[str, ...]:
    """The mesh axes over which a logical axis is split; none if one of the sizes is no multiple of their product."""
    (entry,) = nn.logical_to_mesh_axes((axis,)) or (None,)
    there = jax.sharding.get_abstract_mesh().axis_names
    names = tuple(name for name in ([entry] if isinstance(entry, str) else entry or ()) if name in there)
    return names if all(size % _count(names) == 0 for size in sizes) else ()


def in_each_copy(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays [B, ...], computed for each copy of the parameters with its own rows.

    Its results have a leading axis, of copies: what it sums over rows is not summed over the devices of other copies.
    """
    names = mesh_axes("copies")
    # Within it there is one copy, whose rows only its own devices share.
    rules = [(axis, _others(entry, names)) for axis, entry in nn.get_logical_axis_rules()]

    def compute_alone(*arrays: Any) -> Any:
        with nn.logical_axis_rules(rules):
            return compute(*arrays)

    def compute_all(*arrays: Any) -> Any:
        apart = jax.tree.map(lambda rows: rows.reshape(_count(names), -1, *rows.shape[1:]), arrays)
        results = jax.vmap(compute_alone, spmd_axis_name=names)(*apart)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, _first_over(names, leaf.ndim)), results)

    return compute_all


def _others(entry: str | Sequence[str] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in ([entry] if isinstance(entry, str) else entry or ()) if name not in names)


def _first_over(names: tuple[str, ...], num_axes: int) -> PartitionSpec:
    """The first axis is split over mesh axes; the compiler decides about the others."""
    return PartitionSpec(names, *[PartitionSpec.UNCONSTRAINED] * (num_axes - 1))


def _count(names: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def check_axis_types(arrays: Any, *, split_only: bool = False) -> None:
    """Raises UserError for a mesh with explicit axes, where each operation would have to say how its result is split.

    Args:
        arrays: a tree of what the model computes with.
        split_only: passes over arrays that each device has in full.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(arrays)]
    meshes = [one.mesh for one in shardings if not split_only or any(entry is not None for entry in one.spec)]
    if nn.get_logical_axis_rules():
        meshes.append(jax.sharding.get_abstract_mesh())
    for mesh in meshes:
        refuse_explicit_axes(mesh)


def refuse_explicit_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError for a mesh that `jax.make_mesh` has made without `axis_types`."""
    if AxisType.Explicit in mesh.axis_types:
        raise UserError(
            f"the mesh has explicit axes {mesh.axis_names}, but the compiler is to decide how arrays are split:\n"
            f"make it with axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )


def logical_axes(params: Any) -> Any:
    """The logical axes of each parameter, as a PartitionSpec of names; a tree like `params`.

    Works also for a tree with such trees as branches, such as the state of an optimizer, whose moments are named as
    their parameters. None is an axis that is never split.
    """
    return jax.tree.map_with_path(_axes_of, params)


def _axes_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
    axes: tuple[str | None, ...] = ()
    if names and names[-1] in TABLES:
        axes = TABLES[names[-1]]
    elif len(names) > 1 and names[-2] in PROJECTIONS:
        inputs, outputs = PROJECTIONS[names[-2]]
        # A vector takes little memory on each device, and gathering a split one costs a message.
        of_matrices = {"kernel": (*inputs, *outputs), "lora_a": (*inputs, None), "lora_b": (None, *outputs)}
        axes = of_matrices[names[-1]] if names[-1] in of_matrices else (None,) * len(outputs)
    stacked = ("layers",) if "layers" in names and leaf.ndim > len(axes) else ()
    return PartitionSpec(*stacked, *axes)
