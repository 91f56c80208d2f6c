"""Learning rate schedules, the optimizers, and which parameters have weight decay."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from flax_decoder.config import OptimizerConfig, default_warmup_steps, warmup_within
from flax_decoder.errors import UserError
from flax_decoder.nn.axes import PROJECTIONS
from flax_decoder.nn.precision import widened
from flax_decoder.training.average import keep_average
from flax_decoder.training.moments import with_bfloat16_moments
from flax_decoder.training.spikes import remember_losses

# Input and output axes of the stacked kernels of a layer; the layer axis in front of them is a batch axis. Heads are
# joined: the matrix that Muon orthogonalizes is the one that multiplies the residual stream.
MATRICES = {
    name: MuonDimensionNumbers(
        tuple(range(1, 1 + len(inputs))), tuple(range(1 + len(inputs), 1 + len(inputs + outputs)))
    )
    for name, (inputs, outputs) in PROJECTIONS.items()
}


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate per step: a linear warm-up from 0, then the shape named by `config.schedule`.

    At each of `config.restarts` all of it begins anew, with a warm-up from where the rate has fallen to, as for models
    that go on with training (Ibrahim et al. 2024).

    The final rate is reached at `num_steps`. The highest is `peak`, or else `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    fallen = peak if config.schedule == "constant" else peak * config.final_fraction
    starts, ends = (0, *config.restarts), (*config.restarts, num_steps)
    parts = [
        _one_schedule(config, end - start, peak, begin=0.0 if start == 0 else fallen)
        for start, end in zip(starts, ends, strict=True)
    ]
    schedule = optax.join_schedules(parts, config.restarts) if config.restarts else parts[0]
    # From an integer step optax would compute in float32 even under jax_enable_x64.
    return lambda step: schedule(jnp.asarray(step, jnp.result_type(float)))


def _one_schedule(config: OptimizerConfig, num_steps: int, peak: float, begin: float) -> optax.Schedule:
    """Learning rate of the steps up to a restart or the end; the warm-up rises from `begin`."""
    final = peak * config.final_fraction
    asked = warmup_within(config.warmup_steps, num_steps) if config.restarts else config.warmup_steps
    warmup = default_warmup_steps(num_steps) if asked is None else asked
    rest = max(num_steps - warmup, 1)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "wsd":
            decay = min(round(config.decay_fraction * num_steps), rest)
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
        case "constant":
            after = optax.constant_schedule(peak)
    # The first step has a rate above 0: with a warm-up of w steps, step i has (i + 1) / w of the way to the peak.
    first = begin + (peak - begin) / max(warmup, 1)
    rise = optax.linear_schedule(first, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


@functools.cache  # two states of one config then have one optimizer, so equal tree structures: one compiled step
def make_optimizer(
    config: OptimizerConfig,
    num_steps: int,
    *,
    remembers_losses: bool = False,
    tx: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a state, or a given `tx` in its place, with what its state keeps beside it.

    That is the running mean of the losses, for spike detection, if asked for, and that of the weights. Beside a `tx`,
    `ema_decay` alone counts of the config.
    """
    memory = [remember_losses()] if remembers_losses else []
    average = [keep_average(config.ema_decay)] if config.ema_decay > 0 else []
    if tx is None:
        clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
        return optax.chain(clip, _make_update(config, num_steps), *memory, *average)
    return optax.chain(tx, *memory, *average) if memory or average else tx


def _make_update(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) with AdamW for the rest."""
    update = optax.adamw(
        learning_rate_schedule(config, num_steps),
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        # Without weight decay the state has one structure, whatever would decay.
        mask=None if config.decay == "all" and config.weight_decay > 0 else is_decayed,
    )
    if config.name == "muon":
        muon = optax.contrib.muon(
            learning_rate_schedule(config, num_steps, config.muon_learning_rate),
            beta=config.muon_momentum,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_matrices,
        )
        # optax's Muon has its own Adam for other parameters, but with Nesterov momentum and weight decay of norms.
        update = optax.partition({"muon": muon, "adamw": update}, optimizer_of_each)
    return with_bfloat16_moments(update) if config.moments_dtype == "bfloat16" else update


def apply_update(
    tx: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any, loss: jax.Array | None = None
) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after one update, computed in at least float32.

    An optimizer that takes `value` and `grad`, as optax names loss and gradients, gets them. Both results have the
    dtypes they had.

    Raises:
        UserError: the optimizer calls the loss function, as one with a line search does.
    """
    update = optax.with_extra_args_support(tx).update
    # Some, such as optax.contrib.sam, are of the kind that takes more arguments, and refuse those they do not know.
    arguments = inspect.signature(update).parameters
    takes_all = any(one.kind == one.VAR_KEYWORD for one in arguments.values())
    known = {"value": loss, "grad": gradients} if loss is not None else {}
    extra = {name: given for name, given in known.items() if takes_all or name in arguments}
    # Optax promotes: it multiplies counts, which are integers, with rates.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wide = widened(params)
        try:
            updates, new_state = update(widened(gradients), opt_state, wide, **extra)
        except TypeError as error:
            if "value_fn" not in str(error):
                raise
            raise UserError(
                "this optimizer calls the loss by itself (value_fn), as a line search does, but a step gives it only "
                "loss and gradients:\ntake one without it, such as optax.lbfgs(..., linesearch=None)"
            ) from None
        new = optax.apply_updates(wide, updates), new_state
    result: tuple[Any, Any] = jax.tree.map(lambda new, old: jnp.astype(new, old.dtype), new, (params, opt_state))
    return result


def num_updates(opt_state: Any) -> int:
    """The number of updates an optimizer has made, from the first of its equal counters."""
    return int(optax.tree.get_all_with_path(opt_state, "count")[0][1])


def is_decayed(params: Any) -> Any:
    """True for matrices and embeddings, False for the scales of norms and for biases; a tree like `params`."""
    return jax.tree.map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)


def optimizer_of_each(params: Any) -> Any:
    """The optimizer of each parameter, "muon" or "adamw"; a tree like `params`."""
    return jax.tree.map_with_path(lambda path, _: "adamw" if muon_matrix(path) is None else "muon", params)


def muon_matrices(params: Any) -> Any:
    """The matrix axes of each parameter for Muon; a tree like `params`."""
    return jax.tree.map_with_path(lambda path, _: muon_matrix(path), params)


def muon_matrix(path: tuple[Any, ...]) -> MuonDimensionNumbers | None:
    """The matrix axes of the parameter at a path; None if AdamW updates it."""
    names = [part.key for part in path]
    return MATRICES[names[-2]] if names[0] == "layers" and names[-1] == "kernel" else None
