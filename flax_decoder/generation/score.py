"""How likely a model finds given continuations: the measure of multiple-choice benchmarks."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.generation.generate import Prompts, as_prompts, refuse_tracers
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers
from flax_decoder.nn.precision import accumulation_dtype

# Rows are padded to a power of two of tokens, from this many on, so that few programs serve all lengths.
MIN_LENGTH = 16
# What the logits of a batch may take, in bytes, and the most rows of one.
LOGITS_BYTES, MAX_ROWS = 2**28, 64


def score(model: Decoder, params: Any, contexts: Prompts, continuations: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each continuation after its context, and whether greedy decoding would give it.

    Of a text longer than the model's context, the last `context_length` predictions and what they see are kept.

    Args:
        model: the network.
        params: its parameters.
        contexts: token ids, at least one per row (a start token, where there is nothing else): an array (B, T), or rows
            of different lengths.
        continuations: one per context, at least one token and at most `context_length` each.

    Returns:
        log_probs_B: sums over the tokens of each continuation, in nats, float64.
        greedy_B: whether each of its tokens is the likeliest.

    Raises:
        ValueError: ids outside the vocabulary or of another kind than integers, an empty row, another number of
            continuations than of contexts, or one that is longer than the context of the model.
    """
    refuse_tracers("score", (params, contexts, continuations))
    batches = score_batches(model, params, contexts, continuations)
    rows, log_probs, greedy = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    order = np.argsort(rows)
    return log_probs[order], greedy[order]


def score_batches(
    model: Decoder, params: Any, contexts: Prompts, continuations: Prompts
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Like `score`, a batch at a time, longest texts first.

    Yields:
        The indices of rows, their log-probabilities, and whether they are greedy.
    """
    config = model.config
    befores, afters = as_prompts(contexts, config), as_prompts(continuations, config)
    if len(befores) != len(afters):
        raise UserError(f"there are {len(befores)} contexts, but {len(afters)} continuations; give one for each")
    longest = max(map(len, afters))
    if longest > config.context_length:
        raise UserError(f"a continuation of {longest} tokens is longer than context_length = {config.context_length}")
    texts = [
        np.concatenate([before, after])[-config.context_length - 1 :]
        for before, after in zip(befores, afters, strict=True)
    ]
    params = unstack_layers(params)
    for rows, T, batch_size in _batches(
        [len(text) - 1 for text in texts], config.context_length, config.vocab_size or 1
    ):
        tokens_BT = np.zeros((batch_size, T + 1), np.int32)
        for row, index in enumerate(rows):
            tokens_BT[row, : len(texts[index])] = texts[index]
        # Padding comes after the text, where nothing that counts can see it.
        ends = [len(texts[index]) - 1 for index in rows]
        segments_BT = None
        if config.rotates_by_length:  # and there it must not lengthen the text
            segments_BT = (np.arange(T)[None] >= np.resize(ends, batch_size)[:, None]).astype(np.int32)
        all_log_probs_BT, is_likeliest_BT = jax.device_get(_log_probs(model, params, tokens_BT, segments_BT))
        scored = [(row, slice(end - len(afters[rows[row]]), end)) for row, end in enumerate(ends)]
        log_probs = np.array([all_log_probs_BT[one].sum(dtype=np.float64) for one in scored])
        yield rows, log_probs, np.array([is_likeliest_BT[one].all() for one in scored])


def _batches(lengths: list[int], max_length: int, vocab_size: int) -> Iterator[tuple[list[int], int, int]]:
    """Rows of nearly equal length: their indices, to what length they are padded, and the rows of the batch."""
    of_length = defaultdict(list)
    for index, length in enumerate(lengths):
        of_length[min(max(1 << (length - 1).bit_length(), MIN_LENGTH), max_length)].append(index)
    for T, indices in sorted(of_length.items(), reverse=True):  # what does not fit in memory fails at once
        most = min(max(LOGITS_BYTES // (4 * T * vocab_size), 1), MAX_ROWS)
        # A power of two, like the lengths.
        batch_size = min(1 << (len(indices) - 1).bit_length(), 1 << (most.bit_length() - 1))
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size], T, batch_size


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(
    model: Decoder, params: Any, tokens_BT: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each token but the first, and whether it is the likeliest, both (B, T - 1)."""
    targets_BT = tokens_BT[:, 1:]
    logits_BTV: Any = model.apply({"params": params}, tokens_BT[:, :-1], segments_BT=segments_BT)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(accumulation_dtype(logits_BTV.dtype)))
    log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return log_probs_BT, logits_BTV.argmax(axis=-1) == targets_BT
