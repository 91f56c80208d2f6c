"""Several tokens for one reading of the weights: some are guessed, and the model says how many it would have written.

A pass over a few tokens takes hardly longer than over one, since most of its time is spent on reading the weights. What
comes out is what the model alone would have written: at temperature 0 the same tokens, else tokens with the same
distribution (Leviathan et al. 2023, algorithm 1).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flax_decoder.generation.sampling import Filters, filtered
from flax_decoder.generation.steps import row_rngs
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.decoder import Decoder

# Passes over the model in one compiled loop; each writes one token or more.
PASSES = 8
# How many tokens back prompt lookup compares.
LONGEST_MATCH = 3
# What the random keys of a token are for, beside its own draw.
_FOR_DRAW, _FOR_GUESS, _FOR_TEST = 0, 1, 2


@dataclass(frozen=True)
class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens stood before (Saxena 2023).

    Attributes:
        num_tokens: tokens guessed at a time.
    """

    num_tokens: int = 8


@dataclass(frozen=True)
class Draft:
    """Guesses by a smaller model with the same vocabulary.

    Attributes:
        model: the smaller network.
        params: its parameters.
        num_tokens: tokens guessed at a time.
    """

    model: Decoder
    params: Any
    num_tokens: int = 4


class Guessed(struct.PyTreeNode):
    """A batch of texts between two passes.

    Attributes:
        cache: what the model has read: all of the text.
        draft_cache: what the smaller model has read, the same.
        logits_BV: what the next token is drawn from; filtered already.
        text_BS: the tokens; what stands from `cache.length_B` on means nothing.
        is_done_B: True for rows that ended or are long enough.
    """

    cache: KVCache
    draft_cache: KVCache | None
    logits_BV: jax.Array
    text_BS: Any
    is_done_B: Any


@functools.partial(jax.jit, static_argnames=("model", "draft_model", "num_guesses"), donate_argnames="texts")
def write_guessed(
    model: Decoder,
    params: Any,
    draft_model: Decoder | None,
    draft_params: Any,
    texts: Guessed,
    filters: Filters,
    rng: jax.Array | None,
    rows_B2: jax.Array,
    end_ids: jax.Array,
    end_B: jax.Array,
    num_guesses: int,
) -> Guessed:
    """Passes over the model until all rows are done, at most PASSES of them."""
    rngs_B = None if rng is None else row_rngs(rng, rows_B2)

    def one_pass(carry: tuple[jax.Array, Guessed]) -> tuple[jax.Array, Guessed]:
        i, texts = carry
        before_B = texts.cache.length_B
        first_B = draw(texts.logits_BV, rngs_B, before_B, _FOR_DRAW)
        text_BS = put(texts.text_BS, first_B[:, None], before_B)
        draft_cache, guesses_BC, guess_logits_BCV = texts.draft_cache, None, None
        if draft_model is None or texts.draft_cache is None:
            guesses_BC = look_up_guesses(text_BS, before_B + 1, num_guesses)
        else:
            draft_cache, guesses_BC, guess_logits_BCV = draft_guesses(
                draft_model, draft_params, texts.draft_cache, first_B, filters, rngs_B, num_guesses
            )

        tokens_BT = jnp.concatenate([first_B[:, None], guesses_BC], axis=1)
        num_tokens_B = jnp.full_like(first_B, num_guesses + 1)
        if model.config.positions == "learned":
            num_tokens_B = jnp.clip(model.config.context_length - before_B, 1, num_tokens_B)
        logits_and_cache: Any = model.apply({"params": params}, tokens_BT, cache=texts.cache, num_tokens_B=num_tokens_B)
        logits_BTV, cache = logits_and_cache
        logits_BTV = jax.vmap(lambda logits_BV: filtered(logits_BV, filters), in_axes=1, out_axes=1)(logits_BTV)
        num_accepted_B, logits_BV = accept(
            logits_BTV, guesses_BC, guess_logits_BCV, num_tokens_B - 1, rngs_B, before_B + 1
        )

        text_BS = put(text_BS, guesses_BC, before_B + 1)
        length_B = jnp.where(texts.is_done_B, before_B, before_B + 1 + num_accepted_B)
        is_new_BT = jnp.arange(num_guesses + 1)[None] <= num_accepted_B[:, None]
        ends_B = ((tokens_BT[:, :, None] == end_ids[None, None]).any(-1) & is_new_BT).any(-1)
        logits_BV = jnp.where(texts.is_done_B[:, None], texts.logits_BV, logits_BV)
        return i + 1, Guessed(
            cache=cache.replace(length_B=length_B),
            draft_cache=None if draft_cache is None else draft_cache.replace(length_B=length_B),
            logits_BV=logits_BV,
            text_BS=text_BS,
            is_done_B=texts.is_done_B | ends_B | (length_B >= end_B),
        )

    def goes_on(carry: tuple[jax.Array, Guessed]) -> jax.Array:
        i, texts = carry
        return (i < PASSES) & ~texts.is_done_B.all()

    return jax.lax.while_loop(goes_on, one_pass, (jnp.int32(0), texts))[1]


def accept(
    logits_BTV: jax.Array,
    guesses_BC: jax.Array,
    guess_logits_BCV: jax.Array | None,
    num_guesses_B: jax.Array,
    rngs_B: jax.Array | None,
    place_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How many guesses stand, and what the token behind them is drawn from.

    Guess x stands with the probability min(1, p(x) / q(x)), and all before the first that falls; in its place comes a
    token from max(0, p - q), normalised. Then every token is distributed as p says, whatever q is.

    Args:
        logits_BTV: the model's, p, of each guess and of the token behind the last, filtered.
        guesses_BC: the guesses, one fewer.
        guess_logits_BCV: what they were drawn from, q; None where each was certain.
        num_guesses_B: how many of them count.
        rngs_B: None takes the likeliest tokens: then a guess stands where it is the likeliest.
        place_B: where in the text the guesses begin.

    Returns:
        num_accepted_B; logits_BV.
    """
    num_guesses = guesses_BC.shape[1]
    counts_BC = jnp.arange(num_guesses)[None] < num_guesses_B[:, None]
    if rngs_B is None:
        stands_BC = counts_BC & (logits_BTV[:, :-1].argmax(-1) == guesses_BC)
        num_accepted_B = jnp.cumprod(stands_BC, axis=1).sum(1)
        return num_accepted_B, take(logits_BTV, num_accepted_B)

    p_BTV = jax.nn.softmax(logits_BTV, axis=-1)
    if guess_logits_BCV is None:
        q_BCV = jax.nn.one_hot(guesses_BC, logits_BTV.shape[-1])
    else:
        q_BCV = jax.nn.softmax(guess_logits_BCV, axis=-1)
    p_of_guess_BC, q_of_guess_BC = (
        jnp.take_along_axis(array, guesses_BC[:, :, None], axis=2)[:, :, 0] for array in (p_BTV[:, :-1], q_BCV)
    )
    places_BC = place_B[:, None] + jnp.arange(num_guesses)[None]
    rngs_BC = jax.vmap(lambda places_B: token_rngs(rngs_B, places_B, _FOR_TEST), in_axes=1, out_axes=1)(places_BC)
    uniform_BC = jax.vmap(jax.vmap(jax.random.uniform))(rngs_BC)
    stands_BC = counts_BC & (uniform_BC * q_of_guess_BC < p_of_guess_BC)
    num_accepted_B = jnp.cumprod(stands_BC, axis=1).sum(1)

    # Behind the last guess that counts nothing fell: its q is 0.
    q_BCV = jnp.where(counts_BC[:, :, None], q_BCV, 0)
    q_BTV = jnp.concatenate([q_BCV, jnp.zeros_like(q_BCV[:, :1])], axis=1)
    p_BV, q_BV = take(p_BTV, num_accepted_B), take(q_BTV, num_accepted_B)
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Where p = q nothing can fall, but for a rounding.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    return num_accepted_B, jnp.log(rest_BV)


def look_up_guesses(text_BS: jax.Array, length_B: jax.Array, num_guesses: int) -> jax.Array:
    """guesses_BC: what followed where the last tokens stood before: the longest match, and of equals the latest.

    A text whose end overlaps with what it repeats is taken to go round and round.
    """
    S = text_BS.shape[1]

    def guesses(text_S: jax.Array, length: jax.Array) -> jax.Array:
        back = jnp.arange(1, LONGEST_MATCH + 1)
        places = jnp.arange(S)
        matches = text_S[jnp.maximum(places[:, None] - back[None], 0)] == text_S[jnp.maximum(length - back, 0)][None]
        matches &= places[:, None] >= back[None]
        num_matching = jnp.cumprod(matches, axis=1).sum(1)
        is_before = (places >= 1) & (places < length)
        place = jnp.argmax(jnp.where(is_before, num_matching * S + places, -1))
        return text_S[place + jnp.arange(num_guesses) % jnp.maximum(length - place, 1)]

    return jax.vmap(guesses)(text_BS, length_B)


def draft_guesses(
    model: Decoder,
    params: Any,
    cache: KVCache,
    first_B: jax.Array,
    filters: Filters,
    rngs_B: jax.Array | None,
    num_guesses: int,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Writes `num_guesses` tokens behind first_B with the smaller model, and reads them all.

    Returns:
        The cache, guesses_BC, and the filtered logits they were drawn from, (B, T, V).
    """
    guesses, guess_logits, token_B = [], [], first_B
    for _ in range(num_guesses + 1):
        logits_and_cache: Any = model.apply({"params": params}, token_B[:, None], cache=cache)
        logits_B1V, cache = logits_and_cache
        logits_BV = filtered(logits_B1V[:, 0], filters)
        token_B = draw(logits_BV, rngs_B, cache.length_B, _FOR_GUESS)
        guesses.append(token_B)
        guess_logits.append(logits_BV)
    # The last is drawn in vain: its pass was for reading the guess before it.
    return cache, jnp.stack(guesses[:-1], axis=1), jnp.stack(guess_logits[:-1], axis=1)


def draw(logits_BV: jax.Array, rngs_B: jax.Array | None, places_B: jax.Array, purpose: int) -> jax.Array:
    """A token for each row, to stand at a place of its text; the likeliest without a key."""
    if rngs_B is None:
        return logits_BV.argmax(-1).astype(jnp.int32)
    rngs_B = token_rngs(rngs_B, places_B, purpose)
    return jax.vmap(jax.random.categorical)(rngs_B, logits_BV).astype(jnp.int32)


def token_rngs(rngs_B: jax.Array, places_B: jax.Array, purpose: int) -> jax.Array:
    """A key for each row's token at a place of its text."""
    return jax.vmap(lambda rng, place: jax.random.fold_in(jax.random.fold_in(rng, place), purpose))(rngs_B, places_B)


def put(text_BS: jax.Array, tokens_BT: jax.Array, place_B: jax.Array) -> jax.Array:
    """Texts with tokens put in at a place of each."""
    rows = jnp.arange(text_BS.shape[0])[:, None]
    return text_BS.at[rows, place_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]].set(tokens_BT, mode="drop")


def take(array_BTV: jax.Array, index_B: jax.Array) -> jax.Array:
    """The vector at one place of each row."""
    return jnp.take_along_axis(array_BTV, index_B[:, None, None], axis=1)[:, 0]
