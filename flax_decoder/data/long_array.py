"""An array that lies in several files."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Shards:
    """A long one-dimensional array in several files: indexed by slices and by arrays of indices, as NumPy's are.

    Attributes:
        dtype: of the numbers.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])
        self.dtype = arrays[0].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._arrays).astype(dtype or self.dtype, copy=False)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return self[np.arange(*index.indices(len(self)))]
        indices = np.asarray(index)
        result = np.empty(indices.shape, self.dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            chosen = shards == shard
            result[chosen] = self._arrays[shard][indices[chosen] - self._starts[shard]]
        return result
