"""The first row that differs: its tensor on both sides, and what went into it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flax_decoder.comparison.jax_side import JaxSide, fit
from flax_decoder.comparison.observation import MASKED, Evidence
from flax_decoder.comparison.torch_side import PyTorchSide

Array = np.ndarray
# Both sides are in float64 here: what a mistake explains, it explains to more digits than float32 has.
TOLERANCE = 1e-6
PROJECTIONS = {"attention.q": "attention.query", "attention.k": "attention.key", "attention.v": "attention.value"}
INPUTS = {
    **dict.fromkeys(PROJECTIONS.values(), "attention_norm"),
    "attention.query_norm": "attention.query",
    "attention.key_norm": "attention.key",
    "attention.out": "attention.heads",
    "attention_output_norm": "attention.out",
    **dict.fromkeys(("feed_forward.gate", "feed_forward.up"), "feed_forward_norm"),
    "feed_forward.down": "feed_forward.hidden",
    "feed_forward_output_norm": "feed_forward.down",
}


@dataclass(frozen=True)
class Mismatch:
    """The first row that differs.

    Attributes:
        name: name of the row, such as layers.0.attention.q or step 1 params.
        worst: in a row of several parameters, the path of the one that differs most.
        evidence: both sides.
    """

    name: str
    worst: str | None
    evidence: Evidence

    @cached_property
    def kind(self) -> str:
        """The name without layer, step or parameter, such as gradient or attention.query_norm."""
        kind = re.sub(r"^layers\.\d+\.|^step \d+ |(?<=^gradient) .*|(?<=^clipped) .*", "", self.name)
        normed = kind in ("attention.q", "attention.k") and self.evidence.ours.config.normalises_before
        return PROJECTIONS.get(kind, kind) + ("_norm" if normed else "")

    @property
    def path(self) -> str:
        """Path of the row's parameter, such as layers/attention/query/kernel."""
        return self.worst or re.sub(r"\.\d+", "", self.name.removeprefix("clipped ")).replace(".", "/")

    @cached_property
    def ours(self) -> Array:
        """Our tensor; masked scores are 0."""
        return self._tensor(self.evidence.ours, self.evidence.our_forward)

    @cached_property
    def theirs(self) -> Array:
        """PyTorch's tensor; masked scores are 0."""
        return self._tensor(self.evidence.theirs, self.evidence.their_forward)

    @property
    def sides(self) -> tuple[tuple[str, Array, Array], ...]:
        """Each side: its word in a sentence, its tensor, and the other side's."""
        return ("ours", self.ours, self.theirs), ("PyTorch", self.theirs, self.ours)

    @property
    def masks(self) -> tuple[Array, Array]:
        """Where scores are not masked, on our side and on PyTorch's."""
        return self.evidence.our_forward[self.name] >= MASKED, self.evidence.their_forward[self.name] >= MASKED

    @cached_property
    def factor(self) -> float | None:
        """Ours is this many times PyTorch's; None if they are not proportional."""
        ours, theirs = self.evidence.ours, self.evidence.theirs
        if self.kind == "loss":
            return ours.loss / theirs.loss
        if self.kind != "gradient":
            return factor_between(self.ours, self.theirs)
        wanted = ("embedding", "final_norm/scale", "layers/attention/out/kernel")
        paths = [path for path in wanted if path in theirs.shapes]
        first, *rest = (factor_between(ours.array("gradient", path), theirs.array("gradient", path)) for path in paths)
        agree = first is not None and all(factor is not None and math.isclose(factor, first) for factor in rest)
        return first if agree else None

    def is_factor(self, *expected: float) -> bool:
        """Whether `factor` is one of these."""
        return self.factor is not None and any(math.isclose(self.factor, e, rel_tol=TOLERANCE) for e in expected)

    def input(self, name: str) -> Array:
        """A tensor of the same layer, on which both sides agree."""
        return self.evidence.their_forward[f"{self._prefix}{name}"]

    def has(self, name: str) -> bool:
        """Whether the model has this tensor."""
        return f"{self._prefix}{name}" in self.evidence.their_forward

    @property
    def residual(self) -> Array:
        """Input of the layer, or of the final norm."""
        layer = self.evidence.ours.config.num_layers if self._layer is None else self._layer
        return self.evidence.their_forward[f"layers.{layer - 1}.residual" if layer else "embeddings"]

    @property
    def attended(self) -> Array:
        """The residual stream between attention and feed-forward."""
        if self._is_post_norm:
            return self.input("attention_norm")
        return self.residual + self.scaled_write("attention.out")

    def write(self, projection: str) -> Array:
        """What attention.out or feed_forward.down writes to the residual stream, behind its norm if it has one."""
        norm = f"{projection.partition('.')[0]}_output_norm"
        return self.input(norm if self.has(norm) else projection)

    def scaled_write(self, projection: str) -> Array:
        """`write`, as many times as our model adds it."""
        return self.evidence.ours.config.residual_scale * self.write(projection)

    @property
    def x(self) -> Array:
        """Input of this norm or projection."""
        if self._is_post_norm and self.kind == "attention_norm":
            return self.residual + self.scaled_write("attention.out")
        if self._is_post_norm and self.kind == "feed_forward_norm":
            return self.attended + self.scaled_write("feed_forward.down")
        source = INPUTS.get(self.kind, "")
        if source == "feed_forward_norm" and self.evidence.ours.config.shared_norm:
            source = "attention_norm"
        if self.has(source) and not (self._is_post_norm and source in ("attention_norm", "feed_forward_norm")):
            return self.input(source)
        after_attention = "feed_forward" in self.kind and not self.evidence.ours.config.parallel_residual
        return self.attended if after_attention else self.residual

    def params(self, name: str, side: str = "theirs", module: str | None = None) -> Array:
        """A parameter of this norm or projection, or of another module beside it; if it is not there, one that does
        nothing: 0 for a bias, 1 for a scale."""
        path = f"{'' if self._layer is None else 'layers/'}{(module or self.kind).replace('.', '/')}/{name}"
        if path not in self.evidence.theirs.shapes:
            return np.ones(self.ours.shape[-1]) if name == "scale" else np.zeros(1)
        array: Array = getattr(self.evidence, side).array("params", path)
        return array if self._layer is None else array[self._layer]

    @property
    def _is_post_norm(self) -> bool:
        return self.evidence.ours.config.norm_position == "post"

    @property
    def _layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def _prefix(self) -> str:
        return "" if self._layer is None else f"layers.{self._layer}."

    def _tensor(self, side: JaxSide | PyTorchSide, forward: dict[str, Array]) -> Array:
        if self.name not in forward:
            return side.array(self.kind, self.path)
        array = forward[self.name]
        return np.where(array >= MASKED, array, 0) if self.kind == "attention.scores" else array


# Whether a row has a known cause; a dictionary fills in its sentence.
Found = dict[str, Any] | bool
Test = Callable[[Mismatch], Found]


def same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two arrays are equal up to rounding."""
    if np.shape(ours) != np.shape(theirs):
        return False
    difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max(initial=0)
    return bool(difference <= tolerance * np.abs(theirs).max(initial=0))


def factor_between(ours: Array, theirs: Array) -> float | None:
    """The factor with which ours = factor * theirs; None if there is none."""
    (factor,) = fit(ours, theirs)
    return factor if same(ours, factor * theirs) else None
