"""What a cause is looked for in: both sides in the middle of a comparison."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_decoder.interop.jax_side import JaxSide
from flax_decoder.interop.torch_side import PyTorchSide

Array = np.ndarray
# Both sides are in float64 here; what a mistake explains, it explains to more digits than float32 has.
TOLERANCE = 1e-6


@dataclass
class Evidence:
    """Both sides in the middle of a comparison, in float64.

    Attributes:
        ours: our side, at the row in question.
        theirs: PyTorch's.
        our_forward: all tensors of our forward pass, by name.
        their_forward: the same of PyTorch's.
        batch: the "inputs" and "targets" of the forward pass and of the first gradients.
    """

    ours: JaxSide
    theirs: PyTorchSide
    our_forward: dict[str, Array]
    their_forward: dict[str, Array]
    batch: dict[str, Array]


def same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two arrays are equal but for rounding."""
    if np.shape(ours) != np.shape(theirs):
        return False
    difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max(initial=0)
    return bool(difference <= tolerance * np.abs(theirs).max(initial=0))
