"""Detects NaN and infinities, names where they are, and keeps them out of checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.config import TrainingConfig
from flax_decoder.errors import FaultError
from flax_decoder.training.batch import Batch
from flax_decoder.training.step import Metrics, TrainState, mean_gradients

CONTINUE_HINT = "the same command continues from the last checkpoint"
RESTART_HINT = "start again in another --run.folder with a lower optimizer.learning_rate"


def first_non_finite(state: TrainState) -> str | None:
    """The first tensor of parameters or optimizer state with a NaN or an infinity, or None.

    The state may be sharded over any number of devices and processes; all processes get the same answer.
    """
    trees = {"the parameter": state.params, "the optimizer's": state.opt_state}
    replicated = jnp.asarray(state.step).sharding
    finite = iter(jax.device_get(jax.jit(_are_finite, out_shardings=replicated)(list(trees.values()))))
    for owner, tree in trees.items():
        if (name := _first_false([next(finite) for _ in jax.tree.leaves(tree)], tree)) is not None:
            return f"{owner} {name}"
    return None


def check_finite(state: TrainState) -> None:
    """Raises FaultError if a state is not finite: it must not be saved, and no further step can repair it."""
    name = first_non_finite(state)
    if name is not None:
        raise FaultError(
            f"{name} is not finite after step {int(state.step)}, so this step is not saved;\n"
            f"{CONTINUE_HINT}; if it happens again, {RESTART_HINT}"
        )


def skip_batch(
    training: TrainingConfig, state: TrainState, step: int, batch: Batch, metrics: Metrics, skipped: int
) -> str:
    """The message to the user after a step that was not applied, the last of `skipped`, if the run may continue.

    `state` is that after the step, whose number is from 1, or after a later one.

    Raises:
        FaultError: it may not; the message names the step and the first tensor that is not finite.
    """
    check_finite(state)
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    is_spike = bool(np.isfinite(loss) and np.isfinite(norm))
    cause = f"the loss of {loss:.4g} is a spike" if is_spike else explain(state, step, batch)
    cause = f"step {step}: {cause}"
    if training.nan == "stop" and not is_spike:
        raise FaultError(
            f"{cause}, so this step was not applied. {CONTINUE_HINT.capitalize()};\n"
            f"add --training.nan skip to skip such batches, or {RESTART_HINT}"
        )
    if skipped > training.skip_limit:
        raise FaultError(
            f"{cause}, and {skipped} batches were skipped, more than training.skip_limit = "
            f"{training.skip_limit}. {CONTINUE_HINT.capitalize()};\nraise --training.skip-limit, or {RESTART_HINT}"
        )
    return f"{cause}: its batch is skipped ({skipped} so far, at most {training.skip_limit})"


def explain(state: TrainState, step: int, batch: Batch) -> str:
    """Repeats a step that was not applied, and describes what is not finite in it; see `skip_batch`."""
    # Dropout depends only on seed and step, so the numbers are the same if no other step has changed the parameters.
    num_later = int(state.step) - step
    before = state.replace(step=state.step - num_later - 1)
    compute = jax.jit(_diagnose, out_shardings=jnp.asarray(state.step).sharding)
    loss, norm, finite = jax.device_get(compute(before, batch))
    if not np.isfinite(loss):
        return f"the loss is {loss}"
    if (name := _first_false(finite, state.params)) is not None:
        return f"the gradient of {name} is not finite"
    if not np.isfinite(norm):
        return "the norm of the gradients is infinite"
    cause = "this device or its memory is faulty" if num_later == 0 else "the step after it has changed the parameters"
    return f"loss or gradients were not finite, but are when computed again: {cause}"


def _diagnose(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Loss and gradient norm of a step, and which gradients are finite."""
    gradients, metrics = mean_gradients(state, batch)
    return metrics["loss"], metrics["gradient_norm"], _are_finite(gradients)


def _are_finite(tree: Any) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]


def _first_false(finite: list[Any], tree: Any) -> str | None:
    """The name of the first leaf that is not finite, such as layers.attention.query.kernel."""
    for (path, _), is_finite in zip(jax.tree.leaves_with_path(tree), finite, strict=True):
        if not is_finite:
            words = (str(getattr(part, "name", getattr(part, "key", ""))) for part in path)
            return ".".join(word for word in words if word)
    return None
