"""New tokens, one after the other: the prompts are read once, then each token costs one position.

Past the context, a text goes on in memory that does not grow. Where positions are relative (rotary, ALiBi) or absent,
the context rolls: each position sees the last `context_length` positions, and no more than its window where a layer has
one. Where they are learned or sinusoidal there is nothing beyond the context: when it is full, the last half of it is
read again as a text of its own, and writing goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.speculative import Draft, PromptLookup
from flax_decoder.generation.steps import WRITE_TOKENS, Written, cache_capacity
from flax_decoder.generation.stream import Prefix, read_prompts, rolls, stream
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
        first_piece=WRITE_TOKENS,
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
        first_piece=WRITE_TOKENS,
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
    cache, logits_BV = read_prompts(model, unstack_layers(params), [text], cache_capacity(config, len(text)), prefix)
    return Prefix(text, cache, logits_BV)


def as_prompts(prompts: Prompts, config: ModelConfig) -> list[np.ndarray]:
    """Prompts as int32 rows. Raises ValueError where they are no tokens of the model's vocabulary."""
    rows = [np.asarray(row) for row in prompts] if isinstance(prompts, Sequence) else list(np.asarray(prompts))
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise UserError("the prompt must be tokens (B, T), or rows of different lengths, with at least one a row")
    for row in rows:
        check_tokens(row[None], config.vocab_size or 0)
    return [row.astype(np.int32) for row in rows]
