"""(seed, step) -> batch: a pure function, so there is no iterator state to save or lose.

Training visits a text in epochs. Each epoch splits the tokens into windows of T that do not overlap, and visits every
window once, in an order that depends only on (seed, epoch). A batch is the next B windows in that order.

An order of all windows would take memory without bound. So the windows of a large corpus are dealt out to rounds, as
cards are, and each round is shuffled by itself: it has at most `MAX_SHUFFLED` windows, evenly spread over the corpus.

In a mixture of sources, the rows of the whole run are numbered, and dealt to the sources by (seed, number). The n-th
row of a source is its n-th window, in epochs of its own.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flax_decoder.data.long_array import Shards

MAX_SHUFFLED = 2**20
# The rows of a run are dealt to the sources of a mixture in blocks of so many: each has the same part of each block.
BLOCK_ROWS = 1000


def row_numbers(step: int, batch_size: int, rows: slice) -> np.ndarray:
    """The numbers of rows of a batch in the whole run, on which alone it depends what they hold."""
    return int(step) * batch_size + np.arange(batch_size)[rows]


def train_windows(
    tokens: np.ndarray | Shards,
    numbers: np.ndarray,
    *,
    seed: int,
    context_length: int,
    document_starts: np.ndarray | None = None,
    source: int | None = None,
) -> dict[str, np.ndarray]:
    """Training windows by their numbers, which count on from epoch to epoch.

    Args:
        tokens: the training split, one-dimensional; may be memory-mapped.
        numbers: of the windows, ascending, from 0; [B].
        seed: of the order of windows.
        context_length: T, tokens per window.
        document_starts: where documents start, ascending; given, tokens are to see their own document only.
        source: its number in a mixture, where each has an order of its own.

    Returns:
        `inputs` and `targets`, int32 [B, T]; targets are the inputs shifted by one. With `document_starts` also
        `segments`, int32 [B, T], the number of each input's document in its row, and `mask`, float32 [B, T]: 0 for a
        target in the next document.

    Raises:
        ValueError: fewer than T + 1 tokens.
    """
    T = context_length
    num_windows, num_offsets = _count_windows(len(tokens), T)
    seed = seed if source is None else _own_seed(seed, source)
    epochs, places = np.divmod(numbers, num_windows)
    starts = np.zeros(len(numbers), np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        order = functools.partial(_orders_of(source), seed, int(epoch))
        starts[chosen] = _window_starts(order, places[chosen], num_windows, num_offsets, T)
    indices = starts[:, None] + np.arange(T + 1)
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


def quotas(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK_ROWS` rows each source gets: by weight, rounded so that they add up (largest remainder)."""
    shares = np.round(BLOCK_ROWS * np.array(weights, np.float64) / sum(weights), 6)
    counts = shares.astype(int)
    most = np.argsort(counts - shares, kind="stable")[: BLOCK_ROWS - counts.sum()]
    counts[most] += 1
    return [int(count) for count in counts]


def deal(numbers: np.ndarray, counts: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source of a mixture each row of a run is from, and which of its windows it is.

    In each block of rows, the rows of all sources are shuffled by (seed, block).

    Args:
        numbers: of the rows; [B].
        counts: rows of each source in a block.
        seed: of the run.

    Returns:
        The number of the source, and the number of the window in it, from 0 at the start of the run; both [B].
    """
    sources, windows = np.zeros_like(numbers), np.zeros_like(numbers)
    blocks, places = np.divmod(numbers, BLOCK_ROWS)
    for block in np.unique(blocks):
        chosen = blocks == block
        order, ranks = _block_order(seed, int(block), tuple(counts))
        sources[chosen] = order[places[chosen]]
        windows[chosen] = block * np.array(counts)[sources[chosen]] + ranks[places[chosen]]
    return sources, windows


def dealt(num_rows: int, counts: Sequence[int], seed: int) -> list[int]:
    """How many of the first rows of a run are from each source."""
    block, rest = divmod(num_rows, BLOCK_ROWS)
    order, _ = _block_order(seed, block, tuple(counts))
    return (block * np.array(counts) + np.bincount(order[:rest], minlength=len(counts))).tolist()


@functools.lru_cache(maxsize=4)
def _block_order(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row of a block, and how many rows before it are from the same one."""
    order = np.random.default_rng([seed, block, 1]).permutation(np.repeat(np.arange(len(counts)), counts))
    ranks = np.zeros_like(order)
    for source, count in enumerate(counts):
        ranks[order == source] = np.arange(count)
    return order, ranks


def _own_seed(seed: int, source: int) -> int:
    """A seed for one source of a mixture: two of the same length are not in the same order."""
    return int(np.random.SeedSequence([seed, source, 2]).generate_state(1, np.uint64)[0])


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
        document_starts: as in `train_windows`; without a start.

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
    first_T = np.resize(np.array([*start] or [0]), T)
    for index in spread(num_batches, limit):
        windows_B1 = index * B + np.arange(B)[:, None]
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


def spread(num_batches: int, limit: int) -> list[int]:
    """The numbers of at most `limit` of so many batches, evenly spaced; of all if it is 0."""
    num_chosen = min(limit, num_batches) if limit > 0 else num_batches
    return [choice * num_batches // num_chosen for choice in range(num_chosen)]


def _count_windows(num_tokens: int, T: int) -> tuple[int, int]:
    """Windows per epoch, and the number of offsets at which that many windows fit.

    A window reads T + 1 tokens and shares its last one with the next, so n windows need n T + 1 tokens.
    """
    if num_tokens < T + 1:
        raise ValueError(f"{num_tokens} tokens hold no window: context_length = {T} needs at least {T + 1}")
    num_windows = max((num_tokens - T) // T, 1)  # the number that still fits at the largest offset, T - 1
    return num_windows, min(num_tokens - num_windows * T, T)


_Order = Callable[[int, int, int], tuple[int, np.ndarray]]


def _window_starts(order_of: _Order, places: np.ndarray, num_windows: int, num_offsets: int, T: int) -> np.ndarray:
    """Where the windows start that stand at these places in the order of an epoch, which has that of each round."""
    num_rounds = -(-num_windows // MAX_SHUFFLED)
    lengths = [len(range(round, num_windows, num_rounds)) for round in range(num_rounds)]
    starts, round_start = np.zeros(len(places), np.int64), 0
    for round, length in enumerate(lengths):
        chosen = (places >= round_start) & (places < round_start + length)
        if chosen.any():
            offset, order = order_of(round, length, num_offsets)
            starts[chosen] = offset + T * (round + num_rounds * order[places[chosen] - round_start])
        round_start += length
    return starts


@functools.cache
def _orders_of(source: int | None) -> Callable[..., tuple[int, np.ndarray]]:
    """`_round_order`, which keeps the last orders of a source whatever other sources ask for.

    A step needs one round's order of each, or two if it crosses into the next.
    """
    return functools.lru_cache(maxsize=2)(_round_order)


def _round_order(seed: int, epoch: int, round: int, length: int, num_offsets: int) -> tuple[int, np.ndarray]:
    """The start of an epoch's first window (each epoch has another offset), and the order of the windows of a round."""
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(num_offsets))
    if round > 0:  # the first one goes on with the numbers of the epoch
        generator = np.random.default_rng([seed, epoch, round])
    order = generator.permutation(length)
    order.flags.writeable = False  # the cache returns the same array each time
    return offset, order
