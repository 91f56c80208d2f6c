"""(seed, step) -> batch: a pure function, so there is no iterator state to save or lose.

Training visits a text in epochs. Each epoch splits the tokens into windows of T that do not overlap, and visits every
window once, in an order that depends only on (seed, epoch). A batch is the next B windows in that order.

An order of all windows would take memory without bound. So the windows of a large corpus are dealt out to rounds, as
cards are, and each round is shuffled by itself: it has at most `MAX_SHUFFLED` windows, evenly spread over the corpus.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from flax_decoder.data.shards import Shards

MAX_SHUFFLED = 2**20


def train_batch(
    tokens: np.ndarray | Shards,
    *,
    seed: int,
    step: int,
    batch_size: int,
    context_length: int,
    rows: slice = slice(None),
    document_starts: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The training batch of a step.

    Args:
        tokens: the training split, one-dimensional; may be memory-mapped.
        seed: of the order of windows.
        step: from 0.
        batch_size: B, windows per step.
        context_length: T, tokens per window.
        rows: reads only these windows of the batch.
        document_starts: where documents start, ascending; given, tokens are to see their own document only.

    Returns:
        `inputs` and `targets`, int32 [B, T], or fewer rows if `rows` is given; targets are the inputs shifted by one.
        With `document_starts` also `segments`, int32 [B, T], the number of each input's document in its row, and
        `mask`, float32 [B, T]: 0 for a target in the next document.

    Raises:
        ValueError: fewer than T + 1 tokens.
    """
    T = context_length
    num_windows, num_offsets = _count_windows(len(tokens), T)
    first = int(step) * batch_size  # windows are numbered across epochs, so the order does not depend on the batch size
    end = first + batch_size
    starts = []
    for epoch in range(first // num_windows, (end - 1) // num_windows + 1):
        epoch_start = epoch * num_windows
        places = range(max(first - epoch_start, 0), min(end - epoch_start, num_windows))
        starts.append(_window_starts(seed, epoch, places, num_windows, num_offsets, T))
    indices = np.concatenate(starts)[rows, None] + np.arange(T + 1)
    windows = tokens[indices]
    batch = {"inputs": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}
    if document_starts is None:
        return batch
    documents = np.searchsorted(document_starts, indices, side="right")
    return batch | _segments(documents[:, :-1], documents[:, 1:])


def _segments(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """`segments` and `mask` of a batch, from the number of each token's document in the corpus."""
    return {
        "segments": (inputs_BT - inputs_BT[:, :1]).astype(np.int32),
        "mask": (inputs_BT == targets_BT).astype(np.float32),
    }


def validation_batches(
    tokens: np.ndarray | Shards,
    *,
    batch_size: int,
    context_length: int,
    limit: int = 0,
    start: Sequence[int] = (),
    document_starts: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The validation split in order, each target once, in batches of one shape (one compilation).

    Args:
        tokens: the validation split, one-dimensional; may be memory-mapped.
        batch_size: B, windows per batch.
        context_length: T, tokens per window.
        limit: yields at most this many batches, evenly spaced; 0 yields all.
        start: tokens that every window begins with, at most T; after them the first token is predicted too.
        document_starts: as in `train_batch`; without a start.

    Yields:
        `inputs` and `targets`, int32 [B, T], and `mask`, float32 [B, T]: 1 for a target, 0 for padding; with
        `document_starts` also `segments`, and the mask is 0 for the first token of a document.

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
        first_window = choice * num_batches // num_chosen * B
        windows_B1 = first_window + np.arange(B)[:, None]
        positions_1T = np.arange(T)[None, :]
        indices_BT = windows_B1 * stride + positions_1T - num_before  # of the targets
        mask_BT = (positions_1T >= num_before) & (indices_BT < len(tokens))
        indices_BT = np.where(mask_BT, indices_BT, 0)
        inputs_BT = np.where(mask_BT, tokens[np.maximum(indices_BT - 1, 0)], 0)
        batch = {
            "inputs": np.where(positions_1T <= num_before, first_T, inputs_BT).astype(np.int32),
            "targets": np.where(mask_BT, tokens[indices_BT], 0).astype(np.int32),
            "mask": mask_BT.astype(np.float32),
        }
        if document_starts is not None:
            before, after = (np.searchsorted(document_starts, indices_BT - back, side="right") for back in (1, 0))
            found = _segments(before, after)
            batch |= found | {"mask": batch["mask"] * found["mask"]}
        yield batch


def _count_windows(num_tokens: int, T: int) -> tuple[int, int]:
    """Windows per epoch, and the number of offsets at which that many windows fit.

    A window reads T + 1 tokens and shares its last one with the next, so n windows need n T + 1 tokens.
    """
    if num_tokens < T + 1:
        raise ValueError(f"{num_tokens} tokens hold no window: context_length = {T} needs at least {T + 1}")
    num_windows = max((num_tokens - T) // T, 1)  # the number that still fits at the largest offset, T - 1
    return num_windows, min(num_tokens - num_windows * T, T)


def _window_starts(seed: int, epoch: int, places: range, num_windows: int, num_offsets: int, T: int) -> np.ndarray:
    """Where the windows start that stand at these places in the order of an epoch."""
    num_rounds = -(-num_windows // MAX_SHUFFLED)
    lengths = [len(range(round, num_windows, num_rounds)) for round in range(num_rounds)]
    starts, round_start = [np.zeros(0, np.int64)], 0
    for round, length in enumerate(lengths):
        chosen = slice(max(places.start - round_start, 0), max(places.stop - round_start, 0))
        if chosen.start < min(chosen.stop, length):
            offset, order = _round_order(seed, epoch, round, length, num_offsets)
            starts.append(offset + T * (round + num_rounds * order[chosen]))
        round_start += length
    return np.concatenate(starts)


@functools.lru_cache(maxsize=4)  # a step needs one round's order, or two if it crosses into the next
def _round_order(seed: int, epoch: int, round: int, length: int, num_offsets: int) -> tuple[int, np.ndarray]:
    """The start of an epoch's first window (each epoch has another offset), and the order of the windows of a round."""
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(num_offsets))
    if round > 0:  # the first one goes on with the numbers of the epoch
        generator = np.random.default_rng([seed, epoch, round])
    order = generator.permutation(length)
    order.flags.writeable = False  # the cache returns the same array each time
    return offset, order
