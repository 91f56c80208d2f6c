"""Why a tensor differs from PyTorch's: known mistakes, each tried on the numbers.

All that goes into the first row that differs agrees on both sides. A known mistake is the cause where it, done to those
inputs, gives exactly what one side has.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from flax_decoder.comparison.evidence import TOLERANCE, Evidence, same
from flax_decoder.comparison.forward_causes import of_forward
from flax_decoder.comparison.jax_side import fit
from flax_decoder.comparison.schedule import learning_rate


def explain(name: str, worst: str | None, evidence: Evidence) -> str:
    """The likely cause of the first row that differs.

    Args:
        name: of the row.
        worst: of a row of several parameters, the path of the one that is furthest apart.
        evidence: both sides.
    """
    for prefix, look in TRAINING:
        if name.startswith(prefix) or name.endswith(f" {prefix}"):
            causes = look(name, worst, evidence)
            break
    else:
        causes = of_forward(name, evidence)
    return next(causes, "what goes into it agrees, so the mistake is in this step itself; it is none of the known ones")


IMPRECISE = (
    "reduced matmul precision: numbers are rounded to fewer digits than float32 has, as TF32 and bfloat16 do; set "
    "JAX_DEFAULT_MATMUL_PRECISION=highest, and model.dtype to float32"
)


def _of_loss(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    factor = evidence.ours.loss / evidence.theirs.loss
    count = evidence.batch["targets"].size
    if math.isclose(factor, count, rel_tol=TOLERANCE):
        yield "ours is the sum over all tokens, PyTorch's the mean"
    logits_BTV = evidence.their_forward["logits"]
    log_z_BT = np.log(np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True)).sum(-1)) + logits_BTV.max(-1)
    for what, targets_BT in (("inputs, not shifted by one", evidence.batch["inputs"]),):
        chosen_BT = np.take_along_axis(logits_BTV, targets_BT[..., None].astype(np.int64), -1)[..., 0]
        if math.isclose(float((log_z_BT - chosen_BT).mean()), evidence.ours.loss, rel_tol=TOLERANCE):
            yield f"the targets of ours are the {what}"
    yield f"ours is {factor:.6g} times PyTorch's, of the same logits"


def _of_gradient(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    def factor_of(path: str) -> float | None:
        ours, theirs = evidence.ours.array("gradient", path), evidence.theirs.array("gradient", path)
        factor = float((ours * theirs).sum() / max(np.square(theirs).sum(), 1e-300))
        return factor if same(ours, factor * theirs) else None

    factors = [factor_of(path) for path in ("embedding", "final_norm/scale", "layers/attention/out/kernel")]
    factor = factors[0]
    if factor is not None and all(other is not None and math.isclose(other, factor) for other in factors):
        parts, count = evidence.ours.state.accumulation_steps, evidence.batch["targets"].size
        if math.isclose(factor, 1, rel_tol=TOLERANCE):
            yield "the gradients agree and their length does not: it is computed differently"
        if parts > 1 and math.isclose(factor, parts, rel_tol=TOLERANCE):
            yield f"gradient accumulation sums its {parts} parts instead of averaging them"
        if parts > 1 and math.isclose(factor, 1 / parts, rel_tol=TOLERANCE):
            yield f"gradient accumulation divides by its {parts} parts twice"
        if math.isclose(factor, count, rel_tol=TOLERANCE):
            yield "the gradient is that of the sum over all tokens, PyTorch's that of the mean"
        yield f"all gradients are {factor:.6g} times PyTorch's"
    yield "the forward pass and the loss agree, so it is the derivative: a gradient is stopped, cut or written by hand"


def _of_clipping(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    path = _path(name.removeprefix("clipped "))
    gradient, ours = evidence.ours.array("gradient", path), evidence.ours.array("clipped gradient", path)
    theirs, params = evidence.theirs.array("gradient", path), evidence.ours.array("params before", path)
    config = evidence.ours.optimizer_config
    limit = config.clip_norm
    if same(ours, gradient):
        yield "clipping order: Adam's moments are those of gradients that were not clipped; clip before the optimizer"
    if same(ours, gradient * min(1.0, limit / np.linalg.norm(gradient))):
        yield "clipping order: each tensor is clipped by its own length, not all by their common one"
    largest = np.abs(ours).max()
    if same(ours, gradient.clip(-largest, largest)):
        yield "clipping: each number is clipped by itself, not the length of all"
    for given in (theirs, gradient):
        (decay,) = fit(ours - given, params)
        if decay > 0 and same(ours - given, decay * params, tolerance=1e-3):
            yield (
                f"weight decay is coupled: {decay:.3g} times the parameters is added to the gradient before Adam's "
                "moments (L2), where AdamW takes it off the parameters themselves"
            )
    (factor,) = fit(ours, theirs)
    if same(ours, factor * theirs):
        beta1 = 1 - factor * (1 - config.beta1)
        yield f"ours is {factor:.6g} times PyTorch's: another limit, or beta 1 = {beta1:.4g} in place of {config.beta1}"


def _path(name: str) -> str:
    """layers/attention/query/kernel of layers.0.attention.query.kernel."""
    parts = name.split(".")
    return "/".join(parts[:1] + parts[2:] if parts[0] == "layers" else parts)


def _of_first_moment(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    yield "beta 1, or the gradients of this step, differ"


def _of_second_moment(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    path = worst or "embedding"
    ours, theirs = evidence.ours.array("second moment", path), evidence.theirs.array("second moment", path)
    (factor,) = fit(ours, theirs)
    beta2 = evidence.ours.optimizer_config.beta2
    if same(ours, factor * theirs):
        yield f"beta 2: ours is {1 - factor * (1 - beta2):.6g}, PyTorch's {beta2}"


def _of_rate(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    theirs, rate = evidence.theirs, evidence.ours.learning_rate
    for shift, word in ((1, "ahead"), (-1, "behind")):
        other = theirs.num_updates - 1 + shift
        expected = learning_rate(theirs.optimizer_config, theirs.num_steps, other) if other >= 0 else 0.0
        if math.isclose(rate, expected, rel_tol=1e-4, abs_tol=1e-12):
            yield f"the schedule is one step {word}: ours is {rate:.4g}, PyTorch's {theirs.learning_rate:.4g}"
    config, count = theirs.optimizer_config, theirs.num_updates
    bias = math.sqrt(1 - config.beta2**count) / (1 - config.beta1**count)
    if math.isclose(rate * bias, theirs.learning_rate, rel_tol=1e-3):
        yield "the moments are not corrected for their start at zero"
    moved, direction, before = evidence.ours.move("layers/attention/out/kernel")
    own_rate, decay = fit(moved, direction, before)
    if not same(moved, own_rate * direction + decay * before, tolerance=1e-4):
        yield "the moments agree, and the update is another: epsilon of AdamW, or where it is added, differs"
    yield f"the schedule: ours is {rate:.6g}, PyTorch's {theirs.learning_rate:.6g}"


def _of_params(name: str, worst: str | None, evidence: Evidence) -> Iterator[str]:
    path = worst or "embedding"
    ours, config = evidence.ours, evidence.ours.optimizer_config
    rate = evidence.theirs.learning_rate
    decays = config.decay == "all" or not path.endswith(("/scale", "/bias"))
    expected = rate * config.weight_decay if decays else 0.0
    _, decay = fit(*ours.move(path))
    if not decays and decay > 0.1 * rate * config.weight_decay:
        yield f"weight decay on norms or biases: {path} decays in ours, and not in PyTorch"
    if decays and abs(decay) < 1e-3 * expected:
        yield f"weight decay: {path} does not decay in ours"
    if decays and math.isclose(decay, config.weight_decay, rel_tol=1e-2):
        yield "weight decay is not multiplied by the learning rate in ours"
    if expected and not math.isclose(decay, expected, rel_tol=1e-2):
        yield f"weight decay: ours takes {decay / rate:.4g} times the rate off {path}, PyTorch {expected / rate:.4g}"
    yield "the moments, the rate and the decay of the matrices agree: this parameter is updated by another rule"


TRAINING: tuple[tuple[str, Callable[[str, str | None, Evidence], Iterator[str]]], ...] = (
    ("clipped", _of_clipping),
    ("gradient", _of_gradient),
    ("loss", _of_loss),
    ("first moment", _of_first_moment),
    ("second moment", _of_second_moment),
    ("learning rate", _of_rate),
    ("params", _of_params),
)
