"""How well a model predicts a text that it was not trained on."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.data.batches import validation_batches
from flax_decoder.data.long_array import Shards
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.batch import Batch, without_borders
from flax_decoder.training.metrics import bits_per_byte
from flax_decoder.training.step import Metrics, loss_sum

# The exponential of a larger number overflows float64.
MAX_EXPONENT = 709.0


def evaluate(
    model: Decoder,
    params: Any,
    tokens: np.ndarray | Shards,
    num_bytes: int,
    *,
    batch_size: int,
    limit: int = 0,
    loss_chunk_tokens: int | None = None,
    start: Sequence[int] = (),
    document_starts: np.ndarray | None = None,
) -> dict[str, float]:
    """The loss on a text, in consecutive windows of the context length (or of the text, if that is shorter).

    Args:
        model: the network.
        params: its parameters.
        tokens: the text, one-dimensional; each but the first is predicted once; with a start the first, too.
        num_bytes: size of the text in UTF-8.
        batch_size: windows per batch.
        limit: number of batches to evaluate, evenly spaced over the text; 0 evaluates all.
        loss_chunk_tokens: see `TrainingConfig`.
        start: tokens that every window begins with, such as a start token that the model has always seen.
        document_starts: where documents start in the tokens; given, each sees itself only.

    Returns:
        "loss" in nats per token, "perplexity" (its exponential), "bits_per_byte", and "num_tokens" predicted.
    """
    context_length = min(model.config.context_length, len(tokens) - 1 + len(start))
    batches = validation_batches(
        tokens,
        batch_size=batch_size,
        context_length=context_length,
        limit=limit,
        start=start,
        document_starts=document_starts,
    )
    return evaluate_batches(
        model, params, batches, num_learned=len(tokens), num_bytes=num_bytes, loss_chunk_tokens=loss_chunk_tokens
    )


def evaluate_batches(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    num_learned: int,
    num_bytes: int,
    loss_chunk_tokens: int | None = None,
) -> dict[str, float]:
    """The loss on batches, each with the "mask" of what counts.

    Args:
        model: the network.
        params: its parameters.
        batches: see `Split.validation_batches`.
        num_learned: tokens that `num_bytes` bytes of text are made of.
        num_bytes: the size of that text in UTF-8.
        loss_chunk_tokens: see `TrainingConfig`.

    Returns:
        See `evaluate`.
    """
    # One at a time: many programs in flight can deadlock the devices that one CPU simulates.
    sums = [jax.device_get(_loss_sums(model, params, batch, loss_chunk_tokens)) for batch in batches]
    # In float64 on the host: float32 would lose digits over a long text.
    total, num_tokens = (math.fsum(float(part[name]) for part in sums) for name in ("loss", "num_tokens"))
    loss = total / num_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < MAX_EXPONENT else math.inf,
        "bits_per_byte": bits_per_byte(loss, num_learned, num_bytes),
        "num_tokens": int(num_tokens),
    }


@functools.partial(jax.jit, static_argnames=("model", "loss_chunk_tokens"))
def _loss_sums(model: Decoder, params: Any, batch: Batch, loss_chunk_tokens: int | None) -> Metrics:
    batch = without_borders(batch)
    if model.config.rotates_by_length and "segments" not in batch:  # there padding must not lengthen the text
        is_padding_BT = jnp.cumsum(batch["mask"][:, ::-1], axis=1)[:, ::-1] == 0
        batch |= {"segments": is_padding_BT.astype(jnp.int32)}
    return loss_sum(params, model.apply, batch, loss_chunk_tokens=loss_chunk_tokens)[1]
