"""How wrong the predictions are."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Minus the log probability, in nats, that the model gave each next token.

        loss = log Z - logit[target],   log Z = log sum exp(logits)

    Args:
        logits_BTV: predictions, float32.
        targets_BT: the tokens that did come. Under jit an id outside of the vocabulary gives NaN.
        z_loss: weight of the penalty (log Z)^2, which keeps logits from drifting (Chowdhery et al. 2022, section 5).

    Returns:
        losses_BT, and the penalties penalty_BT that training adds to them.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    inside_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    ids_BT1 = jnp.where(inside_BT, targets_BT, 0)[:, :, None]
    target_logits_BT = jnp.take_along_axis(logits_BTV, ids_BT1, axis=-1)[:, :, 0]
    losses_BT = jnp.where(inside_BT, log_z_BT - target_logits_BT, jnp.nan)
    return losses_BT, z_loss * jnp.square(log_z_BT)
