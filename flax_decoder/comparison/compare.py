"""Compares PyTorch and JAX tensor by tensor: which is the first that differs, and why."""

import dataclasses
import gc
from typing import Any

import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from flax_decoder.comparison.causes import IMPRECISE, explain
from flax_decoder.comparison.jax_side import JaxSide
from flax_decoder.comparison.ledger import Ledger, Row, Verdict
from flax_decoder.comparison.module_side import ForeignModule, ModuleSide
from flax_decoder.comparison.observation import Batch, Observation, furthest, observe
from flax_decoder.comparison.torch_decoder import TorchDecoder
from flax_decoder.comparison.torch_side import PyTorchSide, TwinSide
from flax_decoder.config import OptimizerConfig
from flax_decoder.errors import UserError, as_whole_number
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.weights import flatten
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.optimizer import make_optimizer

# Roundings of a forward pass in float32 stay below this; those of TF32 and bfloat16 exceed it.
MAX_ROUNDING = 5e-5
# A sequence is made longer so that a window acts, but not longer than this: time and memory grow with it.
MAX_TOKENS = 256


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
    """Runs a model of PyTorch and ours on the same batches, and compares every tensor on the way.

    If a row differs by more than float32 rounds, everything is computed again in float64 on both sides: rounding then
    shrinks by orders of magnitude, a bug does not.

    Args:
        torch_model: a model of `transformers`, a `TorchDecoder`, or what `open_module` makes of any other module; it is
            not changed.
        family: its tensor names.
        steps: see `fd.compare`.
        tx: our optimizer; None makes one from `optimizer`.
        optimizer: settings of PyTorch's AdamW, its schedule and its clipping; None means `default_optimizer`.
        batch_size: B, a multiple of `accumulation_steps`.
        length: T, tokens per sequence; None is 64, or what a window or the context requires.
        accumulation_steps: parts in which our gradient of a batch is computed; PyTorch computes it in one.
        seed: seed of the random tokens.

    Raises:
        UserError: settings that cannot be compared.
    """
    length = _check_length(model, length)
    steps, seed = as_whole_number("steps", steps, 0), as_whole_number("seed", seed, 0)
    batch_size = as_whole_number("batch_size", batch_size, 1)
    accumulation_steps = as_whole_number("accumulation_steps", accumulation_steps, 1)
    if batch_size % accumulation_steps != 0:
        raise UserError(f"batch_size = {batch_size} must be a multiple of accumulation_steps = {accumulation_steps}")
    if optimizer is not None and optimizer.name != "adamw":
        raise UserError(f'optimizer.name = "{optimizer.name}" has no counterpart in PyTorch; use "adamw"')
    if optimizer is not None and optimizer.moments_dtype != "float32":
        raise UserError(f'optimizer.moments_dtype = "{optimizer.moments_dtype}" has no counterpart in PyTorch')
    batches = [_batch(model, batch_size, length, seed + step) for step in range(max(steps, 1))]
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}

    optimizer = optimizer or default_optimizer(len(batches))
    tx = tx or make_optimizer(optimizer, len(batches))

    sides_of = {TorchDecoder: TwinSide, ForeignModule: ModuleSide}
    side = sides_of.get(type(torch_model), PyTorchSide)

    def sides(exact: bool) -> tuple[JaxSide, PyTorchSide]:
        theirs = side(torch_model, family, model.config, shapes, optimizer, len(batches), exact=exact)
        our_params = unrounded(params, theirs) if exact else params
        ours = JaxSide(model, our_params, tx, optimizer, accumulation_steps=accumulation_steps, exact=exact)
        return ours, theirs

    rows = [compare_float32(observation) for observation in observe(*sides(False), batches, steps)]
    notes, cause = _notes(model, length), None
    if any(row.relative > row.floor for row in rows):
        gc.collect()  # the sides of float32 take gigabytes, and may be parts of cycles
        ours, theirs = sides(True)
        for number, observation in enumerate(observe(ours, theirs, batches, steps)):
            rows[number] = row = compare_float64(rows[number], observation)
            if not row.passed and cause is None:
                imprecise = row.verdict == "imprecise"
                cause = IMPRECISE if imprecise else explain(row.name, row.worst, observation.evidence)
        if theirs.casts:
            notes.append(f"In float64, casts to float32 were lifted in: {', '.join(theirs.casts)}.")
        if theirs.inexact and cause is not None:
            notes.append(
                f"PyTorch's module computed {', '.join(theirs.inexact[:3])} in float32 when it was made: here a "
                "difference of 1e-6 may be rounding. Give a function that makes the module, and float64 is exact."
            )
    return Ledger(tuple(rows), cause, tuple(notes))


def unrounded(params: Any, theirs: PyTorchSide) -> Any:
    """Our parameters in float64, with the digits that were lost when an offset was added to PyTorch's in float32."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    for path in {path for rule in theirs.family.all_rules if rule.offset != 0 for path in rule.paths} & leaves.keys():
        exact = theirs.array("params", path)
        leaves[path] = np.where(exact.astype(np.float32) == leaves[path], exact, leaves[path])
    return unflatten_dict(leaves, sep="/")


def default_optimizer(num_steps: int) -> OptimizerConfig:
    """A run in miniature: warm-up, decay and clipping all act within a few steps."""
    return OptimizerConfig(learning_rate=1e-3, warmup_steps=min(3, num_steps - 1), clip_norm=0.1, weight_decay=0.1)


def compare_float32(observation: Observation) -> Row:
    """The row of an observation in float32."""
    worst = furthest(observation)
    name, floor = observation.name, observation.floor
    return Row(name, worst.shape, worst.absolute, worst.relative, floor, worst=worst.name or None)


def compare_float64(row: Row, observation: Observation) -> Row:
    """The row with a verdict, by the same observation in float64."""
    worst = furthest(observation)
    verdict: Verdict = "holds"
    if worst.relative > observation.difference:
        verdict = "DIFFERS"
        row = dataclasses.replace(row, worst=worst.name or None)
    elif row.name.startswith(("gradient", "clipped")) and worst.largest < observation.smallest:
        verdict = "zero"
    elif row.relative > MAX_ROUNDING and " " not in row.name and row.name != "loss":  # of the forward pass
        verdict = "imprecise"
    elif row.relative > row.floor:
        verdict = "rounding"
    return dataclasses.replace(row, float64=worst.relative, verdict=verdict)


def _check_length(model: Decoder, length: int | None) -> int:
    """Tokens per sequence: enough that a window acts if that is cheap, and never a number of heads."""
    config = model.config
    windows = [window for window in config.windows if window is not None and window <= MAX_TOKENS - 8]
    chosen = None if length is None else as_whole_number("length", length, 0)
    if chosen is None:
        chosen = min(max([64, *(window + 8 for window in windows)]), config.context_length)
    if chosen in (config.num_heads, config.kv_heads):
        if length is not None:
            raise UserError(f"length = {length} is also a number of heads, so axes could be mistaken; choose another")
        chosen -= 1
    if not 2 <= chosen <= config.context_length:
        raise UserError(f"length = {chosen} tokens must be from 2 to the context of {config.context_length}")
    return chosen


def _batch(model: Decoder, batch_size: int, length: int, seed: int) -> Batch:
    """Random tokens; the targets are the inputs shifted by one."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size or 0, (batch_size, length + 1))
    return {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}


def _notes(model: Decoder, length: int) -> list[str]:
    config, notes = model.config, []
    windows = {window for window in config.windows if window is not None and window >= length}
    if windows:
        notes.append(f"A window of {min(windows)} tokens has no effect within {length} tokens; give a larger length.")
    if config.dropout > 0:
        notes.append("Dropout was left out: no two libraries draw the same.")
    return notes
