"""Save and restore, with Orbax: asynchronous, the newest few and the best one kept."""

import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_decoder.errors import FaultError, UserError
from flax_decoder.parallel.processes import first_alone
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.step import TrainState

# Written last by Orbax into a checkpoint that is whole.
COMMITTED = "commit_success.txt"


class Checkpoints:
    """Writes the checkpoints of a run, each named by the number of steps that were done.

    Parameters and optimizer state are separate items, so that generation reads the parameters alone.
    """

    def __init__(self, folder: Path, keep_newest: int):
        """Opens the checkpoints of a run; the newest few are kept, and the one with the lowest validation loss."""
        self._folder = folder / "checkpoints"
        first_alone(lambda: set_broken_aside(folder))

        def val_loss(metrics: dict[str, float]) -> float:
            return metrics["val_loss"]

        # Orbax saves metrics only where there is a best_fn; what is kept, the policy alone decides.
        best = BestN(get_metric_fn=val_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=val_loss,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(n=keep_newest), best]),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(), item_names=("params", "optimizer"), options=options
        )

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Copies the state and writes it in the background; without a loss it cannot become the best one.

        Raises:
            FaultError: the save before this one could not be written.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(state.opt_state)
        )
        # Without any metric Orbax would keep the checkpoint for ever; infinity is never the best.
        metrics = {"val_loss": math.inf if val_loss is None else val_loss}
        try:
            self._manager.save(int(state.step), args=items, metrics=metrics)
        except (OSError, ValueError) as error:
            raise FaultError(f"{self._folder}: cannot save a checkpoint: {error}") from error

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            FaultError: the last save could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except (OSError, ValueError) as error:
            raise FaultError(f"{self._folder}: cannot save a checkpoint: {error}") from error


def save_params(folder: Path, step: int, params: Any) -> None:
    """Writes a checkpoint of parameters alone: a run folder with it can do all but go on training.

    Raises:
        FaultError: it cannot be written.
    """
    path = folder / "checkpoints"
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=_limit_gb(params))
    try:
        with ocp.CheckpointManager(
            path.absolute(), item_names=("params",), item_handlers={"params": handler}
        ) as manager:
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    except (OSError, ValueError) as error:
        raise FaultError(f"{path}: cannot save a checkpoint: {error}") from error


def saved_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a run folder, oldest first."""
    entries = folder.glob("checkpoints/*")
    return sorted(int(entry.name) for entry in entries if entry.name.isdigit() and (entry / COMMITTED).is_file())


def commit_time(folder: Path, step: int) -> float:
    """When the checkpoint of a step was finished, in seconds since 1970."""
    return (folder / "checkpoints" / str(step) / COMMITTED).stat().st_mtime


def set_broken_aside(folder: Path) -> None:
    """Renames step folders that no save has finished: Orbax goes by names, and would count them as checkpoints."""
    for entry in folder.glob("checkpoints/*"):
        if entry.name.isdigit() and not (entry / COMMITTED).is_file():
            aside = entry.with_name(f"{entry.name}.broken")
            print(f"{entry}: is no finished checkpoint; it is now {aside.name}")
            entry.rename(aside)


def choose_step(folder: Path, wanted: int | Literal["latest", "best"]) -> int:
    """The step of a checkpoint: the newest, the one of the lowest validation loss, or the one after so many steps.

    Raises:
        UserError: there is no such checkpoint.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder}: has no checkpoint; train first: python train.py")
    if wanted == "latest":
        return steps[-1]
    if wanted == "best":
        losses = {row["step"]: row["val_loss"] for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row}
        return min(steps, key=lambda step: losses.get(step, float("inf")))
    if wanted not in steps:
        raise UserError(f"{folder}: has no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}")
    return wanted


def restore_state(folder: Path, step: int, state: TrainState) -> TrainState:
    """The state at a checkpoint, in the shapes, dtypes and places of the given one.

    Raises:
        FaultError: the checkpoint cannot be read.
    """
    params = restore_params(folder, step, state.params)
    opt_state = _restore(folder / "checkpoints" / str(step) / "optimizer", state.opt_state)
    step_there = jax.device_put(np.int32(step), jnp.asarray(state.step).sharding)
    return state.replace(step=step_there, params=params, opt_state=opt_state)


def restore_params(folder: Path, step: int, params: Any) -> Any:
    """The parameters alone, in the shapes, dtypes and places of the given ones (or of abstract ones).

    Raises:
        FaultError: the checkpoint cannot be read.
    """
    return _restore(folder / "checkpoints" / str(step) / "params", params)


def _restore(path: Path, like: Any) -> Any:
    here = SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        # Without a place for each array Orbax puts it where it was saved, on devices that may not be there.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    abstract = jax.tree.map(target, like)
    try:
        with ocp.StandardCheckpointer(restore_concurrent_gb=_limit_gb(abstract)) as checkpointer:
            return checkpointer.restore(path.absolute(), abstract)
    except (OSError, ValueError, KeyError) as error:
        raise FaultError(f"{path}: cannot be restored: {error}") from error


def _limit_gb(tree: Any) -> float:
    """How much of a tree Orbax may have in its hands at one time, in 10^9 bytes.

    Without a limit it works on all arrays at once, and the model is in memory twice. It refuses an array that is as
    large as the limit, which is therefore a little more than the largest. For each device that reads its part of an
    array Orbax counts the whole; where they cannot do so together, each unpacks the whole for itself.
    """
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)), default=1)
    return 1.01 * largest * jax.local_device_count() / 1e9
