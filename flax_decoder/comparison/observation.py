"""Both sides taken through the same computation, and what they hold at each tensor on the way."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flax_decoder.comparison.evidence import MASKED, Evidence
from flax_decoder.comparison.jax_side import JaxSide
from flax_decoder.comparison.torch_side import PyTorchSide
from flax_decoder.config import ModelConfig

# What a layer computes, in this order; a model has only some of them.
OF_A_LAYER = (
    *("attention_norm", "attention.query", "attention.key", "attention.q", "attention.k", "attention.v"),
    *("attention.q_rotated", "attention.k_rotated", "attention.scores", "attention.weights", "attention.heads"),
    *("attention.out", "attention_output_norm", "feed_forward_norm", "feed_forward.gate", "feed_forward.up"),
    *("feed_forward.hidden", "feed_forward.down", "feed_forward_output_norm", "residual"),
)
EPSILON = 2.0**-23  # of float32
# What rounding was seen to leave in the gradients and in ten AdamW steps of some forty small models, times three.
GRADIENT_FLOOR = 1e-5
MOMENTS_FLOOR = 4e-5
# Our learning rate is computed in float32, and read off the parameters with some loss.
RATE_FLOOR = 1e-4
# What is still there in float64 and larger than two roundings of float32 is a difference. In training somewhat more: an
# optimizer that counts its steps in float32 does so always.
DIFFERENCE = 2 * EPSILON
TRAINING_DIFFERENCE = 3e-6
# A gradient is zero, and what stands there rounding, below this part of the largest gradient in float64.
ZERO_GRADIENT = 1e-8

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Seen:
    """What makes one row: a tensor on both sides, or several of which the worst counts.

    Attributes:
        name: of the row.
        tensors: name, ours and PyTorch's; some are made only when they are asked for, so they can be had once.
        floor: the relative difference expected of rounding.
        evidence: both sides.
        difference: the relative difference that counts as one in float64.
        smallest: tensors whose largest number is under this are compared with this instead.
    """

    name: str
    tensors: Iterable[tuple[str, Any, Any]]
    floor: float
    evidence: Evidence
    difference: float = DIFFERENCE
    smallest: float = 0.0


class Distance(NamedTuple):
    """How far apart a tensor is on both sides: over the largest number of PyTorch's, and as it stands."""

    relative: float
    absolute: float
    largest: float
    name: str
    shape: tuple[int, ...]


def observe(ours: JaxSide, theirs: PyTorchSide, batches: Sequence[Batch], steps: int) -> Iterator[Seen]:
    """Takes both sides through the same computation and yields its tensors in their order."""
    first = batches[0]
    evidence = Evidence(ours, theirs, ours.forward(first["inputs"]), theirs.forward(first["inputs"]), first)
    for name, floor in forward_rows(evidence.our_forward, ours.config):
        # A tensor that PyTorch does not have is as far apart as can be.
        pair = "", evidence.our_forward[name], evidence.their_forward.get(name, np.nan)
        yield Seen(name, [pair], floor, evidence)
    yield from _gradients(evidence)
    for step in range(1, steps + 1):
        if step > 1:
            for side in (ours, theirs):
                side.backward(batches[step - 1])
            yield Seen(f"step {step} loss", [("", ours.loss, theirs.loss)], GRADIENT_FLOOR, evidence)
            for side in (ours, theirs):
                side.update()
        yield from _update(f"step {step}", evidence)


def _gradients(evidence: Evidence) -> Iterator[Seen]:
    """The loss, its gradients, their length, and what clipping leaves of them; ends after the first update."""
    ours, theirs = evidence.ours, evidence.theirs
    for side in (ours, theirs):
        side.backward(evidence.batch)
    yield Seen("loss", [("", ours.loss, theirs.loss)], EPSILON * (8 + ours.config.num_layers), evidence)
    evidence.largest_gradient = max(largest_of(theirs.array("gradient", path)) for path in theirs.shapes)
    smallest = ZERO_GRADIENT * evidence.largest_gradient
    for path in theirs.shapes:
        pair = ours.array("gradient", path), theirs.array("gradient", path)
        for name, our_part, their_part in by_layer(path, *pair):
            yield Seen(f"gradient {name}", [("", our_part, their_part)], GRADIENT_FLOOR, evidence, smallest=smallest)
    # The length of all gradients is a sum of so many squares, one after the other.
    floor = GRADIENT_FLOOR + EPSILON * math.sqrt(max(math.prod(shape) for shape in theirs.shapes.values()))
    yield Seen("gradient norm", [("", ours.gradient_norm, theirs.gradient_norm)], floor, evidence)
    for side in (ours, theirs):
        side.update()
    for path in theirs.shapes:
        pair = ours.array("clipped gradient", path), theirs.array("gradient", path)
        for name, our_part, their_part in by_layer(path, *pair):
            yield Seen(f"clipped {name}", [("", our_part, their_part)], floor, evidence, smallest=smallest)


def _update(step: str, evidence: Evidence) -> Iterator[Seen]:
    """What the last update did."""
    ours, theirs, largest = evidence.ours, evidence.theirs, evidence.largest_gradient

    def both(kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        return ((path, ours.array(kind, path), theirs.array(kind, path)) for path in theirs.shapes)

    for kind, scale in (("first moment", largest), ("second moment", largest**2)):
        smallest = ZERO_GRADIENT * scale
        yield Seen(f"{step} {kind}", both(kind), MOMENTS_FLOOR, evidence, TRAINING_DIFFERENCE, smallest)
    rates = "", ours.learning_rate, theirs.learning_rate
    yield Seen(f"{step} learning rate", [rates], RATE_FLOOR, evidence, TRAINING_DIFFERENCE)
    yield Seen(f"{step} params", both("params"), GRADIENT_FLOOR, evidence, TRAINING_DIFFERENCE)


def forward_rows(forward: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, float]]:
    """Names of the tensors of a forward pass in the order in which they are computed, and the floor of each."""

    def floor(layer: int) -> float:
        # Roundings add up as the steps of a random walk do; measured for widths to 1,536 and 30 layers.
        return 12 * EPSILON * math.sqrt(1 + layer / 4) * max(1, config.embed_dim / 64) ** 0.25

    yield "embeddings", 2 * EPSILON
    for layer in range(config.num_layers):
        for name in OF_A_LAYER:
            full = f"layers.{layer}.{name}"
            # Without a norm of queries and keys, the projections are q and k.
            is_twin = name in ("attention.query", "attention.key") and config.qk_norm == "none"
            if full in forward and not is_twin:
                yield full, floor(layer)
    yield "final_norm", floor(config.num_layers)
    yield "logits", floor(config.num_layers)


def by_layer(path: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """A parameter's array on both sides, layer by layer, with the name of each."""
    name = path.replace("/", ".")
    if not path.startswith("layers/"):
        yield name, ours, theirs
        return
    for layer, parts in enumerate(zip(ours, theirs, strict=True)):
        yield name.replace("layers.", f"layers.{layer}.", 1), *parts


def furthest(seen: Seen) -> Distance:
    """The tensor of a row that is furthest apart."""

    def distances() -> Iterator[Distance]:
        for name, ours, theirs in seen.tensors:
            difference, largest, shape = _difference(np.asarray(ours), np.asarray(theirs))
            relative = difference / max(largest, seen.smallest) if difference > 0 else 0.0
            yield Distance(relative, difference, largest, name, shape)

    return max(distances(), key=lambda distance: distance.relative)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, tuple[int, ...]]:
    """The largest difference, the largest number of theirs, and the shape; infinity where no number can be compared.

    Scores behind a mask are minus infinity here and the lowest number there: the two are the same.
    """
    if ours.shape != theirs.shape:
        return np.inf, 1.0, ours.shape
    if ours.size > 0 and min(ours.min(), theirs.min()) < MASKED:
        masked = ours < MASKED
        if (masked != (theirs < MASKED)).any():
            return np.inf, 1.0, ours.shape
        ours, theirs = np.where(masked, 0, ours), np.where(masked, 0, theirs)
    difference, scale = largest_of(ours - theirs), largest_of(theirs)
    # NaN is never equal to anything, and a model that computes it agrees with nothing.
    return (difference, scale, ours.shape) if np.isfinite(difference) else (np.inf, 1.0, ours.shape)


def largest_of(array: np.ndarray) -> float:
    """The largest absolute number, without a second array of its size."""
    return max(float(array.max()), -float(array.min())) if array.size > 0 else 0.0
