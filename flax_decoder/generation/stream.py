"""Reading prompts and writing on, piece by piece, for a batch of any size."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import Filters, Sampling, Seen, filtered
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
from flax_decoder.nn.decoder import Decoder, unstack_layers

# Who reads along gets as many tokens at a time as are made in this: the eye sees no steps in it, and handing them over
# costs little beside making them.
STREAM_SECONDS = 0.03


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
    first_piece: int = 1,
) -> Iterator[Written]:
    """As `generate`, but gives the new tokens as they are made; what is wrong is raised at once.

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
        first_piece: how many tokens come first, at most WRITE_TOKENS; pieces then have as many as are quickly made, and
            no fewer. With `guess` the guesses decide.
        num_top: give log-probabilities, and those of so many of the likeliest tokens; not with `guess`.

    Returns:
        NumPy arrays with the next tokens of every row, as they are made; none any more when all rows have ended.
    """
    if max_new_tokens < 0 or num_samples < 1:
        raise UserError(
            f"max_new_tokens = {max_new_tokens} must be at least 0, and num_samples = {num_samples} at least 1"
        )
    if rng is None and sampling.temperature > 0:
        raise UserError("sampling needs rng, such as jax.random.key(0); or temperature = 0")
    num_rows = len(prompts) * num_samples
    task = _Task(
        model=model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        rng=None if sampling.temperature == 0 else rng,
        sampling=sampling,
        filters=sampling.filters(model.config.vocab_size or 0),
        num_samples=num_samples,
        ends=np.asarray(end_ids, np.int32),
        prefix=prefix,
        rows_B2=_padded(row_numbers(prompts, num_samples), batch_capacity(num_rows)),
        longest=max(map(len, prompts)) + max_new_tokens,
        first_piece=first_piece,
    )
    if guess is None:
        return _stream_plain(task, params, num_top)
    _check_guess(task, guess)
    return _stream_guessed(task, params, guess)


@dataclass(frozen=True)
class _Task:
    """The arguments of `stream`, checked, and what follows from them."""

    model: Decoder
    prompts: Sequence[np.ndarray]
    max_new_tokens: int
    rng: jax.Array | None
    sampling: Sampling
    filters: Filters
    num_samples: int
    ends: np.ndarray
    prefix: Prefix | None
    rows_B2: np.ndarray
    longest: int
    first_piece: int

    @property
    def texts(self) -> list[np.ndarray]:
        """The prompt of each row."""
        return [prompt for prompt in self.prompts for _ in range(self.num_samples)]


def _stream_plain(task: _Task, params: Any, num_top: int | None) -> Iterator[Written]:
    """Token by token; a context that does not roll is read again when it is full."""
    config, params, texts = task.model.config, unstack_layers(params), task.texts
    num_rows, B = len(texts), len(task.rows_B2)
    capacity = cache_capacity(config, task.longest)
    starts, has_ended, made = [0] * num_rows, np.zeros(num_rows, bool), 0
    run = functools.partial(
        write,
        task.model,
        params,
        filters=task.filters,
        rng=task.rng,
        rows_B2=task.rows_B2,
        end_ids=task.ends if len(task.ends) else None,
        num_top=num_top,
    )
    while made < task.max_new_tokens and not has_ended.all():
        count = task.max_new_tokens - made
        if not rolls(config):
            starts = [_start(*pair, config.context_length) for pair in zip(starts, map(len, texts), strict=True)]
            # The token behind a full context can still be drawn, only not be read.
            longest = max(len(text) - start for text, start in zip(texts, starts, strict=True))
            count = min(count, config.context_length + 1 - longest)
        windows = [text[start:] for start, text in zip(starts, texts, strict=True)]
        if made == 0:
            prefix = None if any(starts) else task.prefix
            read = read_prompts(task.model, params, windows[:: task.num_samples], capacity, prefix, task.num_samples)
        else:
            read = read_prompts(task.model, params, windows, capacity)
        state = Texts(
            *read,
            token_B=_padded(np.array([text[-1] for text in texts], np.int32), B),
            ended_B=_padded(has_ended, B, True),
            seen=_seen(texts, made, read[1].shape) if task.sampling.looks_back else None,
        )
        for written in _write_pieces(run, jax.device_put(state), made, count, num_rows, task.first_piece):
            yield written
            made += written.tokens_BC.shape[1]
            texts = [np.concatenate(pair) for pair in zip(texts, written.tokens_BC, strict=True)]
            has_ended |= np.isin(written.tokens_BC, task.ends).any(axis=1)
            if has_ended.all():
                break


def _write_pieces(
    run: Callable[..., tuple[Texts, Written]], state: Texts, made: int, count: int, num_rows: int, first_piece: int
) -> Iterator[Written]:
    """Writes `count` tokens in pieces; while one is looked at, the next is already computed."""
    waiting: tuple[Written, int] | None = None
    end, size = made + count, first_piece
    while made < end or waiting is not None:
        ready, waiting = waiting, None
        started = time.perf_counter()
        if made < end:
            piece = min(size, end - made)
            state, written = run(texts=state, number=np.int32(made), count=np.int32(piece))
            made, waiting = made + piece, (written, piece)
        if ready is not None:
            arrays = jax.tree.map(lambda array, length=ready[1]: np.asarray(array)[:num_rows, :length], ready[0])
            wanted = ready[1] * STREAM_SECONDS / (time.perf_counter() - started)
            size = int(np.clip(wanted, first_piece, WRITE_TOKENS))
            yield arrays


def _stream_guessed(task: _Task, params: Any, guess: PromptLookup | Draft) -> Iterator[Written]:
    """Tokens come when all rows have them."""
    model, params, draft = task.model, unstack_layers(params), guess if isinstance(guess, Draft) else None
    read = functools.partial(
        read_prompts, prompts=task.prompts, num_samples=task.num_samples, rollback_slots=guess.num_tokens
    )
    cache, logits_BV = read(model, params, capacity=cache_capacity(model.config, task.longest), prefix=task.prefix)
    draft_cache, draft_params = None, None
    if draft is not None:
        draft_params = unstack_layers(draft.params)
        draft_cache, _ = read(draft.model, draft_params, capacity=cache_capacity(draft.model.config, task.longest))

    texts, B = task.texts, len(task.rows_B2)
    lengths, num_rows = [*map(len, texts)], len(texts)
    # A power of two, so that few lengths are ever compiled.
    text_BS = np.zeros((B, 1 << (task.longest + guess.num_tokens).bit_length()), np.int32)
    for row, text in enumerate(texts):
        text_BS[row, : len(text)] = text
    state = Guessed(
        cache=cache,
        draft_cache=draft_cache,
        logits_BV=_filtered(logits_BV, task.filters),
        text_BS=text_BS,
        is_done_B=np.arange(B) >= num_rows,
    )
    end_B = _padded(np.array(lengths, np.int32) + task.max_new_tokens, B)
    made = 0
    while made < task.max_new_tokens:
        state = write_guessed(
            model,
            params,
            draft and draft.model,
            draft_params,
            jax.device_put(state),
            task.filters,
            task.rng,
            task.rows_B2,
            task.ends,
            end_B,
            guess.num_tokens,
        )
        text_BS, is_done_B = np.asarray(state.text_BS), np.asarray(state.is_done_B)
        rows = []
        for row, (length, total) in enumerate(zip(lengths, np.asarray(state.cache.length_B)[:num_rows], strict=True)):
            new_T = text_BS[row, length : min(total, length + task.max_new_tokens)]
            is_end = np.isin(new_T, task.ends)
            if is_end.any():
                new_T = np.pad(new_T[: is_end.argmax() + 1], (0, task.max_new_tokens), mode="edge")
            rows.append(new_T[: task.max_new_tokens])
        ready = min(map(len, rows))
        if ready > made:
            yield Written(np.stack([new_T[made:ready] for new_T in rows]))
        made = ready
        if is_done_B.all():
            return


_filtered = jax.jit(filtered)


def _check_guess(task: _Task, guess: PromptLookup | Draft) -> None:
    """Raises UserError where speculative decoding cannot give what plain decoding would."""
    model, sampling, longest = task.model, task.sampling, task.longest
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


def read_prompts(
    model: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    capacity: int,
    prefix: Prefix | None = None,
    num_samples: int = 1,
    rollback_slots: int = 0,
) -> tuple[KVCache, jax.Array]:
    """Reads prompts into a new cache that has each of them `num_samples` times; what the prefix has is not read."""
    num_rows = batch_capacity(len(prompts))
    shared = 0 if prefix is None else _shared_length(prefix, prompts)
    if prefix is None or shared == 0:
        read = nothing_read(model, num_rows, capacity, rollback_slots)
    else:
        rows = np.zeros(num_rows, np.int32)
        read = spread(model.config, prefix.cache, prefix.logits_BV, rows, np.int32(shared), capacity, rollback_slots)
    read = read_all(model, params, *read, [prompt[shared:] for prompt in prompts])
    if num_samples > 1:
        rows = np.repeat(np.arange(len(prompts), dtype=np.int32), num_samples)
        rows = _padded(rows, batch_capacity(len(rows)))
        read = spread(model.config, *read, rows, np.int32(np.iinfo(np.int32).max), capacity, rollback_slots)
    return read


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
