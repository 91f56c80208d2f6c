"""A token order for context parallelism in which every device has the same number of keys to attend to."""

import numpy as np


def zigzag(length: int, num_parts: int) -> np.ndarray:
    """Positions in the order in which devices hold them.

    Later queries attend to more keys, so of 2 C chunks device i holds an early and a late one: C - 1 - i and C + i.
    The last token stays last, where a loss looks for the end of a row.

    Returns:
        order_T, such that `sequence[order_T]` lists the tokens of device 0, then those of device 1, and so on.

    Raises:
        ValueError: the length T is not a multiple of 2 C, where C is `num_parts`.
    """
    if length % (2 * num_parts) != 0:
        raise ValueError(f"{length} tokens are not a multiple of 2 x {num_parts} chunks")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * num_parts, -1)
    return np.concatenate([chunks[[num_parts - 1 - i, num_parts + i]].reshape(-1) for i in range(num_parts)])
