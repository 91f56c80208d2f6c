"""Logits to the next token: filters, then a random draw."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_decoder.errors import UserError, as_one_line, as_whole_number


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields.

    Attributes:
        vocab_size: ids from this one on are never drawn: padding of the model's vocabulary; None is no limit.
        bad_tokens: ids that are never drawn.
        repetition_penalty: logits of tokens in the prompt or the new text are divided by this if positive, multiplied
            if negative (Keskar et al. 2019); 1 is off.
        presence_penalty: subtracted from the logits of tokens in the new text; 0 is off.
        frequency_penalty: the same, times their number of occurrences in the new text; 0 is off.
        temperature: divides the logits; below 1 favours likely tokens, 0 always takes the likeliest.
        top_k: keeps the k likeliest tokens; 0 is off.
        top_p: keeps the fewest likeliest tokens whose probabilities add up to p (Holtzman et al. 2020); 1 is off.
        min_p: keeps tokens at least this fraction as likely as the likeliest; 0 is off.
        forced_tokens: the new text begins with these, whatever their probability.

    Raises:
        UserError: a value is out of range.
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
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p", "min_p"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "top_k", as_whole_number("top_k", self.top_k, 0))
        if self.vocab_size is not None:
            object.__setattr__(self, "vocab_size", as_whole_number("vocab_size", self.vocab_size, 1))
        for name, valid, wanted in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)} must be {wanted}")

    def filters(self, vocab_size: int) -> "Filters":
        """These settings as arguments of a compiled program.

        Args:
            vocab_size: V, number of logits of the model.

        Raises:
            UserError: a token is not in the vocabulary, or no token is left to draw.
        """
        bad_tokens = as_ids("bad_tokens", self.bad_tokens, vocab_size)
        forced_F = as_ids("forced_tokens", self.forced_tokens, vocab_size)
        allowed_V = np.arange(vocab_size) < (vocab_size if self.vocab_size is None else self.vocab_size)
        allowed_V[bad_tokens] = False
        if not allowed_V.any():
            raise UserError("bad_tokens leave no token that can be drawn")
        greedy = self.temperature == 0
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty

        def number(value: float, is_off: bool) -> np.ndarray | None:
            return None if is_off else np.asarray(value, np.float32)

        return Filters(
            allowed_V=None if allowed_V.all() else allowed_V,
            penalties=None if penalties == (1, 0, 0) else np.asarray(penalties, np.float32),
            temperature=number(self.temperature, greedy),
            top_k=None if greedy or self.top_k == 0 else np.asarray(min(self.top_k, vocab_size), np.int32),
            max_top_k=0 if greedy or self.top_k == 0 else min(1 << (self.top_k - 1).bit_length(), vocab_size),
            top_p=number(self.top_p, greedy or self.top_p == 1),
            min_p=number(self.min_p, greedy or self.min_p == 0),
            forced_F=forced_F if len(forced_F) else None,
            num_ids=None if (self.vocab_size or vocab_size) >= vocab_size else np.asarray(self.vocab_size, np.int32),
        )


def as_ids(name: str, ids: Any, vocab_size: int) -> np.ndarray:
    """Token ids as int32 (F,); UserError for what is no list of tokens of the vocabulary."""
    try:
        numbers = [as_whole_number(f"each of {name}", id, -1) for id in ids]
    except TypeError:
        raise UserError(f"{name} = {as_one_line(ids)} must be a list of token ids") from None
    for number in numbers:
        if not 0 <= number < vocab_size:
            raise UserError(f"{name}: token id {number} is not in the vocabulary: 0 to {vocab_size - 1}")
    return np.array(numbers, np.int32)


def _number(name: str, value: Any) -> float:
    """A number of Python, NumPy or JAX as Python's; UserError if it is none."""
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except TypeError:
        raise UserError(f"{name} = {as_one_line(value)} must be a number") from None


class Filters(struct.PyTreeNode):
    """`Sampling` for a compiled program: arrays, whose values can change without compiling; None turns a filter off.

    Attributes:
        penalties: for repetition, presence and frequency.
        max_top_k: top_k rounded up to a power of two, since the number of tokens to look for must be static.
        num_ids: ids from this one on are padding, which no list of likeliest tokens has; None if there is none.
    """

    allowed_V: np.ndarray | None
    penalties: np.ndarray | None
    temperature: np.ndarray | None
    top_k: np.ndarray | None
    top_p: np.ndarray | None
    min_p: np.ndarray | None
    forced_F: np.ndarray | None
    max_top_k: int = struct.field(pytree_node=False)
    num_ids: np.ndarray | None


class TokenCounts(struct.PyTreeNode):
    """Which tokens occur in each row, for the penalties.

    Attributes:
        prompt_BV: whether each token is in the prompt.
        new_BV: how often each token is in the new text, int32.
    """

    prompt_BV: Any
    new_BV: Any

    def add(self, tokens_B: jax.Array) -> "TokenCounts":
        """Counts one more new token per row."""
        return self.replace(new_BV=self.new_BV.at[jnp.arange(len(tokens_B)), tokens_B].add(1))


def sample(
    logits_BV: jax.Array,
    filters: Filters,
    counts: TokenCounts | None = None,
    rngs_B: jax.Array | None = None,
    index: jax.Array | int = 0,
) -> jax.Array:
    """Draws a token per row.

    Args:
        logits_BV: float32, or float64 for a float64 model.
        filters: how to choose.
        counts: tokens so far; needed for penalties.
        rngs_B: a random key per row, so that rows do not depend on each other; needed unless greedy.
        index: index of the token in the new text.

    Returns:
        tokens_B, int32.
    """
    tokens_B = draw(filtered(logits_BV, filters, counts), None if filters.temperature is None else rngs_B)
    if filters.forced_F is not None:
        forced = jnp.asarray(filters.forced_F).at[index].get(mode="clip")
        tokens_B = jnp.where(index < len(filters.forced_F), forced, tokens_B)
    return tokens_B


def draw(logits_BV: jax.Array, rngs_B: jax.Array | None) -> jax.Array:
    """tokens_B, drawn from the softmax of each row; the likeliest without keys."""
    if rngs_B is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(rngs_B, logits_BV).astype(jnp.int32)


def filtered(logits_BV: jax.Array, filters: Filters, counts: TokenCounts | None = None) -> jax.Array:
    """The logits to draw from: minus infinity for tokens that cannot be drawn."""
    dtype = logits_BV.dtype
    if filters.allowed_V is not None:
        logits_BV = jnp.where(jnp.asarray(filters.allowed_V)[None], logits_BV, -jnp.inf)
    if filters.penalties is not None and counts is not None:
        repetition, presence, frequency = jnp.asarray(filters.penalties, dtype)
        is_new_BV = counts.new_BV > 0
        logits_BV = penalise_repetition(logits_BV, counts.prompt_BV | is_new_BV, repetition)
        logits_BV -= presence * is_new_BV.astype(dtype) + frequency * counts.new_BV.astype(dtype)
    if filters.temperature is not None:
        logits_BV /= jnp.asarray(filters.temperature, dtype)
    if filters.top_k is not None:
        logits_BV = keep_top_k(logits_BV, filters.top_k, filters.max_top_k)
    if filters.top_p is not None:
        logits_BV = keep_top_p(logits_BV, jnp.asarray(filters.top_p, dtype))
    if filters.min_p is not None:
        logits_BV = keep_min_p(logits_BV, jnp.asarray(filters.min_p, dtype))
    return logits_BV


def penalise_repetition(logits_BV: jax.Array, occurs_BV: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Makes tokens that already occur less likely, whatever the sign of their logit."""
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(occurs_BV, penalised_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: jax.typing.ArrayLike, max_k: int) -> jax.Array:
    """Masks all but the k largest logits of each row, k <= max_k; ties with the k-th are kept."""
    largest_BK = jax.lax.top_k(logits_BV, max_k)[0]
    threshold_B = jnp.take(largest_BK, jnp.asarray(k) - 1, axis=1)
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Masks all but the likeliest tokens, taken until their probabilities add up to p; of ties, smaller ids first."""
    order_BV = jnp.flip(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)
    probabilities_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    # In ascending order, a token is kept once the sum up to it exceeds 1 - p; the likeliest always is.
    is_kept_BV = (jnp.cumsum(probabilities_BV, axis=-1) > 1 - jnp.asarray(p)).at[:, -1].set(True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(is_kept_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, min_p: jax.typing.ArrayLike) -> jax.Array:
    """Masks tokens less likely than min_p times the likeliest."""
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= largest_B1 + jnp.log(jnp.asarray(min_p)), logits_BV, -jnp.inf)
