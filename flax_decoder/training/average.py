"""A running mean of the weights, which predicts better than the weights of any one step (Polyak and Juditsky 1992).

    average <- decay * average + (1 - decay) * params        after each update

It is the last part of the optimizer's state, so steps, devices and resumed runs treat it as they treat the moments.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from flax_decoder.nn.precision import widened

_State = TypeVar("_State", bound=TrainState)


class Average(NamedTuple):
    """The last part of the optimizer's state."""

    num_updates: jax.Array  # so far
    params: Any  # the mean, a tree like the parameters, in at least float32


def keep_average(decay: float) -> optax.GradientTransformation:
    """A transformation that passes updates through unchanged and averages the parameters that they give.

    The weight of the past rises from a tenth to `decay`, as (1 + n) / (10 + n) after n updates, so that the weights of
    the start are forgotten early.
    """

    def init(params: Any) -> Average:
        # A copy, as both are given away to the next step.
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, widened(params)))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        past = jnp.minimum(decay, (1 + state.num_updates) / (10 + state.num_updates))
        new = optax.apply_updates(params, updates)
        return updates, Average(state.num_updates + 1, optax.incremental_update(new, state.params, 1 - past))

    return optax.GradientTransformation(init, update)


def swapped(state: _State) -> _State:
    """The state with the average in place of the parameters, and these in its place; the same if there is no average.

    Such parameters are what is evaluated, saved and loaded. Twice is not at all.
    """
    opt_state = state.opt_state
    if not (isinstance(opt_state, tuple) and opt_state and isinstance(opt_state[-1], Average)):
        return state
    average = opt_state[-1]
    swapped: _State = state.replace(
        params=average.params, opt_state=(*opt_state[:-1], average._replace(params=state.params))
    )
    return swapped
