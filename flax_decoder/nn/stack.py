"""Running layers one after the other, whose parameters are stacked: each array has a leading axis of layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# From what is known of a layer when the program is compiled, the output of the layer before, and the layer's own part
# of the stacked arrays, to its output and its result.
Layer = Callable[[Any, Any, Any], tuple[Any, Any]]


def unstack(stacked: Any) -> tuple[Any, ...]:
    """A tree per layer, out of a tree of stacked arrays."""
    leaves, structure = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(structure, own) for own in zip(*map(jnp.unstack, leaves), strict=True))


def per_layer(tree: Any, num_layers: int) -> tuple[Any, ...]:
    """A tree per layer, out of stacked arrays, of what is one tree per layer already, or of None."""
    if tree is None:
        return (None,) * num_layers
    return tree if isinstance(tree, tuple) else unstack(tree)


def tuple_if_unstacked(params: Any) -> Any:
    """The parameters of the layers: stacked arrays as they are, one tree per layer as a tuple.

    A tuple may come back from a file as a list, or as a dict with the names "0", "1", ...
    """
    if isinstance(params, Mapping) and params and all(str(name).isdigit() for name in params):
        params = [params[name] for name in sorted(params, key=int)]
    return tuple(params) if isinstance(params, list) else params


def stacked_or_tuple(params: Any, num_layers: int) -> Any:
    """`tuple_if_unstacked`; raises ValueError for parameters of another number of layers."""
    params = tuple_if_unstacked(params)
    if isinstance(params, tuple):
        depths = {len(params)}
    else:
        depths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(params)}
    if depths != {num_layers}:
        found = " and ".join(map(str, sorted(depths)))
        raise ValueError(f"the params have {found} layers, but the model has num_layers = {num_layers}")
    return params


def stack_where_alike(*parts: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """Arrays of all layers, stacked; as they are where layers differ in the slots of their cache."""
    return jnp.stack(parts) if len({part.shape for part in parts}) == 1 else parts


def unrolled(layer: Layer, carry: Any, inputs: Iterable[Any], kinds: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`jax.lax.scan` without a loop: faster to run on CPU, slower to compile.

    Args:
        layer: see `Layer`.
        carry: input of the first layer.
        inputs: what each layer has of its own.
        kinds: what is known of each layer when the program is compiled.

    Returns:
        The output of the last layer, and the result of each.
    """
    results = []
    for kind, own in zip(kinds, inputs, strict=True):
        carry, result = layer(kind, carry, own)
        results.append(result)
    return carry, results


def periodic_scan(layer: Layer, carry: Any, stacked: Any, kinds: Sequence[Any]) -> tuple[Any, Any]:
    """`unrolled` as a loop over the periods of `kinds`: within one the kinds of all layers are known.

    Layers that the periods leave over are unrolled. `stacked` is a tree of arrays with a leading axis of layers, and
    so are the results.
    """
    period = period_of(kinds)
    num_looped = len(kinds) - len(kinds) % period

    def one_period(carry: Any, own: Any, kinds: Sequence[Any] = kinds[:period]) -> tuple[Any, Any]:
        # Unstacking at once lets the gradient of a stacked array be one concatenation.
        carry, results = unrolled(layer, carry, unstack(own), kinds)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    by_period = jax.tree.map(lambda leaf: leaf[:num_looped].reshape(-1, period, *leaf.shape[1:]), stacked)
    carry, results = jax.lax.scan(one_period, carry, by_period)
    results = jax.tree.map(lambda leaf: leaf.reshape(num_looped, *leaf.shape[2:]), results)
    if num_looped < len(kinds):
        rest = jax.tree.map(lambda leaf: leaf[num_looped:], stacked)
        carry, more = one_period(carry, rest, kinds[num_looped:])
        results = jax.tree.map(lambda *parts: jnp.concatenate(parts), results, more)
    return carry, results


def period_of(kinds: Sequence[Any]) -> int:
    """After how many of them they repeat; 1 where all are the same."""
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds[p:], kinds, strict=False)))
