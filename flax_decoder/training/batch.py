"""A batch as the training step takes it: checked when the step is traced, so that the compiled step pays nothing."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import require_type
from flax_decoder.nn.arguments import as_array, as_integers, check_tokens

Batch = dict[str, Any]
"""Arrays by name: "inputs" and "targets", token ids (B, T); optionally "mask", "positions", "segments"."""

NAMES = ("inputs", "targets", "mask", "positions", "segments")
# What others call the same arrays.
OTHER_NAMES = {
    "input_ids": "inputs",
    "tokens": "inputs",
    "x": "inputs",
    "labels": "targets",
    "y": "targets",
    "attention_mask": "mask",
    "loss_mask": "mask",
    "weights": "mask",
    "position_ids": "positions",
    "segment_ids": "segments",
    "document_ids": "segments",
}


def checked_batch(batch: Batch, vocab_size: int, num_parts: int = 1) -> Batch:
    """The batch as signed integers of at least 32 bits and float32 weights; raises if it cannot mean what it seems to.

    Args:
        batch: "inputs" and "targets", token ids (B, T); optionally "mask" (B, T), the weight of each target in the
            loss, a constant to the gradient; "positions", (B, T) or (1, T); and "segments" (B, T), the documents of
            the inputs: tokens see their own document only, and a target in the next one has no weight.
        vocab_size: V.
        num_parts: the rows are computed in this many parts.

    Returns:
        A batch of the same names; with "segments" also a "mask".

    Raises:
        ValueError: no dict, a name that is not known or missing, a shape or a dtype that does not fit, an empty batch,
            rows that do not divide by `num_parts`; and, if their values are known (not traced), ids of targets that
            count outside the vocabulary or negative weights.
    """
    require_type("the batch", batch, Mapping, 'such as {"inputs": tokens_BT, "targets": tokens_BT}')
    for name in batch:
        if name not in NAMES:
            near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, NAMES, n=1)), None)
            raise ValueError(
                f"the batch has {name!r}, which the loss would ignore"
                + (f"; did you mean {near!r}?" if near else f"; it knows {', '.join(NAMES)}")
            )
    missing = [name for name in ("inputs", "targets") if name not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}")

    arrays = {name: as_array(array, name) for name, array in batch.items()}
    shape = arrays["inputs"].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f'batch["inputs"] has the shape {shape}, but must be (B, T), both at least 1')
    for name, array in arrays.items():
        if array.shape != shape and not (name == "positions" and array.shape == (1, shape[1])):
            raise ValueError(f'batch["{name}"] has the shape {array.shape}, but batch["inputs"] has {shape}')
    if shape[0] % num_parts != 0:
        raise ValueError(f"a batch of {shape[0]} rows cannot be computed in {num_parts} parts of the same size")

    check_tokens(arrays["targets"], vocab_size, arrays.get("mask"), "targets")
    checked = {name: as_integers(array, name) for name, array in arrays.items() if name != "mask"}
    if "mask" in arrays:
        checked["mask"] = checked_weights(arrays["mask"])
    if "segments" in checked:
        checked["mask"] = checked.get("mask", jnp.ones(shape, jnp.float32)) * is_inside(checked["segments"])
    return checked


def is_inside(segments_BT: jax.Array) -> jax.Array:
    """1.0 where the next token of a row is of the same document, else 0; the last one of a row counts."""
    same_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return same_BT.astype(jnp.float32)


def checked_weights(mask_BT: jax.Array | np.ndarray) -> jax.Array:
    """Weights of targets in float32; negative ones, if they are traced and so cannot be refused, count as 0."""
    if not (jnp.issubdtype(mask_BT.dtype, jnp.bool_) or jnp.issubdtype(mask_BT.dtype, jnp.number)) or (
        jnp.iscomplexobj(mask_BT)
    ):
        raise ValueError(f'batch["mask"] must be numbers or truth values, not {mask_BT.dtype}')
    if not isinstance(mask_BT, jax.core.Tracer) and not (np.asarray(mask_BT) >= 0).all():
        raise ValueError('batch["mask"] has a negative weight, or one that is not a number')
    return jax.lax.stop_gradient(jnp.maximum(jnp.asarray(mask_BT, jnp.float32), 0))
