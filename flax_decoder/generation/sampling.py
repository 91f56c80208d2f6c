"""Logits to the next token: first the filters, then the draw."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_decoder.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields.

    Attributes:
        vocab_size: ids from here on, with which a model's vocabulary may be padded, are never drawn.
        bad_tokens: ids that are never drawn.
        repetition_penalty: logits of tokens that are in the prompt or in the new text are divided by this, or
            multiplied where negative (Keskar et al. 2019); 1 is off.
        presence_penalty: subtracted from the logits of tokens that are in the new text; 0 is off.
        frequency_penalty: the same, times how often they are in the new text; 0 is off.
        temperature: logits are divided by this: under 1 likely tokens become likelier; 0 always takes the likeliest.
        top_k: only the k likeliest tokens can be drawn; 0 is off.
        top_p: only the fewest likeliest tokens whose probabilities reach p can be drawn (Holtzman et al. 2020);
            1 is off.
        min_p: only tokens at least this fraction as likely as the likeliest can be drawn; 0 is off.
        forced_tokens: the new text begins with these, whatever their probability.

    Raises:
        UserError: a value outside of its range.
    """

    vocab_size: int | None = None
    bad_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    forced_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)} must be {wanted}")

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on what is in the text already."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def filters(self, vocab_size: int) -> "Filters":
        """These settings as numbers that a compiled program takes, for a model with so many logits."""
        for name in ("bad_tokens", "forced_tokens"):
            for token in getattr(self, name):
                if not 0 <= token < vocab_size:
                    raise UserError(f"{name}: token id {token} is not in the vocabulary: 0 to {vocab_size - 1}")
        allowed_V = np.arange(vocab_size) < (vocab_size if self.vocab_size is None else self.vocab_size)
        allowed_V[list(self.bad_tokens)] = False
        if not allowed_V.any():
            raise UserError("bad_tokens leave no token that can be drawn")
        greedy = self.temperature == 0
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty

        def number(value: float, is_off: bool) -> np.ndarray | None:
            return None if is_off else np.asarray(value, np.float32)

        return Filters(
            allowed_V=None if allowed_V.all() else allowed_V,
            penalties=np.asarray(penalties, np.float32) if self.looks_back else None,
            temperature=number(self.temperature, greedy),
            top_k=None if greedy or self.top_k == 0 else np.asarray(min(self.top_k, vocab_size), np.int32),
            max_top_k=0 if greedy or self.top_k == 0 else min(1 << (self.top_k - 1).bit_length(), vocab_size),
            top_p=number(self.top_p, greedy or self.top_p == 1),
            min_p=number(self.min_p, greedy or self.min_p == 0),
            forced_F=np.asarray(self.forced_tokens, np.int32) if self.forced_tokens else None,
        )


class Filters(struct.PyTreeNode):
    """`Sampling` for a compiled program: None where a filter is off, else its number, which changes without compiling.

    Attributes:
        penalties: for repetition, presence and frequency.
        max_top_k: the next power of two over top_k: a program must know how many to look for at most.
    """

    allowed_V: np.ndarray | None
    penalties: np.ndarray | None
    temperature: np.ndarray | None
    top_k: np.ndarray | None
    top_p: np.ndarray | None
    min_p: np.ndarray | None
    forced_F: np.ndarray | None
    max_top_k: int = struct.field(pytree_node=False)


class Seen(struct.PyTreeNode):
    """What is in each row's text already.

    Attributes:
        prompt_BV: True for tokens of the prompt.
        count_BV: how often each token is in the new text, int32.
    """

    prompt_BV: Any
    count_BV: Any

    def with_tokens(self, tokens_B: jax.Array) -> "Seen":
        """One more token in each row."""
        return self.replace(count_BV=self.count_BV.at[jnp.arange(len(tokens_B)), tokens_B].add(1))


def sample(
    logits_BV: jax.Array,
    filters: Filters,
    seen: Seen | None = None,
    rngs_B: jax.Array | None = None,
    number: jax.Array | int = 0,
) -> jax.Array:
    """Draws a token for each row.

    Args:
        logits_BV: in float32, or in float64 where the model is.
        filters: how to choose.
        seen: needed where a penalty is on.
        rngs_B: a random key for each row, so that no row depends on its neighbours; needed unless greedy.
        number: which of the new tokens this is, counted from 0.

    Returns:
        tokens_B, int32.
    """
    logits_BV = filtered(logits_BV, filters, seen)
    if filters.temperature is None or rngs_B is None:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        tokens_B = jax.vmap(jax.random.categorical)(rngs_B, logits_BV).astype(jnp.int32)
    if filters.forced_F is not None:
        forced = jnp.asarray(filters.forced_F).at[number].get(mode="clip")
        tokens_B = jnp.where(number < len(filters.forced_F), forced, tokens_B)
    return tokens_B


def filtered(logits_BV: jax.Array, filters: Filters, seen: Seen | None = None) -> jax.Array:
    """The logits to draw from: minus infinity for tokens that cannot be drawn."""
    dtype = logits_BV.dtype
    if filters.allowed_V is not None:
        logits_BV = jnp.where(jnp.asarray(filters.allowed_V)[None], logits_BV, -jnp.inf)
    if filters.penalties is not None and seen is not None:
        repetition, presence, frequency = jnp.asarray(filters.penalties, dtype)
        logits_BV = penalise_repetition(logits_BV, seen.prompt_BV | (seen.count_BV > 0), repetition)
        logits_BV -= presence * (seen.count_BV > 0).astype(dtype) + frequency * seen.count_BV.astype(dtype)
    if filters.temperature is not None:
        logits_BV /= jnp.asarray(filters.temperature, dtype)
    if filters.top_k is not None:
        logits_BV = keep_top_k(logits_BV, filters.top_k, filters.max_top_k)
    if filters.top_p is not None:
        logits_BV = keep_top_p(logits_BV, jnp.asarray(filters.top_p, dtype))
    if filters.min_p is not None:
        logits_BV = keep_min_p(logits_BV, jnp.asarray(filters.min_p, dtype))
    return logits_BV


def penalise_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Makes tokens that are already there less likely, whatever the sign of their logit."""
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: jax.typing.ArrayLike, max_k: int) -> jax.Array:
    """Minus infinity for all but the k largest logits of each row, k <= max_k; equals of the k-th stay."""
    largest_BK = jax.lax.top_k(logits_BV, max_k)[0]
    threshold_B = jnp.take(largest_BK, jnp.asarray(k) - 1, axis=1)
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Minus infinity for all but the likeliest tokens, taken until their probabilities reach p.

    Of tokens that are equally likely, smaller ids are taken first.
    """
    order_BV = jnp.flip(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)
    probabilities_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    # A token stays if those up to it, from the least likely on, are more than what may be left out; so one always does.
    is_kept_BV = (jnp.cumsum(probabilities_BV, axis=-1) > 1 - jnp.asarray(p)).at[:, -1].set(True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(is_kept_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, min_p: jax.typing.ArrayLike) -> jax.Array:
    """Minus infinity for tokens less likely than min_p times the likeliest."""
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= largest_B1 + jnp.log(jnp.asarray(min_p)), logits_BV, -jnp.inf)
