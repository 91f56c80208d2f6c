"""Arrays as text, small enough to stand in a page: rounded to decimals, deflated, in base64.

Each number becomes an integer: times a power of ten, rounded. So a page that shows that many decimals shows the array's
own. The sign goes to the lowest bit, and all lowest bytes stand first, then all second ones: the high bytes of small
numbers are zeros, which deflate to nothing. `page_parts/unpack.js` undoes it.
"""

import base64
import zlib
from typing import Any

import numpy as np

# The size of an array that need not be made any smaller, in bytes.
SMALL_BYTES = 200_000
# The integers of JavaScript are exact up to 2^53.
MOST = 2.0**52


def pack(array: np.ndarray, decimals: int, bits: float | None = None) -> dict[str, Any]:
    """Packs an array.

    Args:
        array: finite numbers.
        decimals: how many are kept, if they fit.
        bits: how many a number may take on average, after deflating. Where it would be more, and the array is not small
            anyway, fewer decimals are kept, down to none.

    Returns:
        What JSON can hold: shape, decimals, planes (bytes a number), data.
    """
    values = np.asarray(array, np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    while decimals > 0 and largest * 10.0**decimals > MOST:
        decimals -= 1
    content, planes = _deflate(values, decimals)
    most_bytes = np.inf if bits is None else max(bits / 8 * values.size, SMALL_BYTES)
    while decimals > 0 and len(content) > most_bytes:
        decimals -= 1
        content, planes = _deflate(values, decimals)
    data = base64.b64encode(content).decode()
    return {"shape": list(values.shape), "decimals": decimals, "planes": planes, "data": data}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array that a page shows."""
    content = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8).astype(np.uint64)
    planes = content.reshape(packed["planes"], -1)
    unsigned = sum((plane << np.uint64(8 * place) for place, plane in enumerate(planes)), np.zeros(1, np.uint64))
    integers = (unsigned >> np.uint64(1)).astype(np.int64) ^ -(unsigned & np.uint64(1)).astype(np.int64)
    return (integers / 10.0 ** packed["decimals"]).reshape(packed["shape"])


def _deflate(values: np.ndarray, decimals: int) -> tuple[bytes, int]:
    """The integers' bytes, deflated, and how many each has."""
    integers = np.rint(values * 10.0**decimals).clip(-MOST, MOST).astype(np.int64).ravel()
    unsigned = (2 * integers ^ integers >> 63).astype("<u8")
    num_planes = max((int(unsigned.max(initial=0)).bit_length() + 7) // 8, 1)
    planes = unsigned.view(np.uint8).reshape(-1, 8)[:, :num_planes].T
    return zlib.compress(planes.tobytes(), 6), num_planes
