"""The order in which a sequence is dealt out to devices so that each has the same number of tokens to look back on."""

import numpy as np


def zigzag(length: int, num_parts: int) -> np.ndarray:
    """Positions in the order in which the devices hold them, part after part.

    A late token looks back on more than an early one. Of 2 C chunks device i therefore holds chunk i and chunk
    2 C - 1 - i: one as early as the other is late.

    Args:
        length: T, tokens of a sequence.
        num_parts: C, devices that share it.

    Returns:
        order_T, so that `sequence[order_T]` is what devices 0, 1, ... hold, one after the other.

    Raises:
        ValueError: the length is not a multiple of 2 C.
    """
    if length % (2 * num_parts) != 0:
        raise ValueError(f"{length} tokens are not a multiple of 2 x {num_parts} chunks")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * num_parts, -1)
    return np.concatenate([chunks[[i, 2 * num_parts - 1 - i]].reshape(-1) for i in range(num_parts)])
