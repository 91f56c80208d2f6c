"""What an optimizer remembers, in half the memory."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundedState(NamedTuple):
    """An optimizer's state with its moments in bfloat16.

    Attributes:
        num_updates: how many were made; the randomness of the next one's rounding follows from it.
        inner: the state of the optimizer itself.
    """

    num_updates: jax.Array
    inner: Any


def with_bfloat16_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, computing in float32 as it does, but keeping its moments in bfloat16 between updates.

    The second moment moves by a part 1 - beta2 of itself an update. bfloat16 has 8 bits, so a move by less than 1/512
    would be rounded away, always: with beta2 = 0.999 the moment could rise but never fall. Rounded at random, up as
    often as it takes, it is right on average.
    """

    def init(params: Any) -> RoundedState:
        state = _map_moments(lambda moment: moment.astype(jnp.bfloat16), optimizer.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), state)

    def update(gradients: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        inner = _map_moments(lambda moment: moment.astype(jnp.float32), state.inner)
        updates, inner = optimizer.update(gradients, inner, params)
        # A function of the update alone: copies of the state on several devices stay equal.
        rngs = _rngs(jax.random.fold_in(jax.random.key(0), state.num_updates))
        inner = _map_moments(lambda moment: round_at_random(moment, next(rngs)), inner)
        return updates, RoundedState(state.num_updates + 1, inner)

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, rng: jax.Array) -> jax.Array:
    """One of the two bfloat16 numbers around each number of x, the nearer one more often: x on average.

    bfloat16 is the upper half of float32. A random number added to the lower half carries over into the upper one as
    often as the lower half is large.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    # A NaN could carry over into its sign and become a zero.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _rngs(rng: jax.Array) -> Iterator[jax.Array]:
    return (jax.random.fold_in(rng, number) for number in itertools.count())


def _map_moments(change: Callable[[jax.Array], jax.Array], state: Any) -> Any:
    """The state with all of its moments changed: what optax keeps under the names mu and nu."""

    def change_if_moment(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return change(leaf) if any(getattr(part, "name", None) in ("mu", "nu") for part in path) else leaf

    return jax.tree.map_with_path(change_if_moment, state)
