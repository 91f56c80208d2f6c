"""Runs both sides through the same computation, and yields every tensor on the way."""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flax_decoder.comparison.jax_side import JaxSide
from flax_decoder.comparison.torch_side import PyTorchSide
from flax_decoder.config import ModelConfig

# Tensors of a layer in the order of computation, unless norms come after the sums; a model has only some of them.
LAYER_TENSORS = (
    *("attention_norm", "attention.query", "attention.key", "attention.q", "attention.k", "attention.v"),
    *("attention.q_rotated", "attention.k_rotated", "attention.scores", "attention.weights", "attention.heads"),
    *("attention.out", "attention_output_norm", "feed_forward_norm", "feed_forward.gate", "feed_forward.up"),
    *("feed_forward.hidden", "feed_forward.down", "feed_forward_output_norm", "residual"),
)
EPSILON = 2.0**-23  # of float32
# Masked scores are below this: minus infinity here, the lowest number in PyTorch.
MASKED = -1e30
# Three times what rounding left in the gradients and in ten AdamW steps of some forty small models.
GRADIENT_FLOOR = 1e-5
MOMENTS_FLOOR = 4e-5
# Our learning rate is computed in float32, and read off the parameters with some loss.
RATE_FLOOR = 1e-4
# In float64, a difference above two roundings of float32 is real. In training the limit is higher: an optimizer that
# counts its steps in float32 always differs a little.
DIFFERENCE = 2 * EPSILON
TRAINING_DIFFERENCE = 3e-6
# A gradient below this part of the largest one is zero, and what is left of it in float64 is rounding.
ZERO_GRADIENT = 1e-8

Batch = dict[str, np.ndarray]


@dataclass
class Evidence:
    """Both sides in the middle of a comparison.

    Attributes:
        ours: our side, as it is at the current row.
        theirs: PyTorch's side.
        our_forward: all tensors of our forward pass, by name.
        their_forward: those of PyTorch's; ours, where they are not recorded.
        batch: the "inputs" and "targets" of the forward pass and of the first gradients.
        recorded: names of those that are PyTorch's.
    """

    ours: JaxSide
    theirs: PyTorchSide
    our_forward: dict[str, np.ndarray]
    their_forward: dict[str, np.ndarray]
    batch: Batch
    recorded: frozenset[str]


@dataclass(frozen=True)
class Observation:
    """The numbers behind a row: one tensor on both sides, or several of which the one that differs most counts.

    Attributes:
        name: name of the row.
        tensors: (name, ours, PyTorch's); an iterator that makes them on demand can be read only once.
        floor: the relative difference expected of rounding.
        evidence: both sides.
        difference: the relative difference that is real in float64.
        smallest: tensors whose largest number is below this are compared with this instead.
    """

    name: str
    tensors: Iterable[tuple[str, Any, Any]]
    floor: float
    evidence: Evidence
    difference: float = DIFFERENCE
    smallest: float = 0.0


class Distance(NamedTuple):
    """The largest difference of a tensor: relative to the largest number of PyTorch's, and absolute."""

    relative: float
    absolute: float
    largest: float
    name: str
    shape: tuple[int, ...]


def observe(ours: JaxSide, theirs: PyTorchSide, batches: Sequence[Batch], steps: int) -> Iterator[Observation]:
    """Runs both sides through the same computation and yields its tensors in order."""
    inputs = batches[0]["inputs"]
    our_forward, their_forward = ours.forward(inputs), theirs.forward(inputs)
    # A cause is looked for in what goes into a tensor: where PyTorch's is not recorded, in ours.
    evidence = Evidence(ours, theirs, our_forward, our_forward | their_forward, batches[0], frozenset(their_forward))
    for name, floor in forward_rows(our_forward, ours.config):
        is_hidden = theirs.may_hide and name not in their_forward
        if not is_hidden and name.rpartition(".")[2] not in theirs.unseen:
            # A tensor that PyTorch does not have differs infinitely.
            yield Observation(name, [("", our_forward[name], their_forward.get(name, np.nan))], floor, evidence)
    largest_gradient = yield from _gradients(evidence)
    for step in range(1, steps + 1):
        if step > 1:
            for side in (ours, theirs):
                side.backward(batches[step - 1])
            yield Observation(f"step {step} loss", [("", ours.loss, theirs.loss)], GRADIENT_FLOOR, evidence)
            for side in (ours, theirs):
                side.update()
        yield from _update(f"step {step}", evidence, largest_gradient)


def _gradients(evidence: Evidence) -> Generator[Observation, None, float]:
    """The loss, its gradients and their norm before and after clipping; returns the largest number in them."""
    ours, theirs = evidence.ours, evidence.theirs
    for side in (ours, theirs):
        side.backward(evidence.batch)
    loss_floor = EPSILON * (8 + ours.config.num_layers)
    yield Observation("loss", [("", ours.loss, theirs.loss)], loss_floor, evidence)
    largest = max(largest_of(theirs.array("gradient", path)) for path in theirs.shapes)

    def rows(kind: str, floor: float) -> Iterator[Observation]:
        for path, *pair in _both(evidence, kind):
            for name, our_part, their_part in by_layer(path, *pair):
                tensors = [("", our_part, their_part)]
                yield Observation(f"{kind} {name}", tensors, floor, evidence, smallest=ZERO_GRADIENT * largest)

    yield from rows("gradient", GRADIENT_FLOOR)
    # The norm of all gradients is one long sum of squares.
    floor = GRADIENT_FLOOR + EPSILON * math.sqrt(max(math.prod(shape) for shape in theirs.shapes.values()))
    yield Observation("gradient norm", [("", ours.gradient_norm, theirs.gradient_norm)], floor, evidence)
    for side in (ours, theirs):
        side.update()
    yield from rows("clipped", floor)
    return largest


def _update(step: str, evidence: Evidence, largest_gradient: float) -> Iterator[Observation]:
    """What the last update did."""

    def row(kind: str, floor: float, smallest: float = 0.0) -> Observation:
        tensors = _both(evidence, kind)
        return Observation(f"{step} {kind}", tensors, floor, evidence, TRAINING_DIFFERENCE, smallest)

    yield row("first moment", MOMENTS_FLOOR, ZERO_GRADIENT * largest_gradient)
    yield row("second moment", MOMENTS_FLOOR, ZERO_GRADIENT * largest_gradient**2)
    rates = [("", evidence.ours.learning_rate, evidence.theirs.learning_rate)]
    yield Observation(f"{step} learning rate", rates, RATE_FLOOR, evidence, TRAINING_DIFFERENCE)
    yield row("params", GRADIENT_FLOOR)


def _both(evidence: Evidence, kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """An array of each parameter on both sides, see `JaxSide.array`, with the parameter's path."""
    ours, theirs = evidence.ours, evidence.theirs
    return ((path, ours.array(kind, path), theirs.array(kind, path)) for path in theirs.shapes)


def forward_rows(forward: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, float]]:
    """Names of the tensors of a forward pass in the order of computation, and the floor of each."""

    def floor(layer: int) -> float:
        # Roundings add up as a random walk does; measured for widths up to 1,536 and 30 layers.
        return 12 * EPSILON * math.sqrt(1 + layer / 4) * max(1, config.embed_dim / 64) ** 0.25

    names = list(LAYER_TENSORS)
    if config.norm_position == "post":  # a norm after each sum
        for norm, last in (("attention_norm", "attention.out"), ("feed_forward_norm", "feed_forward.down")):
            names.remove(norm)
            names.insert(names.index(last) + 1, norm)
    yield "embeddings", 2 * EPSILON
    for layer in range(config.num_layers):
        for name in names:
            full = f"layers.{layer}.{name}"
            # Without a norm before the rotation of queries and keys, the projections are q and k.
            is_twin = name in ("attention.query", "attention.key") and not config.normalises_before
            if full in forward and not is_twin:
                yield full, floor(layer)
    if config.final_norm:
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


def furthest(observation: Observation) -> Distance:
    """The tensor that differs most."""
    distances = (_distance(*tensor, observation.smallest) for tensor in observation.tensors)
    return max(distances, key=lambda distance: distance.relative)


def _distance(name: str, ours: Any, theirs: Any, smallest: float) -> Distance:
    """The largest difference; infinity if the two cannot be compared."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    incomparable = Distance(np.inf, np.inf, 1.0, name, ours.shape)
    if ours.shape != theirs.shape:
        return incomparable
    if ours.size > 0 and min(ours.min(), theirs.min()) < MASKED:
        masked = ours < MASKED
        if (masked != (theirs < MASKED)).any():
            return incomparable
        ours, theirs = np.where(masked, 0, ours), np.where(masked, 0, theirs)
    difference, largest = largest_of(ours - theirs), largest_of(theirs)
    if not np.isfinite(difference):
        return incomparable  # NaN equals nothing, so a model that computes it agrees with nothing
    relative = difference / max(largest, smallest) if difference > 0 else 0.0
    return Distance(relative, difference, largest, name, ours.shape)


def largest_of(array: np.ndarray) -> float:
    """The largest absolute number, without a second array of its size."""
    return max(float(array.max()), -float(array.min())) if array.size > 0 else 0.0
