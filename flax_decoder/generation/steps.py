"""The compiled programs of generation: prefill a chunk of the prompts, decode a chunk of tokens, copy cached rows.

Each is compiled once per batch size and cache size. Prompts of any length and settings of any value share one program.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flax_decoder.config import ModelConfig
from flax_decoder.generation.sampling import Filters, TokenCounts, sample
from flax_decoder.nn.cache import KVCache, empty_cache, positions_of_slots
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.precision import accumulation_dtype

# Tokens per row of a prefill chunk. Long enough that reading the weights, once per chunk, does not dominate; short
# enough to bound memory and the padding of short prompts. Several rows make a short chunk large enough.
PREFILL_TOKENS, SHORT_PREFILL_TOKENS = 128, 32
# Most tokens per row of a decode chunk: enough to hide the time between two chunks.
DECODE_TOKENS = 64
# A cache has at least this many slots, or as many as fit in this size: reading less saves little beside the weights.
MIN_SLOTS, SMALL_CACHE_BYTES = 256, 2**20


class DecodeState(struct.PyTreeNode):
    """Rows that are ready for their next token.

    Attributes:
        cache: keys and values of all tokens so far.
        logits_BV: logits of the next token.
        token_B: the last token.
        ended_B: True for rows that are complete.
        counts: tokens so far; None without penalties.
    """

    cache: KVCache
    logits_BV: jax.Array
    token_B: Any
    ended_B: Any
    counts: TokenCounts | None


class TokenChunk(struct.PyTreeNode):
    """The next C tokens of each row.

    Attributes:
        tokens_BC: the tokens; a row that has ended repeats its last token.
        logprobs_BC: log-probabilities under the model, before any setting of `Sampling`; None unless requested.
        top_tokens_BCK: the K likeliest tokens at each step, likeliest first.
        top_logprobs_BCK: their log-probabilities.
    """

    tokens_BC: Any
    logprobs_BC: Any = None
    top_tokens_BCK: Any = None
    top_logprobs_BCK: Any = None


def forward(
    model: Decoder, params: Any, tokens_BT: jax.Array, cache: KVCache, **options: Any
) -> tuple[jax.Array, KVCache]:
    """Logits of the tokens, and the cache with their keys and values. `options` are those of `Decoder`."""
    logits_and_cache: Any = model.apply({"params": params}, tokens_BT, cache=cache, **options)
    return logits_and_cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits_BV"))
def prefill_chunk(
    model: Decoder,
    params: Any,
    cache: KVCache,
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    num_tokens_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Appends a chunk of each prompt to the cache; returns it with the logits of each row's next token.

    A row without tokens keeps its `logits_BV`.
    """
    logits_B1V, cache = forward(model, params, tokens_BT, cache, num_tokens_B=num_tokens_B, last_only=True)
    return cache, jnp.where((num_tokens_B > 0)[:, None], logits_B1V[:, 0], logits_BV)


@functools.partial(jax.jit, static_argnames=("model", "num_top"), donate_argnames="state")
def decode_chunk(
    model: Decoder,
    params: Any,
    state: DecodeState,
    filters: Filters,
    rng: jax.Array | None,
    seeds_B2: jax.Array,
    end_ids: jax.Array | None,
    first_index: jax.Array,
    num_tokens: jax.Array,
    num_top: int | None = None,
) -> tuple[DecodeState, TokenChunk]:
    """Draws a token per row and appends it to the cache, `num_tokens` times or until all rows have ended.

    Args:
        model: the network.
        params: its parameters.
        state: the rows to continue.
        filters: how tokens are drawn.
        rng: random key; None if greedy.
        seeds_B2: what makes the key of each row, from `row_seeds`.
        end_ids: tokens that end a row.
        first_index: index of the first token in the new text.
        num_tokens: how many to add, at most DECODE_TOKENS.
        num_top: if given, also compute log-probabilities, and those of this many likeliest tokens.
    """
    rngs_B = None if rng is None else row_rngs(rng, seeds_B2)
    B, C = state.token_B.shape[0], DECODE_TOKENS

    def next_token(carry: tuple[jax.Array, DecodeState, TokenChunk]) -> tuple[jax.Array, DecodeState, TokenChunk]:
        i, state, chunk = carry
        index = first_index + i
        token_rngs_B = None if rngs_B is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(rngs_B, index)
        token_B = sample(state.logits_BV, filters, state.counts, token_rngs_B, index)
        token_B = jnp.where(state.ended_B, state.token_B, token_B)
        column = with_logprobs(token_B, state.logits_BV, state.ended_B, num_top, filters.num_ids)
        chunk = jax.tree.map(
            lambda columns, one: jax.lax.dynamic_update_index_in_dim(columns, one, i, axis=1), chunk, column
        )
        ended_B = state.ended_B if end_ids is None else state.ended_B | (token_B[:, None] == end_ids[None]).any(-1)
        logits_B1V, cache = forward(model, params, token_B[:, None], state.cache)
        counts = None if state.counts is None else state.counts.add(token_B)
        return i + 1, DecodeState(cache, logits_B1V[:, 0], token_B, ended_B, counts), chunk

    def is_unfinished(carry: tuple[jax.Array, DecodeState, TokenChunk]) -> jax.Array:
        i, state, _ = carry
        return (i < num_tokens) if end_ids is None else (i < num_tokens) & ~state.ended_B.all()

    column = jax.eval_shape(
        lambda: with_logprobs(state.token_B, state.logits_BV, state.ended_B, num_top, filters.num_ids)
    )
    chunk = jax.tree.map(lambda one: jnp.zeros((B, C, *one.shape[1:]), one.dtype), column)
    i, state, chunk = jax.lax.while_loop(is_unfinished, next_token, (jnp.int32(0), state, chunk))
    is_decoded_1C = jnp.arange(C)[None] < i
    return state, chunk.replace(tokens_BC=jnp.where(is_decoded_1C, chunk.tokens_BC, state.token_B[:, None]))


def with_logprobs(
    token_B: jax.Array, logits_BV: jax.Array, ended_B: jax.Array, num_top: int | None, num_ids: Any
) -> TokenChunk:
    """One token per row and, with `num_top`, its log-probability, 0 after the end, and the likeliest tokens.

    `num_ids`, if it is not None, is the number of ids that are no padding.
    """
    if num_top is None:
        return TokenChunk(token_B)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
    if num_ids is not None:
        logprobs_BV = jnp.where(jnp.arange(logprobs_BV.shape[1])[None] < num_ids, logprobs_BV, -jnp.inf)
    top_logprobs_BK, top_tokens_BK = jax.lax.top_k(logprobs_BV, num_top)
    return TokenChunk(token_B, jnp.where(ended_B, 0, logprob_B), top_tokens_BK.astype(jnp.int32), top_logprobs_BK)


@functools.partial(jax.jit, static_argnames=("config", "capacity", "rollback_slots"))
def copy_rows(
    config: ModelConfig,
    cache: KVCache,
    logits_BV: jax.Array,
    rows_R: jax.Array,
    length: jax.Array,
    capacity: int,
    rollback_slots: int = 0,
) -> tuple[KVCache, jax.Array]:
    """A cache of another capacity, with the first `length` tokens of the given rows, and the logits of these rows."""
    length_R = jnp.minimum(cache.length_B[rows_R], length)

    def copied(new: jax.ShapeDtypeStruct, old_BKSH: jax.Array) -> jax.Array:
        # A new slot takes its position from wherever that position was in the old slots.
        positions_RC = positions_of_slots(new.shape[2], length_R)
        slots_RC = jnp.where(positions_RC < 0, 0, positions_RC % old_BKSH.shape[2])
        return jnp.take_along_axis(old_BKSH[rows_R], slots_RC[:, None, :, None], axis=2)

    new_layers = cache_shapes(config, len(rows_R), capacity, rollback_slots).layers
    layers = jax.tree.map(copied, new_layers, cache.layers)
    return KVCache(layers, length_R, rollback_slots), logits_BV[rows_R]


def empty_prefill(model: Decoder, num_rows: int, capacity: int, rollback_slots: int = 0) -> tuple[KVCache, jax.Array]:
    """An empty cache, and zeros in place of logits, for the first `prefill_chunk`. Compiles nothing."""
    shapes = cache_shapes(model.config, num_rows, capacity, rollback_slots)
    cache = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    logits_BV = np.zeros((num_rows, model.config.vocab_size or 0), accumulation_dtype(model.config.dtype))
    return jax.device_put((cache, logits_BV))


@functools.lru_cache(maxsize=32)
def cache_shapes(config: ModelConfig, num_rows: int, capacity: int, rollback_slots: int) -> KVCache:
    """Shapes and dtypes of an empty cache; kept, since finding them takes as long as decoding some tokens."""
    return jax.eval_shape(lambda: empty_cache(config, num_rows, capacity, rollback_slots))


def prefill_rows(
    model: Decoder, params: Any, cache: KVCache, logits_BV: jax.Array, prompts: Sequence[np.ndarray]
) -> tuple[KVCache, jax.Array]:
    """Appends prompts to the cache chunk by chunk; further rows of the cache are padding.

    Where the turn of a token depends on the length of its text, there is one chunk.
    """
    B, longest, start = logits_BV.shape[0], max(map(len, prompts)), 0
    while start < longest:
        T = SHORT_PREFILL_TOKENS if B > 1 or longest - start <= SHORT_PREFILL_TOKENS else PREFILL_TOKENS
        T = min(T, model.config.context_length)
        if model.config.rotates_by_length:
            T = max(T, 1 << (longest - 1).bit_length())  # a power of two, so that few lengths are ever compiled
        tokens_BT, num_tokens_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for row, prompt in enumerate(prompts):
            chunk = prompt[start : start + T]
            tokens_BT[row, : len(chunk)], num_tokens_B[row] = chunk, len(chunk)
        cache, logits_BV = prefill_chunk(model, params, cache, logits_BV, tokens_BT, num_tokens_B)
        start += T
    return cache, logits_BV


def cache_capacity(config: ModelConfig, num_tokens: int) -> int:
    """Slots for a text of this length, at most the context: one of few sizes, each four times the one before.

    A cache for the full context of a model with 100,000 positions would take gigabytes even for a short text.
    """
    capacity = max(MIN_SLOTS, 1 << (SMALL_CACHE_BYTES // slot_bytes(config)).bit_length() - 1)
    while capacity < num_tokens:
        capacity *= 4
    return min(capacity, config.context_length)


def slot_bytes(config: ModelConfig) -> int:
    """What the key and value of a token take in the cache, over all layers."""
    return 2 * config.num_layers * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize


def batch_capacity(num_rows: int) -> int:
    """The batch size that rows are padded to: 1, 8, 32, 128 and so on, so that few sizes are ever compiled."""
    capacity = 1 if num_rows == 1 else 8
    while capacity < num_rows:
        capacity *= 4
    return capacity


def row_seeds(prompts: Sequence[np.ndarray], num_samples: int) -> np.ndarray:
    """seeds_B2: for each row a checksum of its prompt and the number of the sample; 0 for padding rows.

    A row's randomness thus does not depend on other rows; but the samples of a repeated prompt are numbered through.
    """
    num_drawn: dict[bytes, int] = {}
    rows = []
    for prompt in prompts:
        content = prompt.astype("<i4").tobytes()
        first = num_drawn.get(content, 0)
        rows += [(zlib.crc32(content), first + sample) for sample in range(num_samples)]
        num_drawn[content] = first + num_samples
    rows += [(0, 0)] * (batch_capacity(len(rows)) - len(rows))
    return np.array(rows, np.uint32)


def row_rngs(rng: jax.Array, seeds_B2: jax.Array) -> jax.Array:
    """A random key per row, from `row_seeds`."""
    return jax.vmap(lambda seeds: jax.random.fold_in(jax.random.fold_in(rng, seeds[0]), seeds[1]))(seeds_B2)
