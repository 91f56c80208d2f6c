"""Examples -> batches: (seed, step) -> batch, a pure function.

A window has T + 1 tokens: T inputs, and as targets the same moved on by one. It holds one example, or several that do
not see each other: each is a segment of its own. Training visits the windows in epochs, each once and in an order that
depends only on (seed, epoch).
"""

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flax_decoder.data.batches import spread


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples, each a sequence of tokens of which some are learned.

    Attributes:
        tokens: int32, of all examples, one after the other; may be memory-mapped.
        learned: bool, for each token whether the model is trained to predict it.
        ends: int64, where in `tokens` each example ends.
        num_truncated: how many have lost their end, as they were longer than a window.
        num_dropped: how many are left out, as nothing of them can be learned.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    num_truncated: int = 0
    num_dropped: int = 0


@dataclass(frozen=True, eq=False)
class Windows:
    """Which examples are in which window.

    Attributes:
        examples: int64, the numbers of all examples, window by window.
        ends: int64, where in `examples` each window ends.
    """

    examples: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)


def make_windows(examples: Examples, *, context_length: int, packing: bool) -> Windows:
    """Distributes examples over windows.

    Args:
        examples: each of at most T + 1 tokens.
        context_length: T.
        packing: several to a window: from the longest on, each goes where it leaves the least room (best fit).
            Otherwise one to a window, in order.

    Raises:
        ValueError: an example is longer than a window.
    """
    lengths = np.diff(examples.ends, prepend=0)
    if lengths.max() > context_length + 1:
        raise ValueError(f"an example of {lengths.max()} tokens is longer than a window of {context_length + 1}")
    if not packing:
        return Windows(np.arange(len(lengths)), np.arange(1, len(lengths) + 1))
    windows: list[list[int]] = []
    by_room = defaultdict[int, list[int]](list)  # windows by the tokens that still fit, and these numbers in order
    rooms: list[int] = []
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        index = bisect.bisect_left(rooms, length)
        if index < len(rooms):
            room = rooms[index]
            window = by_room[room].pop()
            if not by_room[room]:
                del rooms[index]
        else:
            room, window = context_length + 1, len(windows)
            windows.append([])
        windows[window].append(example)
        if not by_room[room - length]:
            bisect.insort(rooms, room - length)
        by_room[room - length].append(window)
    return Windows(np.concatenate([np.array(window) for window in windows]), np.cumsum([*map(len, windows)]))


def example_rows(
    examples: Examples, windows: Windows, numbers: np.ndarray, *, seed: int, context_length: int
) -> dict[str, np.ndarray]:
    """Training rows by their numbers, which count on from epoch to epoch.

    Args:
        examples: the training split.
        windows: from `make_windows`.
        numbers: of the rows, ascending, from 0; [B].
        seed: of the order of windows.
        context_length: T.

    Returns:
        Arrays [B, T]: `inputs` and `targets`, int32; `mask`, float32, 1 for a target that is learned; `segments`,
        int32, the number of the example in its window, from 0; padding is one more.
    """
    epochs, places = np.divmod(numbers, len(windows))
    chosen = np.zeros_like(places)
    for epoch in np.unique(epochs):
        is_here = epochs == epoch
        chosen[is_here] = _epoch_order(seed, int(epoch), len(windows))[places[is_here]]
    return _batch(examples, windows, chosen, context_length)


def validation_windows(
    examples: Examples, windows: Windows, *, batch_size: int, context_length: int, limit: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The windows in order, each once, in batches of one shape (one compilation), as `example_rows` makes them.

    Args:
        examples: the validation split.
        windows: from `make_windows`.
        batch_size: B, windows per batch; the last one is filled up with rows of padding.
        context_length: T.
        limit: yields at most this many batches, evenly spaced; 0 yields all.
    """
    for index in spread(-(-len(windows) // batch_size), limit):
        first = index * batch_size
        chosen = np.arange(first, min(first + batch_size, len(windows)))
        batch = _batch(examples, windows, chosen, context_length)
        num_lacking = batch_size - len(chosen)
        yield {name: np.pad(array, ((0, num_lacking), (0, 0))) for name, array in batch.items()}


def _batch(examples: Examples, windows: Windows, chosen: np.ndarray, T: int) -> dict[str, np.ndarray]:
    tokens = np.zeros((len(chosen), T + 1), np.int32)
    segments = np.zeros((len(chosen), T + 1), np.int32)
    is_learned = np.zeros((len(chosen), T + 1), np.bool_)
    for row, window in enumerate(chosen):
        end = 0
        members = windows.examples[windows.ends[window - 1] if window > 0 else 0 : windows.ends[window]]
        for number, example in enumerate(members):
            part = slice(examples.ends[example - 1] if example > 0 else 0, examples.ends[example])
            start, end = end, end + part.stop - part.start
            tokens[row, start:end], is_learned[row, start:end] = examples.tokens[part], examples.learned[part]
            segments[row, start:end] = number
        segments[row, end:] = len(members)
    is_inside = segments[:, 1:] == segments[:, :-1]  # the first token of an example is nothing to predict
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": (is_learned[:, 1:] & is_inside).astype(np.float32),
        "segments": segments[:, :-1],
    }


@functools.lru_cache(maxsize=4)  # a step needs one epoch's order, or two if it crosses into the next
def _epoch_order(seed: int, epoch: int, num_windows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_windows)
    order.flags.writeable = False  # the cache returns the same array each time
    return order
