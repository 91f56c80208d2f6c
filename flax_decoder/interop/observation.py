"""Both sides taken through the same computation, and what they hold at each tensor on the way."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.interop.evidence import MASKED, Evidence
from flax_decoder.interop.jax_side import JaxSide
from flax_decoder.interop.torch_side import PyTorchSide

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
# What is still there in float64 and larger than two roundings of float32 is a difference. In training our schedule,
# which is float32 always, leaves somewhat more.
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
        tensors: name, ours and PyTorch's.
        floor: the relative difference expected of rounding.
        difference: the relative difference that counts as one in float64.
        smallest: tensors whose largest number is under this are compared with this instead.
        evidence: both sides.
    """

    name: str
    tensors: Iterable[tuple[str, Any, Any]]
    floor: float
    difference: float
    smallest: float
    evidence: Evidence


def observe(ours: JaxSide, theirs: PyTorchSide, batches: Sequence[Batch], steps: int) -> Iterator[Seen]:
    """Takes both sides through the same computation and yields its tensors in their order."""
    tokens_BT = batches[0]["inputs"]
    first, depth = batches[0], ours.config.num_layers
    tokens_BT = first["inputs"]
    evidence = Evidence(ours, theirs, ours.forward(tokens_BT), theirs.forward(tokens_BT), first)

    def see(name: str, floor: float, *tensors: tuple[str, Any, Any], smallest: float = 0.0) -> Seen:
        difference = TRAINING_DIFFERENCE if name.startswith("step") else DIFFERENCE
        return Seen(name, tensors, floor, difference, smallest, evidence)

    for name, floor in forward_rows(evidence.our_forward, ours.config):
        # A tensor that PyTorch does not have is as far apart as can be.
        yield see(name, floor, ("", evidence.our_forward[name], evidence.their_forward.get(name, np.nan)))

    ours.backward(first)
    theirs.backward(first)
    yield see("loss", EPSILON * (8 + depth), ("", ours.loss, theirs.loss))
    paths = list(theirs.shapes)
    largest = max(largest_of(theirs.array("gradient", path)) for path in paths)
    # The length of all gradients is a sum of so many squares, one after the other.
    length_floor = GRADIENT_FLOOR + EPSILON * math.sqrt(max(math.prod(shape) for shape in theirs.shapes.values()))
    for kind in ("gradient", "clipped gradient"):
        for path in paths:
            for name, *pair in by_layer(path, ours.array(kind, path), theirs.array("gradient", path)):
                tensors = "", pair[0], pair[1]
                row = f"{kind.split()[0]} {name}"
                floor = GRADIENT_FLOOR if kind == "gradient" else length_floor
                yield see(row, floor, tensors, smallest=ZERO_GRADIENT * largest)
        if kind == "gradient":
            yield see("gradient norm", length_floor, ("", ours.gradient_norm, theirs.gradient_norm))
            ours.update()
            theirs.update()

    for step in range(1, steps + 1):
        if step > 1:
            ours.backward(batches[step - 1])
            theirs.backward(batches[step - 1])
            yield see(f"step {step} loss", GRADIENT_FLOOR, ("", ours.loss, theirs.loss))
            ours.update()
            theirs.update()

        def both(kind: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
            return [(path, ours.array(kind, path), theirs.array(kind, path)) for path in paths]

        for kind, smallest in (("first moment", largest), ("second moment", largest**2)):
            yield see(f"step {step} {kind}", MOMENTS_FLOOR, *both(kind), smallest=ZERO_GRADIENT * smallest)
        yield see(f"step {step} learning rate", RATE_FLOOR, ("", ours.learning_rate, theirs.learning_rate))
        yield see(f"step {step} params", GRADIENT_FLOOR, *both("params"))


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


def compared(seen: Seen) -> Iterator[tuple[float, float, str, tuple[int, ...]]]:
    """Relative and absolute difference, name and shape of each tensor of a row."""
    for name, ours, theirs in seen.tensors:
        difference, scale, shape = _difference(np.asarray(ours), np.asarray(theirs))
        yield (difference / max(scale, seen.smallest) if difference > 0 else 0.0), difference, name, shape


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
    difference, scale = float(largest_of(ours - theirs)), float(largest_of(theirs))
    # NaN is never equal to anything, and a model that computes it agrees with nothing.
    return (difference, scale, ours.shape) if np.isfinite(difference) else (np.inf, 1.0, ours.shape)


def largest_of(array: np.ndarray) -> float:
    """The largest absolute number, without a second array of its size."""
    return max(float(array.max()), -float(array.min())) if array.size > 0 else 0.0
