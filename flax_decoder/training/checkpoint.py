"""Save and restore, with Orbax: asynchronous, the newest few and the best one kept."""

from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_decoder.errors import FaultError, UserError
from flax_decoder.training.step import TrainState


class Checkpoints:
    """The checkpoints of a run folder, each named by the number of steps that were done.

    Parameters and optimizer state are separate items, so that generation reads the parameters alone.
    """

    def __init__(self, folder: Path, *, keep_newest: int = 1, read_only: bool = False):
        """Opens the checkpoints of a run.

        Args:
            folder: the run folder.
            keep_newest: how many of the newest to keep when saving, beside the one with the lowest validation loss.
            read_only: only look: create, clean up and delete nothing.
        """
        self._folder = folder / "checkpoints"
        best = BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            # Both the ranking of `best` and the saving of metrics need best_fn; the policy alone decides what is kept.
            best_fn=lambda metrics: metrics["val_loss"],
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(n=keep_newest), best]),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        # Orbax wants an absolute path.
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(), item_names=("params", "optimizer"), options=options
        )

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Steps done at the checkpoint with the lowest validation loss; None where there is none."""
        return self._manager.best_step()

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Copies the state and writes it in the background; without a loss it cannot become the best one.

        Raises:
            FaultError: the save before this one could not be written.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(state.opt_state)
        )
        metrics = None if val_loss is None else {"val_loss": val_loss}
        try:
            self._manager.save(int(state.step), args=items, metrics=metrics)
        except (OSError, ValueError) as error:
            raise FaultError(f"{self._folder}: cannot save a checkpoint: {error}") from error

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The state at a checkpoint, in the shapes, dtypes and places of the given one.

        Raises:
            FaultError: the checkpoint cannot be read.
        """
        restored = self._restore(step, params=state.params, optimizer=state.opt_state)
        return state.replace(
            step=jax.numpy.asarray(step, jax.numpy.int32),
            params=restored["params"],
            opt_state=restored["optimizer"],
        )

    def restore_params(self, params: Any, step: int) -> Any:
        """The parameters alone, in the shapes, dtypes and places of the given ones (or of their abstract values)."""
        return self._restore(step, params=params)["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, items)
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}),
            )
        except (OSError, ValueError, KeyError) as error:
            raise FaultError(f"{self._folder / str(step)}: cannot be restored: {error}") from error

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


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder has a `checkpoints` folder with a finished checkpoint in it; imports and opens nothing."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())


def choose_step(checkpoints: Checkpoints, wanted: int | Literal["latest", "best"], folder: Path) -> int:
    """The step of the checkpoint that is wanted.

    Raises:
        UserError: there is none.
    """
    step = {"latest": checkpoints.latest, "best": checkpoints.best}.get(str(wanted), lambda: wanted)()
    if step is None:
        raise UserError(f"{folder}: has no checkpoint yet; train first")
    return int(step)
