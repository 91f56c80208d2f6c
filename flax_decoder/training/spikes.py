"""Loss spikes, detected by the running mean of the losses in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# The weight of the past in the running mean, which thus covers about 100 steps.
DECAY = 0.99


class LossMemory(NamedTuple):
    """A part of the optimizer's state, and thus of checkpoints."""

    usual_loss: jax.Array  # running mean of the losses of applied steps, in nats per token; 0 before the first


def remember_losses() -> optax.GradientTransformationExtraArgs:
    """A transformation that passes updates through unchanged and keeps the running mean of the loss."""

    def init(params: Any) -> LossMemory:
        return LossMemory(jnp.zeros((), jnp.float32))

    def update(
        updates: Any, state: LossMemory, params: Any = None, *, value: jax.Array | None = None, **others: Any
    ) -> tuple[Any, LossMemory]:
        if value is None:
            return updates, state
        before, loss = state.usual_loss, value.astype(jnp.float32)
        return updates, LossMemory(jnp.where(before == 0, loss, DECAY * before + (1 - DECAY) * loss))

    return optax.GradientTransformationExtraArgs(init, update)


def is_spike(loss: jax.Array, opt_state: Any, factor: float) -> jax.Array:
    """Whether a loss exceeds `factor` times the running mean; never at the first step."""
    usual = optax.tree.get(opt_state, "usual_loss")
    return (usual > 0) & (loss > factor * usual)
