"""Batched prefill and decoding, chunk by chunk."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError, as_whole_number, require_type
from flax_decoder.generation import steps
from flax_decoder.generation.sampling import Filters, Sampling, TokenCounts, as_ids, filtered
from flax_decoder.generation.speculative import Draft, PromptLookup, SpeculativeState, speculative_chunk
from flax_decoder.nn.arguments import check_key
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers
from flax_decoder.nn.positions import turns_alike

# Streamed chunks take this long: too short to be seen, and long enough that handing them over costs little.
STREAM_SECONDS = 0.03


@dataclass(frozen=True)
class Prefix:
    """A prefilled text, from `prefill`, for prompts that begin with it.

    Attributes:
        tokens: the text.
        cache: its keys and values, one row.
        logits_BV: logits of the next token, one row.
    """

    tokens: np.ndarray
    cache: KVCache
    logits_BV: jax.Array


def stream(
    model: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    rng: jax.Array | None,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    end_ids: Sequence[int] = (),
    prefix: Prefix | None = None,
    draft: PromptLookup | Draft | None = None,
    num_top: int | None = None,
    min_chunk_tokens: int = 1,
) -> Iterator[steps.TokenChunk]:
    """Like `generate`, but yields the new tokens as they are made. Other arguments: see `generate`.

    Args:
        prompts: token ids, from `as_prompts`.
        sampling: how tokens are chosen.
        num_top: if given, also give log-probabilities, and those of this many likeliest tokens; not with `draft`.
        min_chunk_tokens: size of the first chunk and least size of the others, at most DECODE_TOKENS; not for `draft`.

    Returns:
        The next tokens of all rows, as NumPy arrays, until all rows have ended.

    Raises:
        UserError: an argument is out of range; before anything is computed.
    """
    max_new_tokens = as_whole_number("max_new_tokens", max_new_tokens, 0)
    num_samples = as_whole_number("num_samples", num_samples, 1)
    require_type("prefix", prefix, Prefix | None, "from fd.prefill")
    require_type("draft", draft, PromptLookup | Draft | None)
    if rng is None and sampling.temperature > 0:
        raise UserError("sampling needs rng, such as jax.random.key(0); or temperature = 0")
    if rng is not None:
        check_key(rng)
    request = _Request(
        model=model,
        params=params,
        prompts=prompts,
        texts=[prompt for prompt in prompts for _ in range(num_samples)],
        max_length=max(map(len, prompts)) + max_new_tokens,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        rng=None if sampling.temperature == 0 else rng,
        filters=sampling.filters(model.config.vocab_size or 0),
        end_ids=as_ids("end_ids", end_ids, model.config.vocab_size or 0),
        prefix=prefix,
    )
    if draft is None:
        return _stream_plain(request, num_top, min_chunk_tokens)
    _check_draft(request, draft)
    return _stream_speculative(request, draft)


@dataclass(frozen=True)
class _Request:
    """The checked arguments of `stream`."""

    model: Decoder
    params: Any
    prompts: Sequence[np.ndarray]
    texts: list[np.ndarray]  # the prompt of each row
    max_length: int  # tokens of the longest prompt and its new text
    num_samples: int
    max_new_tokens: int
    rng: jax.Array | None
    filters: Filters
    end_ids: np.ndarray
    prefix: Prefix | None


def _stream_plain(request: _Request, num_top: int | None, min_chunk_tokens: int) -> Iterator[steps.TokenChunk]:
    """One token per pass; a full context that cannot roll is prefilled again from its last half.

    A text that outgrows the original context of `longrope` is prefilled again, as its keys are turned anew.
    """
    model, params, texts = request.model, unstack_layers(request.params), request.texts
    config, context = model.config, model.config.context_length
    num_rows, B = len(texts), steps.batch_capacity(len(texts))
    capacity = steps.cache_capacity(config, request.max_length)
    starts, has_ended, num_done = [0] * num_rows, np.zeros(num_rows, bool), 0
    decode = functools.partial(
        steps.decode_chunk,
        model,
        params,
        filters=request.filters,
        rng=request.rng,
        seeds_B2=steps.row_seeds(request.prompts, request.num_samples),
        end_ids=request.end_ids if len(request.end_ids) else None,
        num_top=num_top,
    )
    while num_done < request.max_new_tokens and not has_ended.all():
        num_tokens = request.max_new_tokens - num_done
        if not supports_rolling_context(config):
            starts = [
                start if len(text) - start <= context else len(text) - max(context // 2, 1)
                for text, start in zip(texts, starts, strict=True)
            ]
            # A full context still gives the logits of one more token, which cannot be appended.
            longest = max(len(text) - start for text, start in zip(texts, starts, strict=True))
            num_tokens = min(num_tokens, context + 1 - longest)
        elif config.rotates_by_length and config.rotary_scaling == "longrope":
            border = config.rotary_original_context + 1
            num_tokens = min([num_tokens, *(border - len(text) for text in texts if len(text) < border)])
        windows = [text[start:] for start, text in zip(starts, texts, strict=True)]
        # At first the samples of a prompt are equal, so one of them is prefilled.
        num_samples = request.num_samples if num_done == 0 else 1
        prefix = request.prefix if num_done == 0 and not any(starts) else None
        prefilled = prefill_prompts(model, params, windows[::num_samples], capacity, prefix, num_samples)
        state = steps.DecodeState(
            *prefilled,
            token_B=_padded(np.array([text[-1] for text in texts], np.int32), B),
            ended_B=_padded(has_ended, B, True),
            counts=None if request.filters.penalties is None else _counts(texts, num_done, prefilled[1].shape),
        )
        state = jax.tree.map(jnp.asarray, state)  # `device_put` refuses arrays that other processes share
        for chunk in _decode_chunks(decode, state, num_done, num_tokens, num_rows, min_chunk_tokens):
            yield chunk
            num_done += chunk.tokens_BC.shape[1]
            texts = [np.concatenate(pair) for pair in zip(texts, chunk.tokens_BC, strict=True)]
            has_ended |= np.isin(chunk.tokens_BC, request.end_ids).any(axis=1)
            if has_ended.all():
                break


def _decode_chunks(
    decode: Callable[..., tuple[steps.DecodeState, steps.TokenChunk]],
    state: steps.DecodeState,
    first_index: int,
    num_tokens: int,
    num_rows: int,
    min_chunk_tokens: int,
) -> Iterator[steps.TokenChunk]:
    """Decodes `num_tokens` in chunks; each is computed while the caller uses the one before."""
    waiting: tuple[steps.TokenChunk, int] | None = None
    index, end, size = first_index, first_index + num_tokens, min_chunk_tokens
    while index < end or waiting is not None:
        ready, waiting = waiting, None
        started = time.perf_counter()
        if index < end:
            length = min(size, end - index)
            state, chunk = decode(state=state, first_index=np.int32(index), num_tokens=np.int32(length))
            index, waiting = index + length, (chunk, length)
        if ready is not None:
            arrays = jax.tree.map(lambda array, length=ready[1]: np.asarray(array)[:num_rows, :length], ready[0])
            wanted = ready[1] * STREAM_SECONDS / (time.perf_counter() - started)
            size = int(np.clip(wanted, min_chunk_tokens, steps.DECODE_TOKENS))
            yield arrays


def _stream_speculative(request: _Request, draft: PromptLookup | Draft) -> Iterator[steps.TokenChunk]:
    """Several tokens per pass; yields as many as all rows have."""
    model, params, max_new_tokens = request.model, unstack_layers(request.params), request.max_new_tokens
    texts, num_samples = request.texts, request.num_samples

    def prefill(model: Decoder, params: Any, prefix: Prefix | None) -> tuple[KVCache, jax.Array]:
        capacity = steps.cache_capacity(model.config, request.max_length)
        return prefill_prompts(model, params, request.prompts, capacity, prefix, num_samples, draft.num_tokens)

    cache, logits_BV = prefill(model, params, request.prefix)
    draft_cache = None
    if isinstance(draft, Draft):
        draft = draft.replace(params=unstack_layers(draft.params))
        draft_cache, _ = prefill(draft.model, draft.params, None)

    lengths, num_rows, B = [*map(len, texts)], len(texts), steps.batch_capacity(len(texts))
    # A power of two, so that few lengths are ever compiled.
    text_BS = np.zeros((B, 1 << (request.max_length + draft.num_tokens).bit_length()), np.int32)
    for row, text in enumerate(texts):
        text_BS[row, : len(text)] = text
    state = SpeculativeState(
        cache=cache,
        draft_cache=draft_cache,
        logits_BV=_filtered(logits_BV, request.filters),
        text_BS=text_BS,
        is_done_B=np.arange(B) >= num_rows,
    )
    max_length_B = _padded(np.array(lengths, np.int32) + max_new_tokens, B)
    seeds_B2, num_done, all_done = steps.row_seeds(request.prompts, num_samples), 0, False
    while num_done < max_new_tokens and not all_done:
        state = speculative_chunk(
            model,
            params,
            draft,
            jax.device_put(state),
            request.filters,
            request.rng,
            seeds_B2,
            request.end_ids,
            max_length_B,
        )
        text_BS, all_done = np.asarray(state.text_BS), bool(np.asarray(state.is_done_B).all())
        rows = []
        for row, (start, end) in enumerate(zip(lengths, np.asarray(state.cache.length_B)[:num_rows], strict=True)):
            new_T = text_BS[row, start:end]
            is_end = np.isin(new_T, request.end_ids)
            if is_end.any():
                new_T = np.pad(new_T[: is_end.argmax() + 1], (0, max_new_tokens), mode="edge")
            rows.append(new_T[:max_new_tokens])
        num_ready = min(map(len, rows))
        if num_ready > num_done:
            yield steps.TokenChunk(np.stack([new_T[num_done:num_ready] for new_T in rows]))
        num_done = num_ready


_filtered = jax.jit(filtered)


def _check_draft(request: _Request, draft: PromptLookup | Draft) -> None:
    """Raises UserError if speculative decoding could not give the output of plain decoding."""
    model, filters = request.model, request.filters
    if filters.penalties is not None or filters.forced_F is not None:
        raise UserError("draft cannot be combined with penalties or forced tokens; leave one of them out")
    as_whole_number("draft.num_tokens", draft.num_tokens, 1)
    for config in (model.config, draft.model.config if isinstance(draft, Draft) else model.config):
        if not supports_rolling_context(config) and request.max_length > config.context_length:
            raise UserError(
                f"prompt and new tokens, {request.max_length}, are more than context_length = {config.context_length}; "
                f"with {config.positions} positions a draft is possible within the context only"
            )
        longest = request.max_length + draft.num_tokens  # the last pass may draft more than is wanted
        if not turns_alike(config, longest, 1):
            raise UserError(
                f"prompt, new and drafted tokens, {longest}, are more than rotary_original_context = "
                f'{config.rotary_original_context}; with rotary_scaling = "{config.rotary_scaling}" a draft is '
                "possible within it only"
            )
        if config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the draft model has vocab_size = {config.vocab_size}, the model {model.config.vocab_size}; "
                "they must be equal"
            )


def prefill_prompts(
    model: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    capacity: int,
    prefix: Prefix | None = None,
    num_samples: int = 1,
    rollback_slots: int = 0,
) -> tuple[KVCache, jax.Array]:
    """A new cache with each prompt in `num_samples` rows, and the logits of the next tokens.

    What the prompts share with the prefix is copied from it.
    """
    num_rows = steps.batch_capacity(len(prompts))
    shared = 0 if prefix is None else _shared_length(model.config, prefix, prompts)
    if prefix is None or shared == 0:
        start = steps.empty_prefill(model, num_rows, capacity, rollback_slots)
    else:
        rows = np.zeros(num_rows, np.int32)
        start = steps.copy_rows(
            model.config, prefix.cache, prefix.logits_BV, rows, np.int32(shared), capacity, rollback_slots
        )
    prefilled = steps.prefill_rows(model, params, *start, [prompt[shared:] for prompt in prompts])
    if num_samples == 1:
        return prefilled
    rows = np.repeat(np.arange(len(prompts), dtype=np.int32), num_samples)
    rows = _padded(rows, steps.batch_capacity(len(rows)))
    return steps.copy_rows(model.config, *prefilled, rows, np.int32(np.iinfo(np.int32).max), capacity, rollback_slots)


def _shared_length(config: ModelConfig, prefix: Prefix, prompts: Sequence[np.ndarray]) -> int:
    """How many tokens of the prefix all prompts begin with and can be copied from it."""
    length = len(prefix.tokens)
    for prompt in prompts:
        if not turns_alike(config, len(prefix.tokens), len(prompt)):
            return 0
        length = min(length, len(prompt))
        length = int(np.argmin(np.append(prompt[:length] == prefix.tokens[:length], False)))
    if length == len(prefix.tokens):
        return length
    # Logits are known only after the whole prefix, so at least one token must be prefilled. A cache that has outgrown
    # its slots has lost the earlier tokens, so it cannot be shortened.
    fewest_slots = min(k_BKSH.shape[2] for k_BKSH, _ in prefix.cache.layers)
    return min(length, min(map(len, prompts)) - 1) if len(prefix.tokens) <= fewest_slots else 0


def supports_rolling_context(config: ModelConfig) -> bool:
    """Whether a text can outgrow the context without prefilling again: positions are relative or absent."""
    return config.positions not in ("learned", "sinusoidal")


def _counts(texts: Sequence[np.ndarray], num_new: int, shape: tuple[int, ...]) -> TokenCounts:
    """The tokens in texts whose last `num_new` tokens are new; `shape` is (B, V)."""
    prompt_BV, new_BV = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for row, text in enumerate(texts):
        prompt_BV[row, text[: len(text) - num_new]] = True
        np.add.at(new_BV[row], text[len(text) - num_new :], 1)
    return TokenCounts(prompt_BV, new_BV)


def _padded(rows: np.ndarray, num_rows: int, value: Any = 0) -> np.ndarray:
    """Rows padded with a value."""
    return np.pad(rows, [(0, num_rows - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)
