"""New tokens, one after the other: the prompts are read once, then each token costs one position.

Past the context, a text goes on in memory that does not grow. Where positions are relative (rotary, ALiBi) or absent,
the context rolls: each position sees the last `context_length` positions, and no more than its window where a layer has
one. Where they are learned or sinusoidal there is nothing beyond the context: when it is full, the last half of it is
read again as a text of its own, and writing goes on from there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import Sampling, Seen, filtered
from flax_decoder.generation.speculative import Draft, Guessed, PromptLookup, write_guessed
from flax_decoder.generation.steps import (
    WRITE_TOKENS,
    Texts,
    Written,
    batch_capacity,
    cache_capacity,
    nothing_read,
    read_all,
    row_numbers,
    spread,
    write,
)
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.decoder import Decoder, check_tokens, unstack_layers

Prompts = ArrayLike | Sequence[ArrayLike]
"""Token ids: an array (B, T), or a sequence of sequences that may differ in length."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        tokens: the new tokens, int32 (T,), up to and with the token that ended it.
        ended: whether a token ended it, not max_new_tokens.
        logprobs: the model's log-probability of each token, before any setting of `Sampling`, (T,).
        top_tokens: the likeliest tokens in each place, likeliest first, (T, top_logprobs).
        top_logprobs: their log-probabilities.
    """

    tokens: np.ndarray
    ended: bool
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """A text that was read, from `prefill`; texts that begin with it need not read it again.

    Attributes:
        tokens: the text.
        cache: its keys and values, one row.
        logits_BV: of the token behind it, one row.
    """

    tokens: np.ndarray
    cache: KVCache
    logits_BV: jax.Array


def generate(
    model: Decoder,
    params: Any,
    prompt_tokens_BT: Prompts,
    max_new_tokens: int,
    rng: jax.Array | None = None,
    *,
    num_samples: int = 1,
    end_ids: Sequence[int] = (),
    prefix: Prefix | None = None,
    guess: PromptLookup | Draft | None = None,
    **sampling: Any,
) -> jax.Array | list[jax.Array]:
    """Continues prompts.

    Args:
        model: the network.
        params: its parameters; from `unstack_layers` where many calls are made, which then need not do it.
        prompt_tokens_BT: token ids, at least one a row: an array (B, T), or sequences of different lengths.
        max_new_tokens: how many to add.
        rng: random key. A row's tokens are a function of it, the row's prompt and the number of the sample, whatever
            else is in the batch; a prompt that is there twice counts as two samples. Not needed at temperature 0.
        num_samples: continuations of each prompt, which is read once; they stand beside each other in the result.
        end_ids: tokens that end a row; what stands behind one is that token repeated. When all rows have ended no more
            is computed.
        prefix: what `prefill` gave for the beginning of the prompts; changes nothing but the time.
        guess: speculative decoding, which gives the same tokens at temperature 0, and else tokens with the same
            distribution. Not with penalties or forced tokens, nor past the context of learned or sinusoidal positions.
        **sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty and others.

    Returns:
        The prompts with the new tokens behind them, int32 (B * num_samples, T + max_new_tokens); a list of such rows
        where the prompts differ in length.

    Raises:
        ValueError: ids outside of the vocabulary, an empty prompt, a negative number of tokens, or a setting of
            `Sampling` out of range.
    """
    prompts = as_prompts(prompt_tokens_BT, model.config)
    settings = Sampling(**sampling)
    new_BT = np.zeros((len(prompts) * num_samples, max(max_new_tokens, 0)), np.int32)
    made = 0
    for written in stream(
        model,
        params,
        prompts,
        max_new_tokens,
        rng,
        settings,
        num_samples=num_samples,
        end_ids=end_ids,
        prefix=prefix,
        guess=guess,
    ):
        new_BT[:, made : made + written.tokens_BC.shape[1]] = written.tokens_BC
        made += written.tokens_BC.shape[1]
    if 0 < made < max_new_tokens:  # all rows have ended
        new_BT[:, made:] = new_BT[:, made - 1 : made]
    texts = [np.concatenate([prompts[row // num_samples], new_T]) for row, new_T in enumerate(new_BT)]
    return jnp.asarray(np.stack(texts)) if len({len(text) for text in texts}) == 1 else [*map(jnp.asarray, texts)]


def complete(
    model: Decoder,
    params: Any,
    prompt_tokens_BT: Prompts,
    max_new_tokens: int,
    rng: jax.Array | None = None,
    *,
    num_samples: int = 1,
    end_ids: Sequence[int] = (),
    prefix: Prefix | None = None,
    top_logprobs: int = 0,
    **sampling: Any,
) -> list[list[Completion]]:
    """As `generate`, with log-probabilities, each row cut where it ended.

    Args:
        model: see `generate`, as for all arguments that are not here.
        params: see there.
        prompt_tokens_BT: see there.
        max_new_tokens: see there.
        rng: see there.
        num_samples: see there.
        end_ids: see there.
        prefix: see there.
        top_logprobs: how many of the likeliest tokens in each place are reported.
        **sampling: see there.

    Returns:
        For each prompt a list of its samples.
    """
    prompts = as_prompts(prompt_tokens_BT, model.config)
    if not 0 <= top_logprobs <= (model.config.vocab_size or 0):
        raise UserError(f"top_logprobs = {top_logprobs} must be from 0 to the vocabulary, {model.config.vocab_size}")
    chunks = stream(
        model,
        params,
        prompts,
        max_new_tokens,
        rng,
        Sampling(**sampling),
        num_samples=num_samples,
        end_ids=end_ids,
        prefix=prefix,
        num_top=top_logprobs,
    )
    B = len(prompts) * num_samples
    nothing = Written(
        np.zeros((B, 0), np.int32),
        np.zeros((B, 0), np.float32),
        np.zeros((B, 0, top_logprobs), np.int32),
        np.zeros((B, 0, top_logprobs), np.float32),
    )
    written = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), nothing, *chunks)
    rows = [_completion(jax.tree.map(lambda array, row=row: array[row], written), end_ids) for row in range(B)]
    return [rows[start : start + num_samples] for start in range(0, B, num_samples)]


def _completion(row: Written, end_ids: Sequence[int]) -> Completion:
    """One row, cut behind its first end token."""
    is_end = np.isin(row.tokens_BC, np.asarray(end_ids, np.int32))
    length = int(is_end.argmax()) + 1 if is_end.any() else len(is_end)
    own = jax.tree.map(lambda array: array[:length], row)
    return Completion(own.tokens_BC, bool(is_end.any()), own.logprobs_BC, own.top_tokens_BCK, own.top_logprobs_BCK)


def prefill(model: Decoder, params: Any, tokens: ArrayLike, *, prefix: Prefix | None = None) -> Prefix:
    """Reads a text once, for many continuations: pass the result to `generate` as `prefix`.

    Args:
        model: the network.
        params: its parameters.
        tokens: token ids, (T,), at least one.
        prefix: an earlier result; as far as the texts begin alike, it is not read again.

    Raises:
        ValueError: ids outside of the vocabulary, no tokens, or more than the context where positions are learned or
            sinusoidal.
    """
    (text,) = as_prompts(np.asarray(tokens)[None], model.config)
    config = model.config
    if not rolls(config) and len(text) > config.context_length:
        raise UserError(
            f"{len(text)} tokens are more than context_length = {config.context_length}, "
            f"beyond which there are no {config.positions} positions"
        )
    cache, logits_BV = _read(model, unstack_layers(params), [text], cache_capacity(config, len(text)), prefix)
    return Prefix(text, cache, logits_BV)


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
    guess: PromptLookup | Draft | None = None,
    num_top: int | None = None,
) -> Iterator[Written]:
    """As `generate`, but yields the new tokens as they are made; raises before the first of them.

    Args:
        model: see `generate`, as for all arguments that are not here.
        params: see there.
        prompts: token ids, from `as_prompts`.
        max_new_tokens: see there.
        rng: see there.
        sampling: how tokens are chosen.
        num_samples: see there.
        end_ids: see there.
        prefix: see there.
        guess: see there.
        num_top: give log-probabilities, and those of so many of the likeliest tokens; not with `guess`.

    Yields:
        NumPy arrays with the next tokens of every row; none any more when all rows have ended.
    """
    config = model.config
    if max_new_tokens < 0 or num_samples < 1:
        raise UserError(
            f"max_new_tokens = {max_new_tokens} must be at least 0, and num_samples = {num_samples} at least 1"
        )
    if rng is None and sampling.temperature > 0:
        raise UserError("sampling needs rng, such as jax.random.key(0); or temperature = 0")
    filters = sampling.filters(config.vocab_size or 0)
    params = unstack_layers(params)
    num_rows = len(prompts) * num_samples
    rows_B2 = _padded(row_numbers(prompts, num_samples), batch_capacity(num_rows))
    ends = np.asarray(end_ids, np.int32)
    capacity = cache_capacity(config, max(map(len, prompts)) + max_new_tokens)
    if guess is not None:
        rng = None if sampling.temperature == 0 else rng
        yield from _stream_guessed(
            model, params, prompts, max_new_tokens, rng, sampling, num_samples, ends, prefix, guess, rows_B2
        )
        return

    texts = [prompt for prompt in prompts for _ in range(num_samples)]
    starts, has_ended, made = [0] * num_rows, np.zeros(num_rows, bool), 0
    while made < max_new_tokens and not has_ended.all():
        count = max_new_tokens - made
        if not rolls(config):
            starts = [
                _start(start, len(text), config.context_length) for start, text in zip(starts, texts, strict=True)
            ]
            # The token behind a full context can still be drawn, only not be read.
            longest = max(len(text) - start for start, text in zip(starts, texts, strict=True))
            count = min(count, config.context_length + 1 - longest)
        windows = [text[start:] for start, text in zip(starts, texts, strict=True)]
        if made == 0:
            usable = None if any(starts) else prefix
            cache, logits_BV = _read(model, params, windows[::num_samples], capacity, usable, num_samples)
        else:
            cache, logits_BV = _read(model, params, windows, capacity)
        state = Texts(
            cache=cache,
            logits_BV=logits_BV,
            token_B=_padded(np.array([text[-1] for text in texts], np.int32), len(rows_B2)),
            ended_B=_padded(has_ended, len(rows_B2), True),
            seen=_seen(texts, made, logits_BV.shape) if sampling.looks_back else None,
        )
        run = functools.partial(
            write, model, params, filters=filters, rng=rng, rows_B2=rows_B2, end_ids=ends if len(ends) else None
        )
        for written in _write(run, jax.device_put(state), made, count, num_rows, num_top):
            yield written
            made += written.tokens_BC.shape[1]
            texts = [np.concatenate(pair) for pair in zip(texts, written.tokens_BC, strict=True)]
            has_ended |= np.isin(written.tokens_BC, ends).any(axis=1)
            if has_ended.all():
                break


def _stream_guessed(
    model: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    rng: jax.Array | None,
    sampling: Sampling,
    num_samples: int,
    ends: np.ndarray,
    prefix: Prefix | None,
    guess: PromptLookup | Draft,
    rows_B2: np.ndarray,
) -> Iterator[Written]:
    """`stream` with speculative decoding: tokens come when all rows have them."""
    draft = guess if isinstance(guess, Draft) else None
    longest, filters = max(map(len, prompts)) + max_new_tokens, sampling.filters(model.config.vocab_size or 0)
    _check_guess(model, sampling, guess, longest)
    read = functools.partial(_read, prompts=prompts, num_samples=num_samples, num_spare=guess.num_tokens)
    cache, logits_BV = read(model, params, capacity=cache_capacity(model.config, longest), prefix=prefix)
    draft_cache, draft_params = None, None
    if draft is not None:
        draft_params = unstack_layers(draft.params)
        draft_cache, _ = read(draft.model, draft_params, capacity=cache_capacity(draft.model.config, longest))

    B, num_rows = len(rows_B2), len(prompts) * num_samples
    lengths = [len(prompt) for prompt in prompts for _ in range(num_samples)]
    text_BS = np.zeros((B, cache_capacity(model.config, longest) + longest + guess.num_tokens + 1), np.int32)
    for row, length in enumerate(lengths):
        text_BS[row, :length] = prompts[row // num_samples]
    state = Guessed(
        cache=cache,
        draft_cache=draft_cache,
        logits_BV=_filtered(logits_BV, filters),
        text_BS=text_BS,
        is_done_B=np.arange(B) >= num_rows,
    )
    end_B = _padded(np.array(lengths, np.int32) + max_new_tokens, B)
    made = 0
    while made < max_new_tokens:
        state = write_guessed(
            model,
            params,
            draft and draft.model,
            draft_params,
            jax.device_put(state),
            filters,
            rng,
            rows_B2,
            ends,
            end_B,
            guess.num_tokens,
        )
        text_BS, is_done_B = np.asarray(state.text_BS), np.asarray(state.is_done_B)
        rows = []
        for row, (length, total) in enumerate(zip(lengths, np.asarray(state.cache.length_B)[:num_rows], strict=True)):
            new_T = text_BS[row, length : min(total, length + max_new_tokens)]
            is_end = np.isin(new_T, ends)
            if is_end.any():
                new_T = np.pad(new_T[: is_end.argmax() + 1], (0, max_new_tokens), mode="edge")
            rows.append(new_T[:max_new_tokens])
        ready = min(map(len, rows))
        if ready > made:
            yield Written(np.stack([new_T[made:ready] for new_T in rows]))
        made = ready
        if is_done_B.all():
            return


_filtered = jax.jit(filtered)


def _check_guess(model: Decoder, sampling: Sampling, guess: PromptLookup | Draft, longest: int) -> None:
    """Raises UserError where speculative decoding cannot give what plain decoding would."""
    if sampling.looks_back or sampling.forced_tokens:
        raise UserError("guessed tokens do not go with penalties or forced tokens; leave one of them out")
    if guess.num_tokens < 1:
        raise UserError(f"num_tokens = {guess.num_tokens}: at least one token must be guessed at a time")
    for config in (model.config, guess.model.config if isinstance(guess, Draft) else model.config):
        if not rolls(config) and longest > config.context_length:
            raise UserError(
                f"prompt and new tokens, {longest}, are more than context_length = {config.context_length}; "
                f"with {config.positions} positions tokens can be guessed within the context only"
            )
        if config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the draft model has vocab_size = {config.vocab_size}, the model {model.config.vocab_size}; "
                "they must be equal"
            )


def _write(
    run: Callable[..., tuple[Texts, Written]], state: Texts, made: int, count: int, num_rows: int, num_top: int | None
) -> Iterator[Written]:
    """Writes `count` tokens in pieces; while one is looked at, the next is already computed."""
    waiting: tuple[Written, int] | None = None
    end = made + count
    while made < end or waiting is not None:
        ready, waiting = waiting, None
        if made < end:
            # The first token comes alone: someone may be waiting for it.
            piece = min(WRITE_TOKENS if made > 0 else 1, end - made)
            state, written = run(texts=state, number=np.int32(made), count=np.int32(piece), num_top=num_top)
            made, waiting = made + piece, (written, piece)
        if ready is not None:
            yield jax.tree.map(lambda array, length=ready[1]: np.asarray(array)[:num_rows, :length], ready[0])


def _read(
    model: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    capacity: int,
    prefix: Prefix | None = None,
    num_samples: int = 1,
    num_spare: int = 0,
) -> tuple[KVCache, jax.Array]:
    """Reads prompts into a new cache that has each of them `num_samples` times; what the prefix has is not read."""
    B = batch_capacity(len(prompts))
    shared = 0 if prefix is None else _shared_length(prefix, prompts)
    if prefix is None or shared == 0:
        cache, logits_BV = nothing_read(model, B, capacity, num_spare)
    else:
        rows = np.zeros(B, np.int32)
        cache, logits_BV = spread(
            model.config, prefix.cache, prefix.logits_BV, rows, np.int32(shared), capacity, num_spare
        )
    cache, logits_BV = read_all(model, params, cache, logits_BV, [prompt[shared:] for prompt in prompts])
    if num_samples > 1:
        rows = np.repeat(np.arange(len(prompts), dtype=np.int32), num_samples)
        rows = _padded(rows, batch_capacity(len(rows)))
        cache, logits_BV = spread(model.config, cache, logits_BV, rows, np.iinfo(np.int32).max, capacity, num_spare)
    return cache, logits_BV


def _shared_length(prefix: Prefix, prompts: Sequence[np.ndarray]) -> int:
    """How many tokens of a prefix all prompts begin with and can take from it."""
    length = len(prefix.tokens)
    for prompt in prompts:
        differs = np.flatnonzero(prompt[:length] != prefix.tokens[: len(prompt)])
        length = min(int(differs[0]) if len(differs) > 0 else len(prompt), length)
    if length == len(prefix.tokens):
        return length
    # Logits behind a part of the prefix are not there, so one token has to be read; and only a cache that has written
    # nothing over can forget.
    fewest_slots = min(k_BKSH.shape[2] for k_BKSH, _ in prefix.cache.layers)
    return min(length, min(map(len, prompts)) - 1) if len(prefix.tokens) <= fewest_slots else 0


def rolls(config: ModelConfig) -> bool:
    """Whether a text may outgrow the context without being cut."""
    return config.positions not in ("learned", "sinusoidal")


def _start(start: int, length: int, context_length: int) -> int:
    """Where the part of a text begins that is in the context, given where it began before."""
    return start if length - start <= context_length else length - max(context_length // 2, 1)


def as_prompts(prompts: Prompts, config: ModelConfig) -> list[np.ndarray]:
    """Prompts as int32 rows. Raises ValueError where they are no tokens of the model's vocabulary."""
    rows = [np.asarray(row) for row in prompts] if isinstance(prompts, Sequence) else list(np.asarray(prompts))
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise UserError("the prompt must be tokens (B, T), or rows of different lengths, with at least one a row")
    for row in rows:
        check_tokens(row, config.vocab_size or 0)
    return [row.astype(np.int32) for row in rows]


def _seen(texts: Sequence[np.ndarray], made: int, shape: tuple[int, ...]) -> Seen:
    """What is in texts whose last `made` tokens are new."""
    prompt_BV, count_BV = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for row, text in enumerate(texts):
        prompt_BV[row, text[: len(text) - made]] = True
        np.add.at(count_BV[row], text[len(text) - made :], 1)
    return Seen(prompt_BV, count_BV)


def _padded(rows: np.ndarray, num_rows: int, value: Any = 0) -> np.ndarray:
    """More rows, of one value."""
    return np.pad(rows, [(0, num_rows - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)
