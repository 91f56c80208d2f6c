"""What a cause is looked for in: both sides in the middle of a comparison."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_decoder.comparison.jax_side import JaxSide
from flax_decoder.comparison.torch_side import PyTorchSide

Array = np.ndarray
# Both sides are in float64 here; what a mistake explains, it explains to more digits than float32 has.
TOLERANCE = 1e-6
# Scores under this are behind a mask: minus infinity here, the lowest number there.
MASKED = -1e30


@dataclass
class Evidence:
    """Both sides in the middle of a comparison, in float64.

    Attributes:
        ours: our side, at the row in question.
        theirs: PyTorch's.
        our_forward: all tensors of our forward pass, by name.
        their_forward: the same of PyTorch's.
        batch: the "inputs" and "targets" of the forward pass and of the first gradients.
        largest_gradient: largest absolute number in any of PyTorch's first gradients.
    """

    ours: JaxSide
    theirs: PyTorchSide
    our_forward: dict[str, Array]
    their_forward: dict[str, Array]
    batch: dict[str, Array]
    largest_gradient: float = 0.0


@dataclass
class Step:
    """One tensor of the forward pass: what went into it, and what came out on both sides."""

    ours: Array
    theirs: Array
    layer: str
    evidence: Evidence

    def input(self, name: str) -> Array:
        """A tensor of the same layer, on which both sides agree."""
        return self.evidence.their_forward[f"{self.layer}{name}"]

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return f"{self.layer}{name}" in self.evidence.their_forward

    @property
    def residual(self) -> Array:
        """What the layer read."""
        number = int(self.layer.split(".")[1])
        name = f"layers.{number - 1}.residual" if number else "embeddings"
        return self.evidence.their_forward[name]

    @property
    def attended(self) -> Array:
        """The residual stream between attention and feed-forward."""
        written = "attention_output_norm" if self.has("attention_output_norm") else "attention.out"
        return self.residual + self.input(written)

    def params(self, path: str, side: str = "theirs") -> Array | None:
        """A parameter of this layer, or of the whole model, in float64; None where a side has none."""
        owner: Any = getattr(self.evidence, side)
        full = f"layers/{path}" if self.layer else path
        if full not in self.evidence.theirs.shapes:
            return None
        array: Array = owner.array("params", full)
        return array[int(self.layer.split(".")[1])] if self.layer else array


def same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two arrays are equal but for rounding."""
    if np.shape(ours) != np.shape(theirs):
        return False
    difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max(initial=0)
    return bool(difference <= tolerance * np.abs(theirs).max(initial=0))
