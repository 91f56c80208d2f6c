"""Why a tensor differs from PyTorch's: known mistakes, each tried on the numbers.

The inputs of the first row that differs agree on both sides. A known mistake is the cause if making it with these
inputs gives what one side has.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable

import numpy as np

from flax_decoder.comparison.forward_causes import FORWARD
from flax_decoder.comparison.jax_side import fit
from flax_decoder.comparison.mismatch import TOLERANCE, Found, Mismatch, Test, same
from flax_decoder.comparison.observation import Evidence, forward_rows
from flax_decoder.comparison.schedule import learning_rate

IMPRECISE = (
    "reduced matmul precision: numbers are rounded to fewer digits than float32 has, as TF32 and bfloat16 do; set "
    "JAX_DEFAULT_MATMUL_PRECISION=highest, and model.dtype to float32"
)
UNKNOWN = "what goes into it agrees, so the mistake is in this step itself; it is none of the known ones"

HIDDEN = "the mistake is in this step, or in what PyTorch's module does not show: {}; it is none of the known ones"


def explain(name: str, worst: str | None, evidence: Evidence) -> str:
    """The likely cause of the first row that differs; see `Mismatch` for the arguments."""
    row = Mismatch(name, worst, evidence)
    for kinds, test, sentence in FORWARD if name in evidence.our_forward else TRAINING:
        found = test(row) if re.fullmatch(kinds, row.kind) else False
        if found:
            fields = {"row": row, "ours": evidence.ours, "theirs": evidence.theirs}
            return sentence.format_map(fields | found if isinstance(found, dict) else fields)
    hidden = _hidden_before(name, evidence)
    return HIDDEN.format(", ".join(hidden)) if hidden else UNKNOWN


def _hidden_before(name: str, evidence: Evidence) -> list[str]:
    """What is computed right before a row, and is not recorded on PyTorch's side."""
    names = [row for row, _ in forward_rows(evidence.our_forward, evidence.ours.config)]
    before = names[: names.index(name)] if name in names else []
    hidden = itertools.takewhile(lambda earlier: earlier not in evidence.recorded, reversed(before))
    return list(hidden)[::-1]


def _sum_of_tokens(row: Mismatch) -> bool:
    return row.is_factor(row.evidence.batch["targets"].size)


def _unshifted(row: Mismatch) -> bool:
    logits_BTV = row.evidence.their_forward["logits"]
    log_z_BT = np.log(np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True)).sum(-1)) + logits_BTV.max(-1)
    inputs_BT = row.evidence.batch["inputs"].astype(np.int64)
    chosen_BT = np.take_along_axis(logits_BTV, inputs_BT[..., None], -1)[..., 0]
    return math.isclose(float((log_z_BT - chosen_BT).mean()), row.evidence.ours.loss, rel_tol=TOLERANCE)


def _summed(row: Mismatch) -> bool:
    return row.is_factor(row.evidence.ours.state.accumulation_steps)


def _divided_twice(row: Mismatch) -> bool:
    return row.is_factor(1 / row.evidence.ours.state.accumulation_steps)


def _gradient(row: Mismatch) -> np.ndarray:
    return row.evidence.ours.array("gradient", row.path)


def _clipped_each(row: Mismatch) -> bool:
    limit = row.evidence.ours.optimizer_config.clip_norm
    return same(row.ours, _gradient(row) * min(1.0, limit / np.linalg.norm(_gradient(row))))


def _clipped_by_number(row: Mismatch) -> bool:
    largest = np.abs(row.ours).max()
    return same(row.ours, _gradient(row).clip(-largest, largest))


def _coupled(row: Mismatch) -> Found:
    params = row.evidence.ours.array("params before", row.path)
    for gradient in (row.theirs, _gradient(row)):
        (decay,) = fit(row.ours - gradient, params)
        if decay > 0 and same(row.ours - gradient, decay * params, tolerance=1e-3):
            return {"decay": decay}
    return False


def _beta(name: str) -> Test:
    """Ours is proportional to PyTorch's, as it is with another beta."""

    def test(row: Mismatch) -> Found:
        beta = getattr(row.evidence.ours.optimizer_config, name)
        return row.factor is not None and {"ours": 1 - row.factor * (1 - beta), "theirs": beta}

    return test


def _rate_of_step(shift: int) -> Test:
    """Our learning rate is PyTorch's of another step."""

    def test(row: Mismatch) -> bool:
        theirs = row.evidence.theirs
        step = theirs.num_updates - 1 + shift
        expected = learning_rate(theirs.optimizer_config, theirs.num_steps, step) if step >= 0 else 0.0
        return math.isclose(row.evidence.ours.learning_rate, expected, rel_tol=1e-4, abs_tol=1e-12)

    return test


def _uncorrected(row: Mismatch) -> bool:
    theirs = row.evidence.theirs
    config, count = theirs.optimizer_config, theirs.num_updates
    bias = math.sqrt(1 - config.beta2**count) / (1 - config.beta1**count)
    return math.isclose(row.evidence.ours.learning_rate * bias, theirs.learning_rate, rel_tol=1e-3)


def _epsilon(row: Mismatch) -> bool:
    moved, direction, before = row.evidence.ours.move("layers/attention/out/kernel")
    rate, decay = fit(moved, direction, before)
    return not same(moved, rate * direction + decay * before, tolerance=1e-4)


def _decay(is_cause: Callable[[float, float, float], bool], applies: bool = True) -> Test:
    """A test of a parameter that decays in PyTorch or does not.

    Args:
        is_cause: takes the part of the parameter that decayed in ours and in PyTorch, and `weight_decay`.
        applies: whether it decays in PyTorch.
    """

    def test(row: Mismatch) -> Found:
        config, rate = row.evidence.ours.optimizer_config, row.evidence.theirs.learning_rate
        decays = config.decay == "all" or not row.path.endswith(("/scale", "/bias"))
        _, decay = fit(*row.evidence.ours.move(row.path))
        found = decays == applies and is_cause(decay, rate * config.weight_decay, config.weight_decay)
        return found and {"ours": decay / max(rate, 1e-30), "theirs": config.weight_decay}

    return test


def _always(row: Mismatch) -> bool:
    return True


near = functools.partial(math.isclose, rel_tol=1e-2)
RATES = "ours is {ours.learning_rate:.6g}, PyTorch's {theirs.learning_rate:.6g}"
PARTS = "{ours.state.accumulation_steps} parts"
DECAYS = "weight decay: ours takes {ours:.4g} times the rate off {row.path}, PyTorch {theirs:.4g}"
UNCLIPPED = "clipping order: Adam takes unclipped gradients; clip before the optimizer"
COUPLED = (
    "weight decay is coupled: {decay:.3g} times the parameters is added to the gradient before Adam's moments (L2); "
    "AdamW takes it off the parameters themselves"
)
# See `forward_causes.FORWARD`.
TRAINING: tuple[tuple[str, Test, str], ...] = (
    ("loss", _sum_of_tokens, "ours is the sum over all tokens, PyTorch's the mean"),
    ("loss", _unshifted, "the targets of ours are the inputs, not shifted by one"),
    ("loss", _always, "ours is {row.factor:.6g} times PyTorch's, of the same logits"),
    ("gradient", lambda row: row.path in row.evidence.theirs.absent, "PyTorch's module has no {row.path} to learn"),
    ("gradient", lambda row: row.is_factor(1), "the gradients agree, but their norm is computed differently"),
    ("gradient", _summed, f"gradient accumulation sums its {PARTS} instead of averaging them"),
    ("gradient", _divided_twice, f"gradient accumulation divides by its {PARTS} twice"),
    ("gradient", _sum_of_tokens, "the gradient is of the sum over all tokens, PyTorch's of the mean"),
    ("gradient", lambda row: row.factor is not None, "all gradients are {row.factor:.6g} times PyTorch's"),
    ("gradient", _always, "forward pass and loss agree, so the derivative is wrong: stopped, or written by hand"),
    ("clipped", lambda row: same(row.ours, _gradient(row)), UNCLIPPED),
    ("clipped", _clipped_each, "clipping order: each tensor is clipped by its own norm, not all by their common one"),
    ("clipped", _clipped_by_number, "clipping: each number is clipped by itself, instead of the norm of all"),
    ("clipped", _coupled, COUPLED),
    (
        "clipped",
        _beta("beta1"),
        "ours is {row.factor:.6g} times PyTorch's: another limit, or beta 1 = {ours:.4g}, not {theirs}",
    ),
    ("first moment", _always, "beta 1, or the gradients of this step, differ"),
    ("second moment", _beta("beta2"), "beta 2: ours is {ours:.6g}, PyTorch's {theirs}"),
    ("learning rate", _rate_of_step(1), f"the schedule is one step ahead: {RATES}"),
    ("learning rate", _rate_of_step(-1), f"the schedule is one step behind: {RATES}"),
    ("learning rate", _uncorrected, "the moments are not corrected for their start at zero"),
    ("learning rate", _epsilon, "moments agree, the update does not: AdamW's epsilon, or where it is added, differs"),
    ("learning rate", _always, f"the schedule: {RATES}"),
    (
        "params",
        _decay(lambda d, full, _: d > 0.1 * full, False),
        "weight decay on norms or biases: {row.path} decays in ours, and not in PyTorch",
    ),
    ("params", _decay(lambda d, full, _: abs(d) < 1e-3 * full), "weight decay: {row.path} does not decay in ours"),
    ("params", _decay(lambda d, _, wd: near(d, wd)), "weight decay is not multiplied by the learning rate in ours"),
    ("params", _decay(lambda d, full, _: not near(d, full)), DECAYS),
    ("params", _always, "moments, rate and decay of matrices agree: this parameter is updated by another rule"),
)
