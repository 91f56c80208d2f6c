"""(seed, step) -> batch: a pure function, so there is no iterator state to save or lose.

Training visits a text in epochs. Each epoch splits the tokens into windows of T that do not overlap, and visits every
window once, in an order that depends only on (seed, epoch). A batch is the next B windows in that order.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np


def train_batch(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    context_length: int,
    rows: slice = slice(None),
) -> dict[str, np.ndarray]:
    """The training batch of a step.

    Args:
        tokens: the training split, one-dimensional; may be memory-mapped.
        seed: of the order of windows.
        step: from 0.
        batch_size: B, windows per step.
        context_length: T, tokens per window.
        rows: reads only these windows of the batch.

    Returns:
        `inputs` and `targets`, int32 [B, T], or fewer rows if `rows` is given; targets are the inputs shifted by one.

    Raises:
        ValueError: fewer than T + 1 tokens.
    """
    T = context_length
    num_windows, num_offsets = _count_windows(len(tokens), T)
    first = int(step) * batch_size  # windows are numbered across epochs, so the order does not depend on the batch size
    end = first + batch_size
    starts = []
    for epoch in range(first // num_windows, (end - 1) // num_windows + 1):
        offset, order = _epoch_order(seed, epoch, num_windows, num_offsets)
        epoch_start = epoch * num_windows
        starts.append(offset + T * order[max(first - epoch_start, 0) : end - epoch_start])
    windows = tokens[np.concatenate(starts)[rows, None] + np.arange(T + 1)]
    return {"inputs": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, context_length: int, limit: int = 0, start: Sequence[int] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """The validation split in order, each target once, in batches of one shape (one compilation).

    Args:
        tokens: the validation split, one-dimensional; may be memory-mapped.
        batch_size: B, windows per batch.
        context_length: T, tokens per window.
        limit: yields at most this many batches, evenly spaced; 0 yields all.
        start: tokens that every window begins with, at most T; after them the first token is predicted too.

    Yields:
        `inputs` and `targets`, int32 [B, T], and `mask`, float32 [B, T]: 1 for a target, 0 for padding.

    Raises:
        ValueError: no target: fewer than two tokens, or none after a start.
    """
    B, T, num_before = batch_size, context_length, len(start) - 1
    num_targets = len(tokens) - (0 if start else 1)
    if num_targets < 1:
        raise ValueError(f"a validation split needs at least 2 tokens, this one has {len(tokens)}")
    stride = T - max(num_before, 0)
    num_batches = -(-num_targets // (B * stride))
    num_chosen = min(limit, num_batches) if limit > 0 else num_batches
    first_T = np.resize(np.array([*start] or [0]), T)
    for choice in range(num_chosen):
        batch = choice * num_batches // num_chosen
        windows_B1 = batch * B + np.arange(B)[:, None]
        positions_1T = np.arange(T)[None, :]
        indices_BT = windows_B1 * stride + positions_1T - num_before  # of the targets
        mask_BT = (positions_1T >= num_before) & (indices_BT < len(tokens))
        indices_BT = np.where(mask_BT, indices_BT, 0)
        inputs_BT = np.where(mask_BT, tokens[np.maximum(indices_BT - 1, 0)], 0)
        yield {
            "inputs": np.where(positions_1T <= num_before, first_T, inputs_BT).astype(np.int32),
            "targets": np.where(mask_BT, tokens[indices_BT], 0).astype(np.int32),
            "mask": mask_BT.astype(np.float32),
        }


def _count_windows(num_tokens: int, T: int) -> tuple[int, int]:
    """Windows per epoch, and the number of offsets at which that many windows fit.

    A window reads T + 1 tokens and shares its last one with the next, so n windows need n T + 1 tokens.
    """
    if num_tokens < T + 1:
        raise ValueError(f"{num_tokens} tokens hold no window: context_length = {T} needs at least {T + 1}")
    num_windows = max((num_tokens - T) // T, 1)  # the number that still fits at the largest offset, T - 1
    return num_windows, min(num_tokens - num_windows * T, T)


@functools.lru_cache(maxsize=4)  # a step needs one epoch's order, or two if it crosses into the next
def _epoch_order(seed: int, epoch: int, num_windows: int, num_offsets: int) -> tuple[int, np.ndarray]:
    """The start of an epoch's first window (each epoch has another offset), and the order of its windows."""
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(num_offsets))
    order = generator.permutation(num_windows)
    order.flags.writeable = False  # the cache returns the same array each time
    return offset, order
