"""The compiled programs of generation: read a piece of the prompts, write some tokens, copy what was read.

Each is compiled once for a size of batch and of cache; prompts of every length, and every number that a setting has,
share one program.
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
from flax_decoder.generation.sampling import Filters, Seen, sample
from flax_decoder.nn.cache import KVCache, empty_cache, positions_of_slots
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.precision import accumulation_dtype

# Prompts are read in pieces of so many tokens a row: enough that the weights, which each piece reads once, are not what
# takes the time, and few enough that memory stays small and a short prompt is not mostly padding. Several rows make a
# piece long enough by themselves; a single one takes long pieces as far as it reaches.
READ_TOKENS, SHORT_READ_TOKENS = 128, 32
# A compiled loop writes at most so many tokens before they are handed out: enough to hide the hand-over.
WRITE_TOKENS = 64
# A cache has at least so many slots, or as many as this size holds: below, reading it costs little beside the weights.
FEWEST_SLOTS, SMALL_CACHE_BYTES = 256, 2**20


class Texts(struct.PyTreeNode):
    """A batch of texts, ready for their next token.

    Attributes:
        cache: what was read.
        logits_BV: of the next token.
        token_B: the last new token.
        ended_B: True for rows that are complete.
        seen: what is in the texts, where a penalty asks for it.
    """

    cache: KVCache
    logits_BV: jax.Array
    token_B: Any
    ended_B: Any
    seen: Seen | None


class Written(struct.PyTreeNode):
    """New tokens; C of them a row.

    Attributes:
        tokens_BC: the tokens; a row that ended repeats its end token.
        logprobs_BC: their log-probabilities by the model, before any setting of `Sampling`; None unless asked for.
        top_tokens_BCK: the K likeliest tokens in each place, likeliest first.
        top_logprobs_BCK: their log-probabilities.
    """

    tokens_BC: Any
    logprobs_BC: Any = None
    top_tokens_BCK: Any = None
    top_logprobs_BCK: Any = None


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits_BV"))
def read(
    model: Decoder,
    params: Any,
    cache: KVCache,
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    num_tokens_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Reads one piece of each prompt; gives the logits behind it, or `logits_BV` again for a row without a piece."""
    logits_and_cache: Any = model.apply(
        {"params": params}, tokens_BT, cache=cache, num_tokens_B=num_tokens_B, last_only=True
    )
    logits_B1V, cache = logits_and_cache
    return cache, jnp.where((num_tokens_B > 0)[:, None], logits_B1V[:, 0], logits_BV)


@functools.partial(jax.jit, static_argnames=("model", "num_top"), donate_argnames="texts")
def write(
    model: Decoder,
    params: Any,
    texts: Texts,
    filters: Filters,
    rng: jax.Array | None,
    rows_B2: jax.Array,
    end_ids: jax.Array | None,
    number: jax.Array,
    count: jax.Array,
    num_top: int | None = None,
) -> tuple[Texts, Written]:
    """Draws a token in each row and reads it, `count` times or until all rows have ended.

    Args:
        model: the network.
        params: its parameters.
        texts: what is continued.
        filters: how tokens are drawn.
        rng: random key, None where it is not drawn from.
        rows_B2: what makes each row's own key, from `row_numbers`.
        end_ids: tokens that end a row.
        number: how many new tokens there are already.
        count: how many to add, at most WRITE_TOKENS.
        num_top: log-probabilities are wanted, and those of so many of the likeliest tokens.
    """
    rngs_B = None if rng is None else row_rngs(rng, rows_B2)
    B, C = texts.token_B.shape[0], WRITE_TOKENS

    def next_token(carry: tuple[jax.Array, Texts, Written]) -> tuple[jax.Array, Texts, Written]:
        i, texts, written = carry
        own_rngs_B = None if rngs_B is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(rngs_B, number + i)
        token_B = sample(texts.logits_BV, filters, texts.seen, own_rngs_B, number + i)
        token_B = jnp.where(texts.ended_B, texts.token_B, token_B)
        column = Written(token_B, *logprobs(texts.logits_BV, token_B, texts.ended_B, num_top))
        written = jax.tree.map(
            lambda columns, one: jax.lax.dynamic_update_index_in_dim(columns, one, i, axis=1), written, column
        )
        ended_B = texts.ended_B if end_ids is None else texts.ended_B | (token_B[:, None] == end_ids[None]).any(-1)
        logits_and_cache: Any = model.apply({"params": params}, token_B[:, None], cache=texts.cache)
        logits_B1V, cache = logits_and_cache
        seen = None if texts.seen is None else texts.seen.with_tokens(token_B)
        return i + 1, Texts(cache, logits_B1V[:, 0], token_B, ended_B, seen), written

    def goes_on(carry: tuple[jax.Array, Texts, Written]) -> jax.Array:
        i, texts, _ = carry
        return (i < count) if end_ids is None else (i < count) & ~texts.ended_B.all()

    empty = Written(jnp.zeros((B, C), jnp.int32))
    if num_top is not None:
        tops = (B, C, num_top)
        dtype = texts.logits_BV.dtype
        empty = Written(empty.tokens_BC, jnp.zeros((B, C), dtype), jnp.zeros(tops, jnp.int32), jnp.zeros(tops, dtype))
    i, texts, written = jax.lax.while_loop(goes_on, next_token, (jnp.int32(0), texts, empty))
    is_written_1C = jnp.arange(C)[None] < i
    tokens_BC = jnp.where(is_written_1C, written.tokens_BC, texts.token_B[:, None])
    return texts, written.replace(tokens_BC=tokens_BC)


def logprobs(
    logits_BV: jax.Array, token_B: jax.Array, ended_B: jax.Array, num_top: int | None
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Log-probabilities of a token a row, 0 behind the end, and the likeliest tokens with theirs; None unless asked."""
    if num_top is None:
        return None, None, None
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
    top_logprobs_BK, top_tokens_BK = jax.lax.top_k(logprobs_BV, num_top)
    return jnp.where(ended_B, 0, logprob_B), top_tokens_BK.astype(jnp.int32), top_logprobs_BK


@functools.partial(jax.jit, static_argnames=("config", "capacity", "rollback_slots"))
def spread(
    config: ModelConfig,
    cache: KVCache,
    logits_BV: jax.Array,
    rows_R: jax.Array,
    length: jax.Array,
    capacity: int,
    rollback_slots: int = 0,
) -> tuple[KVCache, jax.Array]:
    """Copies rows of a cache, each as often as `rows_R` names it, into one of another capacity, and their logits.

    What lies beyond `length` is forgotten.
    """
    new = jax.eval_shape(lambda: empty_cache(config, len(rows_R), capacity, rollback_slots))
    length_R = jnp.minimum(cache.length_B[rows_R], length)

    def copied(old_BKSH: jax.Array, num_slots: int) -> jax.Array:
        # Slot c of the new takes what has its position in the old.
        positions_RC = positions_of_slots(num_slots, length_R)
        slots_RC = jnp.where(positions_RC < 0, 0, positions_RC % old_BKSH.shape[2])
        return jnp.take_along_axis(old_BKSH[rows_R], slots_RC[:, None, :, None], axis=2)

    layers = tuple(
        (copied(old[0], like[0].shape[2]), copied(old[1], like[1].shape[2]))
        for old, like in zip(cache.layers, new.layers, strict=True)
    )
    return KVCache(layers, length_R, rollback_slots), logits_BV[rows_R]


def nothing_read(model: Decoder, num_rows: int, capacity: int, rollback_slots: int = 0) -> tuple[KVCache, jax.Array]:
    """An empty cache, and logits in the place of those that reading will give; made without compiling anything."""
    cache = jax.tree.map(np.zeros_like, _empty_on_host(model.config, num_rows, capacity, rollback_slots))
    logits_BV = np.zeros((num_rows, model.config.vocab_size or 0), accumulation_dtype(model.config.dtype))
    on_device: tuple[KVCache, jax.Array] = jax.device_put((cache, logits_BV))
    return on_device


@functools.lru_cache(maxsize=32)
def _empty_on_host(config: ModelConfig, num_rows: int, capacity: int, rollback_slots: int) -> KVCache:
    """The shapes of a cache as zeros that take no memory; finding them out costs as much as writing some tokens."""
    shapes = jax.eval_shape(lambda: empty_cache(config, num_rows, capacity, rollback_slots))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)


def read_all(
    model: Decoder, params: Any, cache: KVCache, logits_BV: jax.Array, prompts: Sequence[np.ndarray]
) -> tuple[KVCache, jax.Array]:
    """Reads prompts, or what is left of them, piece by piece; rows of the cache beyond the prompts stay empty."""
    B, longest, start = logits_BV.shape[0], max(map(len, prompts)), 0
    while start < longest:
        T = SHORT_READ_TOKENS if B > 1 or longest - start <= SHORT_READ_TOKENS else READ_TOKENS
        T = min(T, model.config.context_length)
        tokens_BT, num_tokens_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + T]
            tokens_BT[row, : len(piece)], num_tokens_B[row] = piece, len(piece)
        cache, logits_BV = read(model, params, cache, logits_BV, tokens_BT, num_tokens_B)
        start += T
    return cache, logits_BV


def cache_capacity(config: ModelConfig, num_tokens: int) -> int:
    """Slots for a text of so many tokens: one of few sizes, each four times the one before, at most the context.

    A cache of the whole context of a model made for 100,000 tokens would take gigabytes, whatever the text.
    """
    slot_bytes = 2 * config.num_layers * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize
    capacity = max(FEWEST_SLOTS, 1 << (SMALL_CACHE_BYTES // slot_bytes).bit_length() - 1)
    while capacity < num_tokens:
        capacity *= 4
    return min(capacity, config.context_length)


def batch_capacity(num_rows: int) -> int:
    """Rows that so many are padded to: 1, 8, 32, 128 and so on, so that few sizes are ever compiled."""
    capacity = 1 if num_rows == 1 else 8
    while capacity < num_rows:
        capacity *= 4
    return capacity


def row_numbers(prompts: Sequence[np.ndarray], num_samples: int) -> np.ndarray:
    """rows_B2, what each row's random key is made of: a checksum of its prompt, and which sample of that prompt it is.

    Nothing of it depends on the other rows, but that a prompt which is there twice is drawn anew.
    """
    times_seen: dict[bytes, int] = {}
    rows = []
    for prompt in prompts:
        content = prompt.astype("<i4").tobytes()
        first = times_seen.get(content, 0)
        rows += [(zlib.crc32(content), first + sample) for sample in range(num_samples)]
        times_seen[content] = first + num_samples
    return np.array(rows, np.uint32)


def row_rngs(rng: jax.Array, rows_B2: jax.Array) -> jax.Array:
    """A random key for each row, from `row_numbers`."""

    def row_rng(row: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(rng, row[0]), row[1])

    return jax.vmap(row_rng)(rows_B2)
