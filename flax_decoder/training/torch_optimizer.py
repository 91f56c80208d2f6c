"""The state of AdamW, from PyTorch to optax and back: training goes on where it stood.

Both keep the same numbers: the means of gradients and of their squares (exp_avg and exp_avg_sq there, mu and nu here),
laid out like the weights, and how many updates were made, which also places the learning rate on its schedule.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import UserError, as_one_line, require_type
from flax_decoder.huggingface.families import FAMILIES, NANOGPT
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.names import family_of_names
from flax_decoder.huggingface.torch_file import TorchTensor, plain_name, torch_module
from flax_decoder.huggingface.weights import Shape, export_tensors, flatten, read_params, tensor_specs
from flax_decoder.training.step import TrainState

_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}  # optax's names, PyTorch's names
_COUNTS = ("count", "num_updates")
_MAX_UPDATES = 2**31 - 1  # optax counts in int32


def adamw_from_torch(
    state: TrainState,
    optimizer: Mapping[str, Any],
    parameters: Mapping[str, Any],
    names: Family | Mapping[str, Any] | str,
    *,
    source: str = "the optimizer",
) -> TrainState:
    """The state with the moments and the number of updates of a `torch.optim.AdamW`.

    Rates, betas and weight decay are not taken over: they are settings of `state.tx`.

    Args:
        state: of our training, with AdamW as its optimizer; it is not changed.
        optimizer: `optimizer.state_dict()`.
        parameters: name -> parameter, in the order in which the optimizer's groups have them. For one group that is
            `dict(module.named_parameters())`.
        names: what their names mean: "nanogpt", or a model type of Hugging Face such as "llama"; or a map from their
            names, with {} for the layer, to the paths of our parameters.
        source: start of error messages.

    Returns:
        The state with other moments, counts and `step`.

    Raises:
        UserError: one of the optimizers is not AdamW; they have other parameters; or not all of theirs have the same
            number of updates.
    """
    family, order = _matched(state, optimizer, parameters, names, source)
    rows = {name: _checked_row(optimizer, index, name, source) for index, name in order.items()}
    counts = {row["step"] if row else 0 for row in rows.values()}
    if len(counts) > 1:
        raise UserError(f"{source}: some parameters have {min(counts)} updates, others {max(counts)}; all must agree")
    (count,) = counts
    moments = {}
    for ours, theirs in _MOMENTS.items():
        leaves = _moments(state, ours, source)
        moments[ours] = {path: _like(0, leaf) for path, leaf in leaves.items()}
        if count > 0:
            stored = {name: TorchTensor(Path(source), name, row[theirs]) for name, row in rows.items()}
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for path, leaf in leaves.items()
            }
            moments[ours] = read_params(stored, family, wanted, Path(source))

    def leaf_from_torch(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        kind, name = _place(path)
        return moments[kind][name] if kind in moments else _like(count, leaf) if kind in _COUNTS else leaf

    opt_state = jax.tree.map_with_path(leaf_from_torch, state.opt_state)
    return state.replace(opt_state=opt_state, step=_like(count, jnp.asarray(state.step)))


def adamw_to_torch(
    state: TrainState,
    optimizer: Mapping[str, Any],
    parameters: Mapping[str, Any],
    names: Family | Mapping[str, Any] | str,
    *,
    source: str = "the optimizer",
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` of a `torch.optim.AdamW` takes, so that it goes on where our training stands.

    Args:
        state: of our training, with AdamW as its optimizer.
        optimizer: `optimizer.state_dict()` of the one that is to go on; its groups stay as they are.
        parameters: see `adamw_from_torch`.
        names: see `adamw_from_torch`.
        source: start of error messages.

    Returns:
        The groups, and the moments, in float32, and number of updates of each parameter.

    Raises:
        UserError: as `adamw_from_torch`.
    """
    torch = torch_module(source)
    family, order = _matched(state, optimizer, parameters, names, source)
    counts = {int(leaf) for path, leaf in jax.tree.leaves_with_path(state.opt_state) if _place(path)[0] in _COUNTS}
    specs = tensor_specs(family, {path: leaf.shape for path, leaf in flatten(state.params).items()})
    rows: dict[str, dict[str, Any]] = {spec.name: {"step": torch.tensor(float(max(counts)))} for spec in specs}
    for ours, theirs in _MOMENTS.items():
        exported = export_tensors(specs, _moments(state, ours, source))
        for spec, tensor in zip(specs, exported, strict=True):
            rows[spec.name][theirs] = torch.from_numpy(np.array(tensor, np.float32, order="C"))
    filled = {index: rows[name] for index, name in order.items()} if max(counts) > 0 else {}
    return {"state": filled, "param_groups": list(optimizer["param_groups"])}


def _matched(
    state: TrainState,
    optimizer: Mapping[str, Any],
    parameters: Mapping[str, Any],
    names: Family | Mapping[str, Any] | str,
    source: str,
) -> tuple[Family, dict[Any, str]]:
    """How moments are stored, and the tensor of each number that PyTorch gives a parameter."""
    require_type("state", state, TrainState)
    require_type("optimizer", optimizer, Mapping, "such as optimizer.state_dict()")
    require_type("parameters", parameters, Mapping, "such as dict(module.named_parameters())")
    groups: Any = optimizer.get("param_groups")
    are_groups = isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
    )
    if not are_groups or not isinstance(optimizer.get("state"), Mapping):
        raise UserError(f"{source}: is not the state of an optimizer of PyTorch: save optimizer.state_dict()")
    if any(group.get("amsgrad") for group in groups):
        raise UserError(f"{source}: amsgrad is on, which optax.adamw does not have")
    indices = [index for group in groups for index in group["params"]]
    if not all(type(index) is int for index in indices) or len(set(indices)) < len(indices):
        raise UserError(f"{source}: its parameters must have whole numbers, each once: save optimizer.state_dict()")
    if len(indices) != len(parameters):
        raise UserError(f"{source}: has {len(indices)} parameters, but the model {len(parameters)}; give those it has")
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(state.params).items()}
    theirs = {plain_name(name): tuple(parameter.shape) for name, parameter in parameters.items()}
    family = _family(names, theirs, shapes, source)
    # A moment is laid out like its weight, but nothing is added to it.
    family = replace(family, rules=tuple(replace(rule, offset=0.0) for rule in family.rules))
    wanted = {spec.name: spec.shape for spec in tensor_specs(family, shapes)}
    if "head" not in shapes and family.head in theirs:  # the head is the embedding, and may have the name of either
        embedding = next(spec.name for spec in tensor_specs(family, shapes) if spec.rule.paths == ("embedding",))
        theirs = {embedding if name == family.head else name: shape for name, shape in theirs.items()}
    for name in [*theirs, *wanted]:
        if theirs.get(name) != wanted.get(name):
            raise UserError(
                f"{source}: parameter {name} has the shape {theirs.get(name, 'of nothing')} there, but "
                f"{wanted.get(name, 'of nothing')} here; the two models differ"
            )
    return family, dict(zip(indices, theirs, strict=True))


def _family(
    names: Family | Mapping[str, Any] | str, tensors: Mapping[str, Shape], shapes: Mapping[str, Shape], source: str
) -> Family:
    """The table that `names` stands for."""
    if isinstance(names, Family):
        return names
    if isinstance(names, str):
        known = {**FAMILIES, NANOGPT.model_type: NANOGPT}
        if names not in known:
            raise UserError(f"names = {names!r} is not known, only {', '.join(known)}; or give a map, theirs -> ours")
        return known[names]
    require_type("names", names, Mapping)
    learned = {name: paths for name, paths in names.items() if paths != []}  # the rest are no parameters of theirs
    return family_of_names(learned, tensors, shapes, source)


def _checked_row(optimizer: Mapping[str, Any], index: Any, name: str, source: str) -> dict[str, Any]:
    """What PyTorch's AdamW knows of a parameter; empty before its first update. Raises UserError."""
    row = optimizer["state"].get(index, {})
    if not isinstance(row, Mapping) or (row and not row.keys() >= {"step", *_MOMENTS.values()}):
        raise UserError(f"{source}: has no step, exp_avg and exp_avg_sq of {name}; only AdamW and Adam have")
    if not row:
        return {}
    try:
        count = float(row["step"])
    except (TypeError, ValueError, RuntimeError):
        count = -1.0
    if not 0 < count <= _MAX_UPDATES or count != int(count):
        raise UserError(f"{source}: step = {as_one_line(row['step'])} of {name} must be a whole number from 1")
    wrong = next((part for part in _MOMENTS.values() if not hasattr(row[part], "is_sparse")), None)
    if wrong is not None:
        raise UserError(f"{source}: {wrong} = {as_one_line(row[wrong])} of {name} must be a tensor")
    return {**row, "step": int(count)}


def _moments(state: TrainState, kind: str, source: str) -> dict[str, jax.Array]:
    """The arrays of a moment by the path of their parameter. Raises UserError if the optimizer is not AdamW."""
    found = [(_place(path), leaf) for path, leaf in jax.tree.leaves_with_path(state.opt_state)]
    moments = {name: leaf for (kind_of_leaf, name), leaf in found if kind_of_leaf == kind}
    if moments.keys() != flatten(state.params).keys():
        raise UserError(f"{source}: the optimizer of the state is not AdamW for all parameters: train with adamw")
    return moments


def _place(path: tuple[Any, ...]) -> tuple[str, str]:
    """What an array of optax's state is (mu, nu, count, ...), and of which parameter."""
    names = [str(getattr(part, "name", "")) for part in path]
    at = next((at for at, name in enumerate(names) if name in (*_MOMENTS, *_COUNTS)), None)
    return ("", "") if at is None else (names[at], jax.tree_util.keystr(path[at + 1 :], simple=True, separator="/"))


def _like(value: int, leaf: jax.Array) -> jax.Array:
    """An array full of a number, of the dtype and on the devices of another."""
    return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)
