"""Logits to the next token: first the filters, then the draw."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flax_decoder.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens already there are divided by this, or multiplied where negative (Keskar
            et al. 2019); 1 is off.
        temperature: logits are divided by this: under 1 likely tokens become likelier; 0 always takes the likeliest.
        top_k: only the k likeliest tokens can be drawn; 0 is off.
        top_p: only the fewest likeliest tokens whose probabilities reach p can be drawn (Holtzman et al. 2020);
            1 is off.
        min_p: only tokens at least this fraction as likely as the likeliest can be drawn; 0 is off.
        vocab_size: ids from here on, with which a model's vocabulary may be padded, are never drawn.

    Raises:
        UserError: a value outside of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)} must be {wanted}")


def sample(logits_BV: jax.Array, seen_BV: jax.Array, rngs_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token for each row.

    Args:
        logits_BV: float32.
        seen_BV: True for tokens that are in the row's text already.
        rngs_B: a random key for each row, so that no row depends on its neighbours.
        sampling: how to choose.

    Returns:
        tokens_B, int32.
    """
    if sampling.vocab_size is not None:
        is_padding_V = jnp.arange(logits_BV.shape[-1]) >= sampling.vocab_size
        logits_BV = jnp.where(is_padding_V[None], -jnp.inf, logits_BV)
    logits_BV = penalise_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return jax.vmap(jax.random.categorical)(rngs_B, logits_BV).astype(jnp.int32)


def penalise_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens that are already there less likely, whatever the sign of their logit."""
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Minus infinity for all but the k largest logits of each row; equals of the k-th stay."""
    k = min(k, logits_BV.shape[-1])
    threshold_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Minus infinity for all but the likeliest tokens, taken until their probabilities reach p."""
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    probabilities_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    # What stands before a token decides: the one that crosses p is still kept, so there is always one.
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(before_BV < p, rank_BV, axis=-1), logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, min_p: float) -> jax.Array:
    """Minus infinity for tokens less likely than min_p times the likeliest."""
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= largest_B1 + math.log(min_p), logits_BV, -jnp.inf)
