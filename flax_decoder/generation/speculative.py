"""Speculative decoding: draft several tokens cheaply, verify them in one pass of the model.

A pass over a few tokens takes hardly longer than over one, since most of its time goes into reading the weights. The
output is that of the model alone: at temperature 0 the same tokens, otherwise tokens with the same distribution
(Leviathan et al. 2023, algorithm 1).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flax_decoder.generation.sampling import Filters, draw, filtered
from flax_decoder.generation.steps import forward, row_rngs
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.decoder import Decoder

# Most passes of the model per compiled loop; each adds at least one token.
MAX_PASSES = 8
# How many of the last tokens prompt lookup compares.
MAX_MATCH_TOKENS = 3
# A position needs up to three independent random keys.
_FOR_MODEL, _FOR_DRAFT, _FOR_TEST = 0, 1, 2


class PromptLookup(struct.PyTreeNode):
    """Drafts what followed the last tokens where they occurred before (Saxena 2023).

    Attributes:
        num_tokens: tokens drafted per pass.
    """

    num_tokens: int = struct.field(pytree_node=False, default=8)


class Draft(struct.PyTreeNode):
    """Drafts with a smaller model of the same vocabulary.

    Attributes:
        model: the smaller network.
        params: its parameters.
        num_tokens: tokens drafted per pass.
    """

    model: Decoder = struct.field(pytree_node=False)
    params: Any
    num_tokens: int = struct.field(pytree_node=False, default=4)


class SpeculativeState(struct.PyTreeNode):
    """Rows between two passes.

    Attributes:
        cache: keys and values of all tokens so far.
        draft_cache: the same for a draft model; else None.
        logits_BV: filtered logits of the next token.
        text_BS: all tokens; those from `cache.length_B` on are meaningless.
        is_done_B: True for rows that have ended or are long enough.
    """

    cache: KVCache
    draft_cache: Any
    logits_BV: jax.Array
    text_BS: Any
    is_done_B: Any


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def speculative_chunk(
    model: Decoder,
    params: Any,
    draft: PromptLookup | Draft,
    state: SpeculativeState,
    filters: Filters,
    rng: jax.Array | None,
    seeds_B2: jax.Array,
    end_ids: jax.Array,
    max_length_B: jax.Array,
) -> SpeculativeState:
    """Runs passes until all rows are done, at most MAX_PASSES."""
    num_draft = draft.num_tokens
    rngs_B = None if rng is None else row_rngs(rng, seeds_B2)

    def one_pass(carry: tuple[jax.Array, SpeculativeState]) -> tuple[jax.Array, SpeculativeState]:
        i, state = carry
        before_B = state.cache.length_B
        first_B = draw(state.logits_BV, token_rngs(rngs_B, before_B, _FOR_MODEL))
        text_BS = put(state.text_BS, first_B[:, None], before_B)
        draft_cache, draft_logits_BCV = state.draft_cache, None
        if isinstance(draft, Draft):
            draft_cache, draft_BC, draft_logits_BCV = run_draft_model(draft, draft_cache, first_B, filters, rngs_B)
        else:
            draft_BC = look_up_draft(text_BS, before_B + 1, num_draft)

        tokens_BT = jnp.concatenate([first_B[:, None], draft_BC], axis=1)
        num_tokens_B = jnp.full_like(first_B, num_draft + 1)
        if model.config.positions == "learned":
            num_tokens_B = jnp.clip(model.config.context_length - before_B, 1, num_tokens_B)
        logits_BTV, cache = forward(model, params, tokens_BT, state.cache, num_tokens_B=num_tokens_B)
        logits_BTV = jax.vmap(lambda logits_BV: filtered(logits_BV, filters), in_axes=1, out_axes=1)(logits_BTV)
        num_accepted_B, logits_BV = accept(
            logits_BTV, draft_BC, draft_logits_BCV, num_tokens_B - 1, rngs_B, before_B + 1
        )

        length_B = jnp.where(state.is_done_B, before_B, before_B + 1 + num_accepted_B)
        is_new_BT = jnp.arange(num_draft + 1)[None] <= num_accepted_B[:, None]
        ends_B = ((tokens_BT[:, :, None] == end_ids[None, None]).any(-1) & is_new_BT).any(-1)
        return i + 1, SpeculativeState(
            cache=cache.replace(length_B=length_B),
            draft_cache=None if draft_cache is None else draft_cache.replace(length_B=length_B),
            logits_BV=jnp.where(state.is_done_B[:, None], state.logits_BV, logits_BV),
            text_BS=put(text_BS, draft_BC, before_B + 1),
            is_done_B=state.is_done_B | ends_B | (length_B >= max_length_B),
        )

    def is_unfinished(carry: tuple[jax.Array, SpeculativeState]) -> jax.Array:
        i, state = carry
        return (i < MAX_PASSES) & ~state.is_done_B.all()

    return jax.lax.while_loop(is_unfinished, one_pass, (jnp.int32(0), state))[1]


def accept(
    logits_BTV: jax.Array,
    draft_BC: jax.Array,
    draft_logits_BCV: jax.Array | None,
    num_draft_B: jax.Array,
    rngs_B: jax.Array | None,
    position_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How many drafted tokens are accepted, and the logits of the token after them.

    A drafted token x is accepted with probability min(1, p(x) / q(x)), up to the first rejection. In its place comes a
    token from max(0, p - q), normalised. Every token then has the distribution p, whatever q is.

    Args:
        logits_BTV: filtered logits of the model, p, of each drafted token and of the token after the last.
        draft_BC: the drafted tokens, C = T - 1.
        draft_logits_BCV: the logits that they were drawn from, q; None if each was certain.
        num_draft_B: how many of them count.
        rngs_B: random keys; None is greedy: a token is accepted if it is the likeliest.
        position_B: position of the first drafted token.

    Returns:
        num_accepted_B; logits_BV.
    """
    num_draft = draft_BC.shape[1]
    counts_BC = jnp.arange(num_draft)[None] < num_draft_B[:, None]
    if rngs_B is None:
        is_accepted_BC = counts_BC & (logits_BTV[:, :-1].argmax(-1) == draft_BC)
        num_accepted_B = jnp.cumprod(is_accepted_BC, axis=1).sum(1, dtype=jnp.int32)
        return num_accepted_B, take(logits_BTV, num_accepted_B)

    p_BTV = jax.nn.softmax(logits_BTV, axis=-1)
    if draft_logits_BCV is None:
        q_BCV = jax.nn.one_hot(draft_BC, logits_BTV.shape[-1], dtype=p_BTV.dtype)
    else:
        q_BCV = jax.nn.softmax(draft_logits_BCV, axis=-1)
    p_of_draft_BC, q_of_draft_BC = (
        jnp.take_along_axis(array, draft_BC[:, :, None], axis=2)[:, :, 0] for array in (p_BTV[:, :-1], q_BCV)
    )
    offsets = jnp.arange(num_draft)
    rngs_BC = jax.vmap(lambda offset: token_rngs(rngs_B, position_B + offset, _FOR_TEST), out_axes=1)(offsets)
    uniform_BC = jax.vmap(jax.vmap(lambda rng: jax.random.uniform(rng, dtype=p_BTV.dtype)))(rngs_BC)
    is_accepted_BC = counts_BC & (uniform_BC * q_of_draft_BC < p_of_draft_BC)
    num_accepted_B = jnp.cumprod(is_accepted_BC, axis=1).sum(1, dtype=jnp.int32)

    # After the last drafted token that counts there was no rejection, so q = 0 and the next token comes from p.
    q_BCV = jnp.where(counts_BC[:, :, None], q_BCV, 0)
    q_BTV = jnp.concatenate([q_BCV, jnp.zeros_like(q_BCV[:, :1])], axis=1)
    p_BV, q_BV = take(p_BTV, num_accepted_B), take(q_BTV, num_accepted_B)
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Where p = q a rejection is only possible by rounding.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    return num_accepted_B, jnp.log(rest_BV)


def look_up_draft(text_BS: jax.Array, length_B: jax.Array, num_draft: int) -> jax.Array:
    """draft_BC: what followed the last tokens where they occurred before; the longest match, then the latest.

    If the continuation reaches the end of the text, it repeats from where it began.
    """
    S = text_BS.shape[1]

    def look_up(text_S: jax.Array, length: jax.Array) -> jax.Array:
        back = jnp.arange(1, MAX_MATCH_TOKENS + 1)
        positions = jnp.arange(S)
        matches = text_S[jnp.maximum(positions[:, None] - back[None], 0)] == text_S[jnp.maximum(length - back, 0)][None]
        matches &= positions[:, None] >= back[None]
        num_matching = jnp.cumprod(matches, axis=1).sum(1)
        is_before = (positions >= 1) & (positions < length)
        start = jnp.argmax(jnp.where(is_before, num_matching * S + positions, -1))
        return text_S[start + jnp.arange(num_draft) % jnp.maximum(length - start, 1)]

    return jax.vmap(look_up)(text_BS, length_B)


def run_draft_model(
    draft: Draft, cache: KVCache, first_B: jax.Array, filters: Filters, rngs_B: jax.Array | None
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Drafts tokens after first_B.

    Returns:
        The cache with all of these tokens; draft_BC; the filtered logits that they were drawn from, draft_logits_BCV.
    """
    tokens, logits, token_B = [], [], first_B
    for _ in range(draft.num_tokens + 1):
        logits_B1V, cache = forward(draft.model, draft.params, token_B[:, None], cache)
        logits_BV = filtered(logits_B1V[:, 0], filters)
        token_B = draw(logits_BV, token_rngs(rngs_B, cache.length_B, _FOR_DRAFT))
        tokens.append(token_B)
        logits.append(logits_BV)
    # The last pass only appends the last drafted token to the cache; the token that it gives is dropped.
    return cache, jnp.stack(tokens[:-1], axis=1), jnp.stack(logits[:-1], axis=1)


def token_rngs(rngs_B: jax.Array | None, position_B: jax.Array, purpose: int) -> Any:
    """A random key per row, for the token at a position; None without keys."""
    if rngs_B is None:
        return None
    rngs_B = jax.vmap(jax.random.fold_in)(rngs_B, position_B)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(rngs_B, purpose)


def put(text_BS: jax.Array, tokens_BT: jax.Array, start_B: jax.Array) -> jax.Array:
    """Texts with tokens written from a position on."""
    rows = jnp.arange(text_BS.shape[0])[:, None]
    return text_BS.at[rows, start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]].set(tokens_BT, mode="drop")


def take(array_BTV: jax.Array, index_B: jax.Array) -> jax.Array:
    """array_BTV[b, index_B[b]] of each row."""
    return jnp.take_along_axis(array_BTV, index_B[:, None, None], axis=1)[:, 0]
