"""(seed, step) -> batch: a pure function, so there is no iterator state to save or to lose.

Training visits a text in epochs. In each epoch the tokens are cut into windows of T that do not overlap; every window
is visited once, in an order that depends on (seed, epoch) only. A batch is the next B windows in that order.
"""

import functools
from collections.abc import Iterator

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
        seed: start of the order.
        step: number of the step, from 0.
        batch_size: B, windows a step.
        context_length: T, tokens a window.
        rows: read only these windows of the batch.

    Returns:
        `inputs` and `targets`, int32 [B, T], B as many as `rows` has; targets are the inputs moved on by one token.

    Raises:
        ValueError: the tokens are fewer than T + 1.
    """
    T = context_length
    num_windows, num_offsets = _count_windows(len(tokens), T)
    first = int(step) * batch_size  # samples are numbered through all epochs, whatever the batch size
    end = first + batch_size
    starts = []
    for epoch in range(first // num_windows, (end - 1) // num_windows + 1):
        offset, order = _epoch_order(seed, epoch, num_windows, num_offsets)
        epoch_start = epoch * num_windows
        starts.append(offset + T * order[max(first - epoch_start, 0) : end - epoch_start])
    windows = tokens[np.concatenate(starts)[rows, None] + np.arange(T + 1)]
    return {"inputs": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, context_length: int, limit: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The validation split in order, each target once, in batches of one shape (so one compilation).

    Args:
        tokens: the validation split, one-dimensional; may be memory-mapped.
        batch_size: B, windows a batch.
        context_length: T, tokens a window.
        limit: give only this many batches, evenly spaced; 0 gives all.

    Yields:
        `inputs` and `targets`, int32 [B, T], and `mask`, float32 [B, T]: 1 where there is a target, 0 in the padding.

    Raises:
        ValueError: fewer than two tokens, so no target.
    """
    B, T = batch_size, context_length
    num_targets = len(tokens) - 1
    if num_targets < 1:
        raise ValueError(f"a validation split needs at least 2 tokens, this one has {len(tokens)}")
    num_batches = -(-num_targets // (B * T))
    num_chosen = min(limit, num_batches) if limit > 0 else num_batches
    for choice in range(num_chosen):
        batch = choice * num_batches // num_chosen
        places_BT = batch * B * T + np.arange(B * T).reshape(B, T)
        real_BT = places_BT < num_targets
        places_BT = np.where(real_BT, places_BT, 0)
        yield {
            "inputs": np.where(real_BT, tokens[places_BT], 0).astype(np.int32),
            "targets": np.where(real_BT, tokens[places_BT + 1], 0).astype(np.int32),
            "mask": real_BT.astype(np.float32),
        }


def _count_windows(num_tokens: int, T: int) -> tuple[int, int]:
    """Windows an epoch, and at how many offsets from the start of the text that many fit.

    A window reads T + 1 tokens and shares its last one with the next, so n of them need n T + 1.
    """
    if num_tokens < T + 1:
        raise ValueError(f"{num_tokens} tokens hold no window: context_length = {T} needs at least {T + 1}")
    num_windows = max((num_tokens - T) // T, 1)  # the number that still fits at the largest offset, T - 1
    return num_windows, min(num_tokens - num_windows * T, T)


@functools.lru_cache(maxsize=4)  # a step needs one epoch's order, or two where it crosses into the next
def _epoch_order(seed: int, epoch: int, num_windows: int, num_offsets: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window starts (each epoch cuts the text elsewhere), and the order of its windows."""
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(num_offsets))
    order = generator.permutation(num_windows)
    order.flags.writeable = False  # the cache hands the same array to all
    return offset, order
