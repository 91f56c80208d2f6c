"""PyTorch and JAX side by side, tensor by tensor: which is the first that differs, and why."""

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optax

from flax_decoder.config import ModelConfig, OptimizerConfig
from flax_decoder.errors import UserError
from flax_decoder.interop.causes import IMPRECISE, explain
from flax_decoder.interop.evidence import Evidence
from flax_decoder.interop.family import Family
from flax_decoder.interop.jax_side import JaxSide
from flax_decoder.interop.torch_side import PyTorchSide
from flax_decoder.interop.weights import flatten, unflatten
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.optimizer import make_optimizer

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
# In the forward pass rounding to float32 does not add up to this; to the shorter numbers of TF32 and bfloat16 it does.
LARGEST_ROUNDING = 5e-5
# A gradient is zero, and what stands there rounding, below this part of the largest gradient in float64.
ZERO_GRADIENT = 1e-8
# Longer sequences, for the sake of a window, take more memory and time than a first look should.
MOST_TOKENS = 256
# Numbers under this stand for a mask.
MASKED = -1e30
NAME_WIDTH = 45

Batch = dict[str, np.ndarray]
Verdict = Literal["holds", "rounding", "zero", "imprecise", "DIFFERS"]
VERDICTS: dict[Verdict, str] = {
    "holds": "no further apart than float32 rounds",
    "rounding": "further apart, and gone in float64: rounding, magnified",
    "zero": "the true gradient is zero: both sides hold rounding",
    "imprecise": "gone in float64, but more than float32 rounds",
    "DIFFERS": "still there in float64",
}


@dataclass(frozen=True)
class Row:
    """One tensor, on both sides.

    Attributes:
        name: where it is, such as layers.0.attention.q.
        shape: its shape.
        absolute: largest absolute difference.
        relative: the same over the largest number of PyTorch's tensor.
        floor: the relative difference that rounding to float32 is expected to leave.
        float64: the relative difference in float64; None where it was not needed.
        verdict: one of `VERDICTS`.
        worst: of several tensors in one row, the one that is furthest apart.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    floor: float
    float64: float | None = None
    verdict: Verdict = "holds"
    worst: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the two sides agree."""
        return self.verdict in ("holds", "rounding", "zero")


@dataclass(frozen=True)
class Ledger:
    """The rows in the order of computation, and what they amount to.

    Attributes:
        rows: one a tensor.
        cause: why the first row that does not hold is off, as far as can be told; None where all hold.
        notes: what a reader should know about this comparison.
    """

    rows: tuple[Row, ...]
    cause: str | None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return self.first_failure is None

    @property
    def first_failure(self) -> Row | None:
        """The first row that does not hold."""
        return next((row for row in self.rows if not row.holds), None)

    @property
    def conclusion(self) -> str:
        """One sentence: all hold, or the first row that does not and the likely cause."""
        first = self.first_failure
        if first is None:
            return f"All {len(self.rows)} rows hold."
        failing = sum(not row.holds for row in self.rows)
        return f"{failing} of {len(self.rows)} rows do not hold; the first is {first.name}: {self.cause}"

    def to_json(self) -> str:
        """The same for machines."""
        document = {
            "holds": self.holds,
            "conclusion": self.conclusion,
            "first_failure": self.first_failure.name if self.first_failure else None,
            "cause": self.cause,
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        # JSON knows no infinity; a mask that differs has one.
        return json.dumps(_without_infinities(document), indent=1)

    def __str__(self) -> str:
        """The table, at most 100 columns wide."""
        lines = [_line("tensor", "shape", "largest", "relative", "floor", "float64", "verdict")]
        for row in self.rows:
            worst = f": {row.worst.replace('/', '.')}" if row.worst and row.verdict != "holds" else ""
            numbers = (row.absolute, row.relative, row.floor, *([] if row.float64 is None else [row.float64]))
            absolute, relative, floor, exact = [*(f"{number:.1e}" for number in numbers), ""][:4]
            shape = "x".join(map(str, row.shape)) or "1"
            lines.append(_line(row.name + worst, shape, absolute, relative, floor, exact, row.verdict))
        used = [verdict for verdict in VERDICTS if any(row.verdict == verdict for row in self.rows)]
        notes = [*(f"{verdict}: {VERDICTS[verdict]}." for verdict in used if verdict != "holds"), *self.notes]
        wrapped = [line for note in [*notes, self.conclusion] for line in textwrap.wrap(note, 100)]
        return "\n".join([*lines, "", *wrapped])


def compare_models(
    model: Decoder,
    params: Any,
    torch_model: Any,
    family: Family,
    *,
    steps: int = 0,
    tx: optax.GradientTransformation | None = None,
    optimizer: OptimizerConfig | None = None,
    batch_size: int = 2,
    length: int | None = None,
    accumulation_steps: int = 2,
    seed: int = 0,
) -> Ledger:
    """Runs a model of `transformers` and ours on the same batches, and compares every tensor on the way.

    Where a row is further apart than float32 rounds, all is computed again in float64 on both sides: rounding then
    shrinks by orders of magnitude, a bug does not.

    Args:
        model: ours.
        params: its parameters.
        torch_model: theirs; it stays as it is.
        family: what its tensors are called.
        steps: AdamW steps to compare, after the forward pass and the gradients.
        tx: our optimizer; left out, that of `optimizer`.
        optimizer: what PyTorch's AdamW, its schedule and its clipping are set to; left out, a short run with a warm-up,
            in which clipping acts.
        batch_size: B, a multiple of `accumulation_steps`.
        length: T, tokens a sequence; left out, 64 or what a window or the context makes of it.
        accumulation_steps: our gradient of a batch is computed in this many parts, PyTorch's in one.
        seed: of the random tokens.

    Raises:
        UserError: settings that cannot be compared.
    """
    length = _check_length(model, length)
    if batch_size % accumulation_steps != 0 or batch_size < 1 or steps < 0:
        raise UserError(
            f"batch_size = {batch_size} must be a positive multiple of accumulation_steps = {accumulation_steps}, and "
            f"steps = {steps} not negative"
        )
    if optimizer is not None and optimizer.name != "adamw":
        raise UserError(f'optimizer.name = "{optimizer.name}" has no counterpart in PyTorch; use "adamw"')
    batches = [_batch(model, batch_size, length, seed + step) for step in range(max(steps, 1))]
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}

    def sides(settings: OptimizerConfig, exact: bool) -> tuple[JaxSide, PyTorchSide]:
        theirs = PyTorchSide(torch_model, family, model.config, shapes, settings, len(batches), exact=exact)
        own_params = unrounded(params, theirs) if exact else params
        own_tx = tx or make_optimizer(settings, len(batches))
        ours = JaxSide(model, own_params, own_tx, settings, accumulation_steps=accumulation_steps, exact=exact)
        return ours, theirs

    optimizer = optimizer or default_optimizer(len(batches))
    rows = [first_look(seen) for seen in observe(*sides(optimizer, False), batches, steps)]
    notes, cause = _notes(model, length), None
    if any(row.relative > row.floor for row in rows):
        ours, theirs = sides(optimizer, True)
        again = observe(ours, theirs, batches, steps)
        for number, seen in enumerate(again):
            rows[number] = row = second_look(rows[number], seen)
            if not row.holds and cause is None:
                cause = IMPRECISE if row.verdict == "imprecise" else explain(row.name, row.worst, seen.evidence)
        if theirs.casts:
            notes.append(f"In float64, casts to float32 were lifted in: {', '.join(theirs.casts)}.")
    return Ledger(tuple(rows), cause, tuple(notes))


def unrounded(params: Any, theirs: PyTorchSide) -> Any:
    """Our parameters in float64, with the digits that adding an offset to PyTorch's in float32 rounded away."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    for path in {path for rule in theirs.family.all_rules if rule.offset != 0 for path in rule.ours} & leaves.keys():
        exact = theirs.array("params", path)
        leaves[path] = np.where(exact.astype(np.float32) == leaves[path], exact, leaves[path])
    return unflatten(leaves)


def default_optimizer(num_steps: int) -> OptimizerConfig:
    """A run in miniature: warm-up, decay and clipping all act within a few steps."""
    return OptimizerConfig(learning_rate=1e-3, warmup_steps=min(3, num_steps - 1), clip_norm=0.1, weight_decay=0.1)


def _check_length(model: Decoder, length: int | None) -> int:
    """Tokens a sequence: enough that a window acts where that costs little, and never as many as there are heads."""
    config = model.config
    windows = [window for window in config.windows if window is not None and window <= MOST_TOKENS - 8]
    wanted = max([64, *(window + 8 for window in windows)]) if length is None else length
    wanted = min(wanted, config.context_length) if length is None else wanted
    if wanted in (config.num_heads, config.kv_heads):
        if length is not None:
            raise UserError(f"length = {length} is also a number of heads, so the two could be mistaken; take another")
        wanted -= 1
    if not 2 <= wanted <= config.context_length:
        raise UserError(f"length = {wanted} tokens must be from 2 to the context of {config.context_length}")
    return wanted


def _batch(model: Decoder, batch_size: int, length: int, seed: int) -> Batch:
    """Random tokens, each but the first a target."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size or 0, (batch_size, length + 1))
    return {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}


def _notes(model: Decoder, length: int) -> list[str]:
    config, notes = model.config, []
    windows = {window for window in config.windows if window is not None and window >= length}
    if windows:
        notes.append(f"A window of {min(windows)} tokens was not reached by {length} tokens; give a larger length.")
    if config.dropout > 0:
        notes.append("Dropout was left out: no two libraries draw alike.")
    return notes


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _line(name: str, shape: str, absolute: str, relative: str, floor: str, exact: str, verdict: str) -> str:
    name = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"
    return f"{name:<{NAME_WIDTH}}{shape:>13} {absolute:>7} {relative:>8} {floor:>7} {exact:>7} {verdict}"


# --- What is looked at ---


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
    largest = max(float(np.abs(theirs.array("gradient", path)).max()) for path in paths)
    for kind in ("gradient", "clipped gradient"):
        for path in paths:
            for name, *pair in by_layer(path, ours.array(kind, path), theirs.array("gradient", path)):
                tensors = "", pair[0], pair[1]
                row = f"{kind.split()[0]} {name}"
                yield see(row, GRADIENT_FLOOR, tensors, smallest=ZERO_GRADIENT * largest)
        if kind == "gradient":
            yield see("gradient norm", GRADIENT_FLOOR, ("", ours.gradient_norm, theirs.gradient_norm))
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
    yield "embeddings", 2 * EPSILON
    for layer in range(config.num_layers):
        for name in OF_A_LAYER:
            full = f"layers.{layer}.{name}"
            # Without a norm of queries and keys, the projections are q and k.
            is_twin = name in ("attention.query", "attention.key") and config.qk_norm == "none"
            if full in forward and not is_twin:
                yield full, EPSILON * 8 * (1 + layer)
    yield "final_norm", EPSILON * 8 * (1 + config.num_layers)
    yield "logits", EPSILON * 8 * (1 + config.num_layers)


def by_layer(path: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """A parameter's array on both sides, layer by layer, with the name of each."""
    name = path.replace("/", ".")
    if not path.startswith("layers/"):
        yield name, ours, theirs
        return
    for layer, parts in enumerate(zip(ours, theirs, strict=True)):
        yield name.replace("layers.", f"layers.{layer}.", 1), *parts


# --- How far apart it is ---


def first_look(seen: Seen) -> Row:
    """The row of what was seen in float32."""
    relative, absolute, worst, shape = max(_compared(seen), key=lambda one: one[0])
    return Row(seen.name, shape, absolute, relative, seen.floor, worst=worst or None)


def second_look(row: Row, seen: Seen) -> Row:
    """The row, judged by what was seen of the same in float64."""
    exact, _, worst, _ = max(_compared(seen), key=lambda one: one[0])
    largest = max(float(np.abs(theirs).max(initial=0)) for _, _, theirs in seen.tensors)
    verdict: Verdict = "holds"
    if exact > seen.difference:
        verdict = "DIFFERS"
        row = dataclasses.replace(row, worst=worst or None)
    elif row.name.startswith(("gradient", "clipped")) and largest < seen.smallest:
        verdict = "zero"
    elif row.relative > LARGEST_ROUNDING and " " not in row.name and row.name != "loss":
        verdict = "imprecise"
    elif row.relative > row.floor:
        verdict = "rounding"
    return dataclasses.replace(row, float64=exact, verdict=verdict)


def _compared(seen: Seen) -> Iterator[tuple[float, float, str, tuple[int, ...]]]:
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
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    masked, their_masked = ours < MASKED, theirs < MASKED
    if (masked != their_masked).any():
        return np.inf, 1.0, ours.shape
    difference = np.abs(np.where(masked, 0, ours) - np.where(masked, 0, theirs)).max(initial=0)
    scale = np.abs(np.where(masked, 0, theirs)).max(initial=0)
    # NaN is never equal to anything, and a model that computes it agrees with nothing.
    return (float(difference), float(scale), ours.shape) if np.isfinite(difference) else (np.inf, 1.0, ours.shape)
