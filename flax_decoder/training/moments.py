"""Keeps an optimizer's moments in bfloat16: half the memory."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundedState(NamedTuple):
    """An optimizer's state with its moments in bfloat16."""

    num_updates: jax.Array  # so far, which seeds the rounding of the next one
    inner: Any  # the state of the wrapped optimizer


def with_bfloat16_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer: it computes in float32, but its moments are stored in bfloat16, rounded stochastically.

    Rounding to the nearest would not do (optax's `mu_dtype` does so, for the first moment only). The second moment
    changes by a part 1 - beta2 of itself per update; bfloat16 has 8 bits, so a change below 1/512 is rounded away: with
    beta2 = 0.999 the moment could rise but never fall. Stochastic rounding is unbiased.
    """

    def init(params: Any) -> RoundedState:
        state = _map_moments(lambda moment: moment.astype(jnp.bfloat16), optimizer.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), state)

    def update(gradients: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        inner = _map_moments(lambda moment: moment.astype(jnp.float32), state.inner)
        updates, inner = optimizer.update(gradients, inner, params)
        # A function of the update's number alone: replicas of the state on several devices stay equal.
        rng, leaf = jax.random.fold_in(jax.random.key(0), state.num_updates), itertools.count()
        inner = _map_moments(lambda moment: round_stochastically(moment, jax.random.fold_in(rng, next(leaf))), inner)
        return updates, RoundedState(state.num_updates + 1, inner)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, rng: jax.Array) -> jax.Array:
    """Rounds float32 up or down to bfloat16, with the probabilities that make the expected value x.

    bfloat16 is the upper half of float32: adding a random number to the lower half carries into the upper one with just
    this probability.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    # The bits of a NaN could carry into the sign and become a zero.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _map_moments(change: Callable[[jax.Array], jax.Array], state: Any) -> Any:
    """Applies `change` to all moments in a state: the arrays that optax names mu and nu."""

    def change_if_moment(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return change(leaf) if any(getattr(part, "name", None) in ("mu", "nu") for part in path) else leaf

    return jax.tree.map_with_path(change_if_moment, state)
