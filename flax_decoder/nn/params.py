"""The parameters of a `Decoder` as a tree: without numbers, without stacking, and those of the head alone."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.stack import tuple_if_unstacked, unstack


def head_params(params: Any) -> Any:
    """The parameters that `Decoder.logits` reads: the head, or the embedding if it is tied, and the head's bias."""
    names = ("head" if "head" in params else "embedding", "head_bias")
    return {name: params[name] for name in names if name in params}


def unstack_layers(params: Any) -> Any:
    """The params with one array per layer instead of stacked ones: faster where a `Decoder` runs often.

    A stacked array is split at each forward pass, which costs as much as reading all weights. This splits it once, and
    takes the memory of a second copy of the layers.

    Args:
        params: the parameters of a `Decoder`, in either form.

    Returns:
        The same, with a tuple of L trees under "layers"; for `model.apply` and generation, not for training. The other
        arrays are shared: where `params` are donated to a step, they are deleted here too.

    Raises:
        ValueError: they are no parameters of a `Decoder`.
    """
    layers = layers_of(params)
    return {**params, "layers": layers if isinstance(layers, tuple) else _unstack_layers(layers)}


def layers_of(params: Any) -> Any:
    """The parameters of the layers: stacked arrays, or a tuple with one tree per layer.

    Raises:
        ValueError: `params` are no parameters of a `Decoder`.
    """
    if not isinstance(params, Mapping) or not {"embedding", "layers"} <= params.keys():
        found = f"a dict of {', '.join(map(str, params))}" if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"params must be those of a Decoder, such as state.params, but are {found or 'empty'}")
    return tuple_if_unstacked(params["layers"])


_unstack_layers = jax.jit(unstack)


def abstract_params(model: Decoder, shardings: Any = None) -> Any:
    """Shapes and dtypes of a model's parameters, without computing them.

    Args:
        model: the model.
        shardings: one `jax.sharding.Sharding` for all parameters, or a tree like theirs, in which one may stand for a
            whole branch. None is the default device.

    Raises:
        UserError: a sharding does not fit its parameter, or the tree has another structure.
    """
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    try:
        spread = jax.tree.broadcast(shardings, params, is_leaf=lambda node: node is None)
    except ValueError as error:
        raise UserError(f"shardings: must be one sharding, or a tree like the parameters: {error}") from None
    return jax.tree_util.tree_map_with_path(_placed, params, spread)


def _placed(path: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    """The leaf with its sharding, if that fits."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not isinstance(sharding, jax.sharding.Sharding | None):
        raise UserError(f"shardings: {name} has {sharding!r}, which is no jax.sharding.Sharding")
    try:
        if sharding is not None:
            sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise UserError(f"shardings: {name} of shape {leaf.shape} cannot be split so: {error}") from None
    return leaf.update(sharding=sharding)
