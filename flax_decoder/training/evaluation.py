"""How well a model predicts a text that it was not trained on."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.batch import Batch, without_borders
from flax_decoder.training.metrics import bits_per_byte
from flax_decoder.training.step import Metrics, loss_sum

# The exponential of a larger number overflows float64.
MAX_EXPONENT = 709.0


def evaluate_batches(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    num_learned: int,
    num_bytes: int,
    loss_chunk_tokens: int | None = None,
) -> dict[str, float]:
    """The loss on batches (see `Split.validation_batches`), each with the "mask" of what counts.

    They are made from `num_learned` tokens, which are `num_bytes` of text in UTF-8.

    Returns:
        "loss" in nats per token, "perplexity" (its exponential), "bits_per_byte", and "num_tokens" predicted.
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
