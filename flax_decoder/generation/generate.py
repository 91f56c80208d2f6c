"""New tokens for prompts. The prompts are prefilled once; after that each token costs one position.

A text can outgrow the context in constant memory. With relative (rotary, ALiBi) or no positions the context rolls: each
position sees the last `context_length` positions, or the window of its layer. Learned and sinusoidal positions end with
the context: when it is full, its last half is prefilled again as a new text, and decoding continues from there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError, as_whole_number
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.speculative import Draft, PromptLookup
from flax_decoder.generation.steps import DECODE_TOKENS, TokenChunk, cache_capacity
from flax_decoder.generation.stream import Prefix, prefill_prompts, stream, supports_rolling_context
from flax_decoder.nn.arguments import as_array, check_tokens
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers

Prompts = ArrayLike | Sequence[ArrayLike | Sequence[int]]
"""Token ids: an array (B, T), or a sequence of rows that may differ in length."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        tokens: the new tokens, int32 (T,), up to and including the end token.
        ended: whether an end token was reached before max_new_tokens.
        logprobs: log-probability of each token under the model, before any setting of `Sampling`, (T,).
        top_tokens: the likeliest tokens at each step, likeliest first, (T, top_logprobs).
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
    draft: PromptLookup | Draft | None = None,
    **sampling: Any,
) -> jax.Array | list[jax.Array]:
    """Continues prompts.

    Args:
        model: the network.
        params: its parameters; for many calls pass the result of `unstack_layers`, which each call else computes.
        prompt_tokens_BT: token ids, at least one per row: an array (B, T), or rows of different lengths.
        max_new_tokens: number of tokens to add.
        rng: random key; not needed at temperature 0. A row depends on the key, its prompt and the number of the sample,
            not on the other rows; a repeated prompt counts as several samples.
        num_samples: continuations per prompt, consecutive in the result. The prompt is prefilled once.
        end_ids: tokens that end a row; it then repeats its end token. Decoding stops when all rows have ended.
        prefix: result of `prefill` for the beginning of the prompts; saves time, the result is the same.
        draft: speculative decoding, which saves time: the same tokens at temperature 0, else tokens with the same
            distribution. Not with penalties or forced tokens, nor past the context of learned or sinusoidal positions.
        **sampling: fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty and others.

    Returns:
        Prompts and new tokens, int32 (B * num_samples, T + max_new_tokens); a list of rows if they differ in length.

    Raises:
        ValueError: ids outside the vocabulary or of another kind than integers, an empty prompt, a negative number of
            tokens, no random key, params of another model, or a setting of `Sampling` out of range.
    """
    refuse_tracers("generate", (params, prompt_tokens_BT, rng, sampling))
    prompts = as_prompts(prompt_tokens_BT, model.config)
    options = {"num_samples": num_samples, "end_ids": end_ids, "prefix": prefix, "draft": draft}
    new_BC = _decode_all(model, params, prompts, max_new_tokens, rng, Sampling(**sampling), **options).tokens_BC
    new_BT = np.pad(new_BC, [(0, 0), (0, max_new_tokens - new_BC.shape[1])], mode="edge")  # shorter if all rows ended
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
    """Like `generate`, with log-probabilities, and each row cut after its end token. Other arguments: see `generate`.

    Args:
        top_logprobs: number of likeliest tokens to report at each step, of those below the `vocab_size` of `sampling`.

    Returns:
        The samples of each prompt.
    """
    refuse_tracers("complete", (params, prompt_tokens_BT, rng, sampling))
    prompts = as_prompts(prompt_tokens_BT, model.config)
    how = Sampling(**sampling)
    num_ids = min(how.vocab_size or sys.maxsize, model.config.vocab_size or 0)
    top_logprobs = as_whole_number("top_logprobs", top_logprobs, 0, num_ids)
    options = {"num_samples": num_samples, "end_ids": end_ids, "prefix": prefix, "num_top": top_logprobs}
    new = _decode_all(model, params, prompts, max_new_tokens, rng, how, **options)
    B = len(prompts) * num_samples
    rows = [_completion(jax.tree.map(lambda array, row=row: array[row], new), end_ids) for row in range(B)]
    return [rows[start : start + num_samples] for start in range(0, B, num_samples)]


def _decode_all(
    model: Decoder,
    params: Any,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    rng: jax.Array | None,
    sampling: Sampling,
    **options: Any,
) -> TokenChunk:
    """All chunks of `stream` as one."""
    chunks = stream(model, params, prompts, max_new_tokens, rng, sampling, min_chunk_tokens=DECODE_TOKENS, **options)
    B, K = len(prompts) * options["num_samples"], options.get("num_top")
    nothing = TokenChunk(np.zeros((B, 0), np.int32))
    if K is not None:
        tops = np.zeros((B, 0, K), np.int32), np.zeros((B, 0, K), np.float32)
        nothing = TokenChunk(nothing.tokens_BC, np.zeros((B, 0), np.float32), *tops)
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), nothing, *chunks)


def _completion(row: TokenChunk, end_ids: Sequence[int]) -> Completion:
    """One row, cut after its first end token."""
    is_end = np.isin(row.tokens_BC, np.asarray(end_ids, np.int32))
    length = int(is_end.argmax()) + 1 if is_end.any() else len(is_end)
    row = jax.tree.map(lambda array: array[:length], row)
    return Completion(row.tokens_BC, bool(is_end.any()), row.logprobs_BC, row.top_tokens_BCK, row.top_logprobs_BCK)


def prefill(model: Decoder, params: Any, tokens: ArrayLike | Sequence[int], *, prefix: Prefix | None = None) -> Prefix:
    """Computes keys and values of a text once, for many continuations: the `prefix` of `generate`.

    Args:
        model: the network.
        params: its parameters.
        tokens: token ids, (T,), at least one.
        prefix: an earlier result; what both texts begin with is copied from it.

    Raises:
        ValueError: ids outside the vocabulary, no tokens, or more than the context with learned or sinusoidal
            positions.
    """
    refuse_tracers("prefill", (params, tokens))
    (text,) = as_prompts([as_array(tokens, "the tokens")], model.config)
    config = model.config
    if not supports_rolling_context(config) and len(text) > config.context_length:
        raise UserError(
            f"{len(text)} tokens are more than context_length = {config.context_length}, "
            f"beyond which there are no {config.positions} positions"
        )
    cache, logits_BV = prefill_prompts(model, unstack_layers(params), [text], cache_capacity(config, len(text)), prefix)
    return Prefix(text, cache, logits_BV)


def refuse_tracers(name: str, arguments: Any) -> None:
    """Raises UserError inside of `jax.jit` and other transformations, where numbers are not known."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        raise UserError(
            f"{name} runs a compiled loop of its own: call it outside of jax.jit, jax.vmap and other transformations, "
            "with many prompts at once"
        )


def as_prompts(prompts: Prompts, config: ModelConfig) -> list[np.ndarray]:
    """Prompts as int32 rows. Raises ValueError if they are not tokens of the model's vocabulary."""
    if not isinstance(prompts, Sequence):
        prompts = np.atleast_1d(np.asarray(as_array(prompts, "the prompt")))
    rows = [np.asarray(as_array(row, "the prompt")) for row in prompts]  # in NumPy, which compiles nothing
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise UserError("the prompt must be tokens (B, T), or rows of different lengths, with at least one per row")
    return [np.asarray(check_tokens(row, config.vocab_size or 0), np.int32) for row in rows]
