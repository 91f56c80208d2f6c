"""Running layers one after the other, whose parameters are stacked: each array has a leading axis of layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# From what is known of a layer when the program is compiled, what the layer before handed on, and the layer's own part
# of the stacked arrays, to what it hands on and its result.
Layer = Callable[[Any, Any, Any], tuple[Any, Any]]


def unstack(stacked: Any) -> tuple[Any, ...]:
    """A tree for each layer, out of a tree of stacked arrays."""
    leaves, structure = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(structure, own) for own in zip(*map(jnp.unstack, leaves), strict=True))


def unrolled_scan(layer: Layer, carry: Any, stacked: Any, kinds: Sequence[Any]) -> tuple[Any, Any]:
    """`jax.lax.scan` without a loop: faster to run on CPU, slower to compile.

    Args:
        layer: see `Layer`.
        carry: what the first layer is handed.
        stacked: a tree of arrays with an axis of layers before their own.
        kinds: what is known of each layer when the program is compiled.

    Returns:
        What the last layer handed on, and the results, stacked.
    """
    results = []
    # Unstacking at once lets the gradient of a stacked array be one concatenation.
    for kind, own in zip(kinds, unstack(stacked), strict=True):
        carry, result = layer(kind, carry, own)
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def periodic_scan(layer: Layer, carry: Any, stacked: Any, kinds: Sequence[Any]) -> tuple[Any, Any]:
    """`unrolled_scan` as a loop over the periods of `kinds`: within one the kinds of all layers are known.

    Layers that the periods leave over are unrolled.
    """
    period = period_of(kinds)
    num_looped = len(kinds) - len(kinds) % period

    def one_period(carry: Any, own: Any) -> tuple[Any, Any]:
        return unrolled_scan(layer, carry, own, kinds[:period])

    by_period = jax.tree.map(lambda leaf: leaf[:num_looped].reshape(-1, period, *leaf.shape[1:]), stacked)
    carry, results = jax.lax.scan(one_period, carry, by_period)
    results = jax.tree.map(lambda leaf: leaf.reshape(num_looped, *leaf.shape[2:]), results)
    if num_looped < len(kinds):
        rest = jax.tree.map(lambda leaf: leaf[num_looped:], stacked)
        carry, more = unrolled_scan(layer, carry, rest, kinds[num_looped:])
        results = jax.tree.map(lambda *parts: jnp.concatenate(parts), results, more)
    return carry, results


def period_of(kinds: Sequence[Any]) -> int:
    """After how many of them they repeat; 1 where all are the same."""
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds[p:], kinds, strict=False)))
