"""Packs arrays into a page: rounded to decimals, deflated, in base64.

Every number is multiplied by a power of ten and rounded to an integer; the page shows exactly these decimals. The sign
becomes the lowest bit (zigzag), and bytes are stored by significance: the high bytes of small numbers are zeros, which
compress well. `page_parts/unpack.js` is the inverse.
"""

import base64
import zlib
from typing import Any

import numpy as np

# Arrays up to this size keep all their decimals.
SMALL_BYTES = 200_000
# JavaScript's integers are exact up to 2^53, one bit of which is the sign.
MAX_INTEGER = 2.0**52


def pack(array: np.ndarray, decimals: int, bits: float | None = None) -> dict[str, Any]:
    """Packs an array.

    Args:
        array: finite numbers.
        decimals: how many to keep; fewer are kept if numbers are too large for them.
        bits: the average size of a number after compression; fewer decimals are kept to reach it, down to none, unless
            the array is small.

    Returns:
        JSON values: shape, decimals, planes (bytes per number), data.
    """
    values = np.asarray(array, np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    while decimals > 0 and largest * 10.0**decimals > MAX_INTEGER:
        decimals -= 1
    content, planes = _deflate(values, decimals)
    max_bytes = np.inf if bits is None else max(bits / 8 * values.size, SMALL_BYTES)
    while decimals > 0 and len(content) > max_bytes:
        decimals -= 1
        content, planes = _deflate(values, decimals)
    data = base64.b64encode(content).decode()
    return {"shape": list(values.shape), "decimals": decimals, "planes": planes, "data": data}


def _deflate(values: np.ndarray, decimals: int) -> tuple[bytes, int]:
    """The compressed bytes, and the number of bytes per integer."""
    integers = np.rint(values * 10.0**decimals).clip(-MAX_INTEGER, MAX_INTEGER).astype(np.int64).ravel()
    unsigned = (2 * integers ^ integers >> 63).astype("<u8")
    num_planes = max((int(unsigned.max(initial=0)).bit_length() + 7) // 8, 1)
    planes = unsigned.view(np.uint8).reshape(-1, 8)[:, :num_planes].T
    return zlib.compress(planes.tobytes(), 6), num_planes
