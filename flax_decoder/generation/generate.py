"""New tokens, one after the other: the prompt is read once, then each token costs one position.

Past the context the last half of it is read again, and writing goes on from there: every token is predicted from at
least half a context, in memory that does not grow.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import Sampling, sample
from flax_decoder.nn.cache import KVCache, empty_cache
from flax_decoder.nn.decoder import Decoder, check_tokens

# Tokens a compiled loop makes before they are handed out: enough to hide the hand-over, few enough to look fluent.
CHUNK_TOKENS = 16
# Prompts are padded to a power of two of at least this, so that few lengths are ever compiled.
SHORTEST_PREFILL_TOKENS = 16


def generate(
    model: Decoder,
    params: Any,
    prompt_tokens_BT: ArrayLike,
    max_new_tokens: int,
    rng: jax.Array | None = None,
    **sampling: Any,
) -> jax.Array:
    """Continues prompts.

    Args:
        model: the network.
        params: its parameters.
        prompt_tokens_BT: token ids, at least one a row.
        max_new_tokens: how many to add.
        rng: random key; a row's tokens are a function of it, the row's number and its prompt. Not needed at
            temperature 0.
        **sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty.

    Returns:
        The prompts with the new tokens behind them, int32 (B, T + max_new_tokens).

    Raises:
        ValueError: ids outside of the vocabulary, an empty prompt, a negative number of tokens, or a setting of
            `Sampling` out of range.
    """
    prompt = np.asarray(prompt_tokens_BT)
    chunks = stream(model, params, prompt, max_new_tokens, rng, Sampling(**sampling))
    return jnp.asarray(np.concatenate([prompt.astype(np.int32), *chunks], axis=1))


def stream(
    model: Decoder,
    params: Any,
    prompt_tokens_BT: np.ndarray,
    max_new_tokens: int,
    rng: jax.Array | None,
    sampling: Sampling,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the new tokens as they are made, int32 (B, some); raises before the first of them."""
    if prompt_tokens_BT.ndim != 2 or 0 in prompt_tokens_BT.shape:
        raise UserError(f"the prompt must be tokens (B, T) with at least one a row, not {prompt_tokens_BT.shape}")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens = {max_new_tokens} must be 0 or a positive number")
    if rng is None and sampling.temperature > 0:
        raise UserError("sampling needs rng, such as jax.random.key(0); or temperature = 0")
    check_tokens(prompt_tokens_BT, model.config.vocab_size or 0)

    B = prompt_tokens_BT.shape[0]
    capacity = cache_capacity(prompt_tokens_BT.shape[1] + max_new_tokens, model.config.context_length)
    rng = jax.random.key(0) if rng is None else rng  # not drawn from at temperature 0
    rngs_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(B))
    text_BT = prompt_tokens_BT.astype(np.int32)
    seen_BV = jnp.zeros((B, model.config.vocab_size or 0), bool).at[jnp.arange(B)[:, None], text_BT].set(True)

    made = 0
    while made < max_new_tokens:
        num_read = text_BT.shape[1] if text_BT.shape[1] <= capacity else max(capacity // 2, 1)
        padded_BT = pad_right(text_BT[:, -num_read:], capacity)
        token_B, seen_BV, cache = _prefill(
            model, params, padded_BT, num_read, seen_BV, rngs_B, made, sampling, capacity
        )
        new_tokens = [np.asarray(token_B)[:, None]]
        made += 1
        yield new_tokens[-1]
        room = capacity - num_read
        while room > 0 and made < max_new_tokens:
            count = min(CHUNK_TOKENS, room, max_new_tokens - made)
            chunk_BC, token_B, seen_BV, cache = _decode(
                model, params, token_B, seen_BV, cache, rngs_B, made, count, sampling
            )
            new_tokens.append(np.asarray(chunk_BC)[:, :count])
            made, room = made + count, room - count
            yield new_tokens[-1]
        # Only the last context can be read again; what lies before it is done with.
        text_BT = np.concatenate([text_BT, *new_tokens], axis=1)[:, -(capacity + 1) :]


def cache_capacity(num_tokens: int, context_length: int) -> int:
    """Slots for a text of so many tokens: the next power of two, at most the context.

    A cache of the whole context of a model made for 100,000 tokens would take gigabytes, whatever the text.
    """
    return min(max(SHORTEST_PREFILL_TOKENS, 1 << (num_tokens - 1).bit_length()), context_length)


def pad_right(tokens_BT: np.ndarray, longest: int) -> np.ndarray:
    """Adds zeros up to the next power of two, at most `longest`."""
    T = tokens_BT.shape[1]
    return np.pad(tokens_BT, ((0, 0), (0, cache_capacity(T, longest) - T)))


@functools.partial(jax.jit, static_argnames=("model", "sampling", "capacity"))
def _prefill(
    model: Decoder,
    params: Any,
    tokens_BT: jax.Array,
    num_read: jax.Array,
    seen_BV: jax.Array,
    rngs_B: jax.Array,
    made: jax.Array,
    sampling: Sampling,
    capacity: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Reads a padded prompt of `num_read` tokens, and draws the token behind it."""
    B = tokens_BT.shape[0]
    cache = empty_cache(model.config, B, capacity)
    logits_BTV, cache = apply_cached(model, params, tokens_BT, cache)
    # Padding stands behind the prompt, where no token of it looks; setting the length back forgets it.
    cache = cache.replace(length_B=jnp.full(B, num_read, jnp.int32))
    logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, num_read - 1, axis=1, keepdims=False)
    token_B, seen_BV = _draw(logits_BV, seen_BV, rngs_B, made, sampling)
    return token_B, seen_BV, cache


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("cache", "seen_BV"))
def _decode(
    model: Decoder,
    params: Any,
    token_B: jax.Array,
    seen_BV: jax.Array,
    cache: KVCache,
    rngs_B: jax.Array,
    made: jax.Array,
    count: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """Feeds a token and draws the next, `count` times; also returns what was drawn, in the first of its columns."""

    def next_token(i: jax.Array, carry: Any) -> Any:
        chunk_BC, token_B, seen_BV, cache = carry
        logits_B1V, cache = apply_cached(model, params, token_B[:, None], cache)
        token_B, seen_BV = _draw(logits_B1V[:, 0], seen_BV, rngs_B, made + i, sampling)
        chunk_BC = jax.lax.dynamic_update_slice_in_dim(chunk_BC, token_B[:, None], i, axis=1)
        return chunk_BC, token_B, seen_BV, cache

    chunk_BC = jnp.zeros((token_B.shape[0], CHUNK_TOKENS), jnp.int32)
    return jax.lax.fori_loop(0, count, next_token, (chunk_BC, token_B, seen_BV, cache))


def apply_cached(model: Decoder, params: Any, tokens_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """The model on tokens that follow those in the cache: logits_BTV, and the cache with them in it."""
    logits_and_cache: Any = model.apply({"params": params}, tokens_BT, cache=cache)
    return logits_and_cache


def _draw(
    logits_BV: jax.Array, seen_BV: jax.Array, rngs_B: jax.Array, number: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Draws new token `number` of each row and marks it as seen."""
    rngs_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rngs_B, number)
    token_B = sample(logits_BV, seen_BV, rngs_B, sampling)
    return token_B, seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
