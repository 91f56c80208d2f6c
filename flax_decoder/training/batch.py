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
    "inputs_position": "positions",
    "segment_ids": "segments",
    "inputs_segmentation": "segments",
    "document_ids": "segments",
    "doc_ids": "segments",
    "documents": "segments",
}


def checked_batch(batch: Batch, vocab_size: int, num_parts: int = 1) -> Batch:
    """The batch of `train_step` as signed integers of at least 32 bits and float32 weights.

    Args:
        batch: see `train_step`; "mask" is a constant to the gradient, and "positions" may also be (1, T).
        vocab_size: V.
        num_parts: the rows are computed in this many parts.

    Returns:
        A batch of the same names; with "segments" also a "mask", see `without_borders`.

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

    checked = {name: as_integers(array, name) for name, array in arrays.items() if name not in ("targets", "mask")}
    if "mask" in arrays:
        checked["mask"] = checked_weights(arrays["mask"])
    checked = without_borders(checked)
    if num_parts > 1 and "positions" in checked:  # each part has its rows of them
        checked["positions"] = jnp.broadcast_to(checked["positions"], shape)
    weights = checked["mask"] if "segments" in checked else arrays.get("mask")
    check_tokens(arrays["targets"], vocab_size, weights, "targets")
    return checked | {"targets": as_integers(arrays["targets"], "targets")}


def without_borders(batch: Batch) -> Batch:
    """The batch with no weight where a target is of another document than its input.

    That is where the document of an input has no further token in the row, save for the last token of the row: of its
    target "segments" says nothing, and a given "mask" decides. Without "positions" tokens are in order. With them they
    may lie in any order that leaves the row's last token last; no document's id may then come back.
    """
    if "segments" not in batch:
        return batch
    segments_BT, positions_BT = batch["segments"], batch.get("positions")
    if positions_BT is None:
        is_end_BT = segments_BT != jnp.roll(segments_BT, -1, axis=1)
    else:
        is_end_BT = _is_last_of_document(segments_BT, jnp.broadcast_to(positions_BT, segments_BT.shape))
    inside_BT = (~is_end_BT).at[:, -1].set(True).astype(jnp.float32)
    return dict(batch) | {"mask": batch["mask"] * inside_BT if "mask" in batch else inside_BT}


def _is_last_of_document(segments_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """True where no token of a document has a later position."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    sorted_BT, _, index_BT = jax.lax.sort((segments_BT, positions_BT, index_BT), num_keys=2)
    is_last_BT = sorted_BT != jnp.roll(sorted_BT, -1, axis=1)
    is_last_BT = is_last_BT.at[:, -1].set(True)  # of the largest id, even where there is no other
    return jax.lax.sort((index_BT, is_last_BT), num_keys=1)[1]  # in the order of the batch again


def checked_weights(mask_BT: jax.Array | np.ndarray) -> jax.Array:
    """Weights of targets in float32; negative ones, if they are traced and so cannot be refused, count as 0."""
    if not (jnp.issubdtype(mask_BT.dtype, jnp.bool_) or jnp.issubdtype(mask_BT.dtype, jnp.number)) or (
        jnp.iscomplexobj(mask_BT)
    ):
        raise ValueError(f'batch["mask"] must be numbers or truth values, not {mask_BT.dtype}')
    if not isinstance(mask_BT, jax.core.Tracer) and not (np.asarray(mask_BT) >= 0).all():
        raise ValueError('batch["mask"] has a negative weight, or one that is not a number')
    return jax.lax.stop_gradient(jnp.maximum(jnp.asarray(mask_BT, jnp.float32), 0))
