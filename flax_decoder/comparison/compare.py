"""PyTorch and JAX side by side, tensor by tensor: which is the first that differs, and why."""

import dataclasses
from typing import Any

import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from flax_decoder.comparison.causes import IMPRECISE, explain
from flax_decoder.comparison.jax_side import JaxSide
from flax_decoder.comparison.ledger import Ledger, Row, Verdict
from flax_decoder.comparison.observation import Batch, Seen, furthest, observe
from flax_decoder.comparison.torch_side import PyTorchSide
from flax_decoder.config import OptimizerConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.weights import flatten
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.optimizer import make_optimizer

# In the forward pass rounding to float32 does not add up to this; to the shorter numbers of TF32 and bfloat16 it does.
LARGEST_ROUNDING = 5e-5
# Longer sequences, for the sake of a window, take more memory and time than a first look should.
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
    if optimizer is not None and optimizer.moments_dtype != "float32":
        raise UserError(f'optimizer.moments_dtype = "{optimizer.moments_dtype}" has no counterpart in PyTorch')
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
    for path in {path for rule in theirs.family.all_rules if rule.offset != 0 for path in rule.paths} & leaves.keys():
        exact = theirs.array("params", path)
        leaves[path] = np.where(exact.astype(np.float32) == leaves[path], exact, leaves[path])
    return unflatten_dict(leaves, sep="/")


def default_optimizer(num_steps: int) -> OptimizerConfig:
    """A run in miniature: warm-up, decay and clipping all act within a few steps."""
    return OptimizerConfig(learning_rate=1e-3, warmup_steps=min(3, num_steps - 1), clip_norm=0.1, weight_decay=0.1)


def first_look(seen: Seen) -> Row:
    """The row of what was seen in float32."""
    worst = furthest(seen)
    return Row(seen.name, worst.shape, worst.absolute, worst.relative, seen.floor, worst=worst.name or None)


def second_look(row: Row, seen: Seen) -> Row:
    """The row, judged by what was seen of the same in float64."""
    worst = furthest(seen)
    verdict: Verdict = "holds"
    if worst.relative > seen.difference:
        verdict = "DIFFERS"
        row = dataclasses.replace(row, worst=worst.name or None)
    elif row.name.startswith(("gradient", "clipped")) and worst.largest < seen.smallest:
        verdict = "zero"
    elif row.relative > LARGEST_ROUNDING and " " not in row.name and row.name != "loss":
        verdict = "imprecise"
    elif row.relative > row.floor:
        verdict = "rounding"
    return dataclasses.replace(row, float64=worst.relative, verdict=verdict)


def _check_length(model: Decoder, length: int | None) -> int:
    """Tokens a sequence: enough that a window acts where that costs little, and never as many as there are heads."""
    config = model.config
    windows = [window for window in config.windows if window is not None and window <= MAX_TOKENS - 8]
    wanted = length
    if wanted is None:
        wanted = min(max([64, *(window + 8 for window in windows)]), config.context_length)
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
