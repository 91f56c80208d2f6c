"""Texts that are tokens already: nanoGPT's .bin, and .npy."""

import os
from pathlib import Path

import numpy as np

from flax_decoder.data.formats.part import READ_BYTES, open_file
from flax_decoder.errors import UserError


def open_tokens(path: Path) -> np.ndarray:
    """Maps a file of token ids: uint16 as nanoGPT writes them (.bin), or a one-dimensional .npy of integers.

    Raises:
        UserError: it is neither.
    """
    with open_file(path) as file:
        num_bytes, beginning = os.fstat(file.fileno()).st_size, file.read(8)
    try:
        if path.suffix.lower() == ".npy":
            # Unlike np.load, this never opens a pickle or an archive.
            tokens = np.lib.format.open_memmap(path, mode="r")
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"it has {tokens.dtype} {tokens.shape}, but token ids are integers in one dimension")
            return tokens
        if beginning.startswith((b"\x80", b"PK\x03\x04")):
            raise ValueError("it looks like a checkpoint of PyTorch or a pickle")
        if num_bytes % 2:
            raise ValueError(f"it has {num_bytes:,} bytes, an odd number")
        return np.memmap(path, "<u2", "r") if num_bytes else np.zeros(0, np.uint16)
    except Exception as error:  # on a crafted header NumPy raises anything
        raise UserError(
            f"{path}: does not hold token ids, as nanoGPT's .bin (uint16) or a .npy of integers: {error}"
        ) from None


def after_end(tokens: np.ndarray, border: int, stop: int, end_ids: tuple[int, ...]) -> int:
    """The first place from `border` on that is after the end of a document; `border` if none ends after it."""
    for start in range(border, stop if end_ids else border, READ_BYTES):
        ends = np.flatnonzero(np.isin(tokens[start : min(start + READ_BYTES, stop)], end_ids))
        if len(ends) and start + int(ends[0]) + 1 < stop:
            return start + int(ends[0]) + 1
    return border
