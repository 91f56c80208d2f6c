"""Numbers that are not finite: found, named, and kept away from checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.config import TrainingConfig
from flax_decoder.errors import FaultError
from flax_decoder.training.step import Batch, Metrics, TrainState, mean_gradients

AGAIN = "the same command continues from the last checkpoint"
ANEW = "start anew in another --run.folder with a lower optimizer.learning_rate"


def first_bad(state: TrainState) -> str | None:
    """Names the first tensor of the parameters or the optimizer's state with a NaN or an infinity; None: there is none.

    Works on a state in parts on any number of devices and processes, all of which get the same answer.
    """
    trees = {"the parameter": state.params, "the optimizer's": state.opt_state}
    everywhere = jnp.asarray(state.step).sharding
    finite = iter(jax.device_get(jax.jit(_are_finite, out_shardings=everywhere)(list(trees.values()))))
    for owner, tree in trees.items():
        if (name := _first_false([next(finite) for _ in jax.tree.leaves(tree)], tree)) is not None:
            return f"{owner} {name}"
    return None


def check_finite(state: TrainState) -> None:
    """Raises FaultError where a state is not finite: it is worth no checkpoint, and no step leads out of it."""
    name = first_bad(state)
    if name is not None:
        raise FaultError(
            f"{name} is not finite after step {int(state.step)}, which is therefore not saved;\n"
            f"{AGAIN}; if it comes again, {ANEW}"
        )


def skip_batch(training: TrainingConfig, state: TrainState, batch: Batch, metrics: Metrics, skipped: int) -> str:
    """Decides what follows a step that was not applied.

    Args:
        training: what the run asks for.
        state: after that step, so as before it but for `step`.
        batch: the step's.
        metrics: the step's.
        skipped: how many were passed over since the run began, this one included.

    Returns:
        What to tell the user, where the run may go on.

    Raises:
        FaultError: it may not; names the step and the first tensor that is not finite.
    """
    check_finite(state)
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    is_spike = bool(np.isfinite(loss) and np.isfinite(norm))
    cause = f"the loss of {loss:.4g} is a spike" if is_spike else explain(state, batch)
    cause = f"step {int(state.step)}: {cause}"
    if training.nan == "stop" and not is_spike:
        raise FaultError(
            f"{cause}, so nothing was learned from it. {AGAIN.capitalize()};\n"
            f"add --training.nan skip to pass over such batches, or {ANEW}"
        )
    if skipped > training.skip_limit:
        raise FaultError(
            f"{cause}, and {skipped} batches were passed over, more than training.skip_limit = "
            f"{training.skip_limit}. {AGAIN.capitalize()};\nadd a higher --training.skip-limit, or {ANEW}"
        )
    return f"{cause}: its batch is passed over ({skipped} so far, at most {training.skip_limit})"


def explain(state: TrainState, batch: Batch) -> str:
    """Computes a step that was not applied once more, and says what is not finite in it; see `skip_batch`."""
    # Dropout is a function of the step, so the same numbers come out.
    before = state.replace(step=state.step - 1)
    compute = jax.jit(_look, out_shardings=jnp.asarray(state.step).sharding)
    loss, norm, finite = jax.device_get(compute(before, batch))
    if not np.isfinite(loss):
        return f"the loss is {loss}"
    if (name := _first_false(finite, state.params)) is not None:
        return f"the gradient of {name} is not finite"
    if not np.isfinite(norm):
        return "the gradients are so large that their length is infinite"
    return "loss or gradients were not finite, but computed again they are: this device or its memory has a fault"


def _look(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """The loss of a step, the length of its gradients, and which of them are finite."""
    gradients, metrics = mean_gradients(state, batch)
    return metrics["loss"], metrics["gradient_norm"], _are_finite(gradients)


def _are_finite(tree: Any) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]


def _first_false(finite: list[Any], tree: Any) -> str | None:
    """The name, such as layers.attention.query.kernel, of the first leaf of a tree that is not finite."""
    for (path, _), is_finite in zip(jax.tree.leaves_with_path(tree), finite, strict=True):
        if not is_finite:
            words = (str(getattr(part, "name", getattr(part, "key", ""))) for part in path)
            return ".".join(word for word in words if word)
    return None
