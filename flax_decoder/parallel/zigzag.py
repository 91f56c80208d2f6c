"""In which order the tokens of a sequence are dealt to the devices that share it."""

import numpy as np

from flax_decoder.errors import UserError


def zigzag(length: int, num_parts: int) -> np.ndarray:
    """An order of tokens in which each part has the same share of early and of late ones.

    A query sees what comes before it, so the last part of a sequence has the most to do. Of 2 C chunks, part i gets
    the chunks i and 2 C - 1 - i: what it does less for the first it does more for the second.

        4 parts of 16 tokens:   0 1 14 15 | 2 3 12 13 | 4 5 10 11 | 6 7 8 9

    Args:
        length: T, number of tokens.
        num_parts: C, number of devices that share a sequence.

    Returns:
        int32 (T,): which token comes at each place. `inputs[:, order]` are the tokens in this order, `order` itself is
        where they stand.

    Raises:
        UserError: the length is no multiple of 2 C.
    """
    if length % (2 * num_parts) != 0:
        raise UserError(
            f"model.context_length = {length} cannot be cut into 2 x {num_parts} chunks (mesh.context = {num_parts}): "
            f"make it a multiple of {2 * num_parts}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * num_parts, -1)
    return np.stack([chunks[:num_parts], chunks[num_parts:][::-1]], axis=1).reshape(-1)
