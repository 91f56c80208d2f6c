"""Losses far out of range: what is usual is remembered from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# The part of the running mean that stays at each step: it looks back over about 100 of them.
DECAY = 0.99


class LossMemory(NamedTuple):
    """What is remembered, as a part of the optimizer's state: so it is saved and restored with it.

    Attributes:
        usual_loss: running mean of the losses of the steps that were applied, in nats a token; 0 before the first.
    """

    usual_loss: jax.Array


def remember_losses() -> optax.GradientTransformationExtraArgs:
    """A link in the chain of an optimizer that leaves the updates as they are, and keeps the usual loss."""

    def init(params: Any) -> LossMemory:
        return LossMemory(jnp.zeros((), jnp.float32))

    def update(
        updates: Any, state: LossMemory, params: Any = None, *, loss: jax.Array | None = None, **others: Any
    ) -> tuple[Any, LossMemory]:
        if loss is None:
            return updates, state
        before, loss = state.usual_loss, loss.astype(jnp.float32)
        return updates, LossMemory(jnp.where(before == 0, loss, DECAY * before + (1 - DECAY) * loss))

    return optax.GradientTransformationExtraArgs(init, update)


def usual_loss(opt_state: Any) -> jax.Array:
    """The usual loss in the state of an optimizer that remembers losses; 0 where none is known yet."""
    return optax.tree.get(opt_state, "usual_loss")


def is_spike(loss: jax.Array, opt_state: Any, factor: float) -> jax.Array:
    """Whether a loss is over so many times the usual one; the first is usual, whatever it is."""
    usual = usual_loss(opt_state)
    return (usual > 0) & (loss > factor * usual)
