"""Save and restore: in the background, whole or not at all, the newest few and the best one kept.

Orbax writes the arrays into a folder beside. When they are there, the manifest of all files follows, all is flushed to
disk, and only then the folder gets the name of its step. What has such a name is a checkpoint; whether it still is
what was saved, the manifest tells.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import SingleDeviceSharding

from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import flush_names
from flax_decoder.parallel.processes import is_first
from flax_decoder.training.manifest import Manifest, read_manifest, verify, write_manifest
from flax_decoder.training.step import TrainState

PARAMS, OPTIMIZER = "params", "optimizer"
# Folders on their way in and out: no name of a step, so never taken for one.
_NEW, _OLD = ".new-", ".old-"
# What a manifest says of a run of which nothing is known.
NO_FACTS: Mapping[str, Any] = {"seed": None, "config": None, "inputs": {}}
_PACKAGES = ("flax-decoder", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """Writes the checkpoints of a run, each named by the number of steps that were done.

    Parameters and optimizer state are separate items, so that generation reads the parameters alone.
    """

    def __init__(self, folder: Path, keep_newest: int, facts: Mapping[str, Any] = NO_FACTS):
        """Opens the checkpoints of a run; the newest few are kept, and the one with the lowest validation loss.

        Args:
            folder: of the run.
            keep_newest: how many.
            facts: what each manifest is to say of the run, in JSON.
        """
        self._folder = steps_folder(folder).absolute()
        self._keep_newest = keep_newest
        self._facts = facts
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(PARAMS, OPTIMIZER))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: Future[None] | None = None
        # Orbax asks for these numbers at every save, to report them. Each time tensorstore (0.1.86) loses some lists,
        # which made a process grow by 53 KB a save.
        self._collect = tensorstore.experimental_collect_matching_metrics
        tensorstore.experimental_collect_matching_metrics = _no_metrics

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Copies the state and writes it in the background; without a loss it cannot become the best one.

        Raises:
            FaultError: this save, or the one before it, could not be written.
        """
        self.wait()
        step = int(state.step)
        arrays = {PARAMS: state.params, OPTIMIZER: state.opt_state}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        facts = {"step": step, "val_loss": val_loss, **self._facts, **_describe(arrays)}
        new = self._folder / f"{_NEW}{step}"
        with as_fault_error(self._folder):
            if is_first():
                self._folder.mkdir(exist_ok=True)
            self._writer.save(new, args=ocp.args.Composite(**items))
        self._unfinished = self._thread.submit(self._finish, new, facts)

    def check(self) -> None:
        """Raises FaultError if a save in the background has failed; does not wait for one."""
        if self._unfinished is not None and self._unfinished.done():
            self.wait()

    def wait(self) -> None:
        """Returns when all saves are committed. Raises FaultError if one has failed."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def close(self) -> None:
        """Waits until all is written, and lets go of the threads that write.

        Raises:
            FaultError: the last save could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()
            tensorstore.experimental_collect_matching_metrics = self._collect

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error on its way out is the one to be told, even where the last save has failed as well.
        with contextlib.nullcontext() if error is None else contextlib.suppress(FaultError):
            self.close()

    def _finish(self, new: Path, facts: Mapping[str, Any]) -> None:
        """Makes a checkpoint of what is written; runs in a thread of its own."""
        with as_fault_error(self._folder):
            try:
                self._writer.wait_until_finished()
                if is_first():
                    commit(new, facts)
                    prune(self._folder, self._keep_newest)
            except BaseException:
                for left in self._folder.glob(f"{new.name}*"):  # a full disk is the less full
                    shutil.rmtree(left, ignore_errors=True)
                raise


def commit(new: Path, facts: Mapping[str, Any]) -> None:
    """Gives a folder with the arrays of a step its manifest and then the name of the step."""
    write_manifest(new, facts)
    final = new.with_name(str(facts["step"]))
    quarantine(final)
    os.rename(new, final)
    flush_names(final.parent)


def prune(folder: Path, keep_newest: int) -> None:
    """Deletes all checkpoints but the newest and the best one: renamed first, so that no half of one has its name."""
    losses = _losses(folder)
    newest = sorted(losses)[-keep_newest:]
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(evaluated, key=lambda step: evaluated[step], default=newest[-1])
    for step in losses:
        if step not in (*newest, best):
            old = folder / f"{_OLD}{step}"
            os.rename(folder / str(step), old)
            shutil.rmtree(old)


def save_params(folder: Path, step: int, params: Any, facts: Mapping[str, Any] = NO_FACTS) -> None:
    """Writes a checkpoint of parameters alone: a run folder with it can do all but go on training.

    Raises:
        FaultError: it cannot be written.
    """
    new = steps_folder(folder).absolute() / f"{_NEW}{step}"
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=_limit_gb(params))
    with as_fault_error(new.parent):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{PARAMS: handler})) as writer:
            writer.save(new, args=ocp.args.Composite(**{PARAMS: ocp.args.StandardSave(params)}))
        commit(new, {"step": step, "val_loss": None, **facts, **_describe({PARAMS: params})})


def steps_folder(folder: Path) -> Path:
    """Where the checkpoints of a run folder lie, one folder a step."""
    return folder / "checkpoints"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run folder, oldest first; not all of them need hold."""
    return _steps_in(steps_folder(folder))


def newest_manifest(folder: Path) -> Manifest | None:
    """The newest manifest in a run folder that can be read; the files of that checkpoint are not looked at."""
    for step in reversed(saved_steps(folder)):
        with contextlib.suppress(BrokenError):
            return read_manifest(steps_folder(folder) / str(step))
    return None


def remove_unfinished(folder: Path, step: int) -> None:
    """Prepares a run folder for going on from a step, as the one who has the folder.

    What killed saves have left is deleted. What has the name of a later step did not hold, else it would have been the
    one to go on from: it is set aside, as it may still be worth something to its owner.
    """
    with as_fault_error(steps_folder(folder)):
        for left in [*steps_folder(folder).glob(f"{_NEW}*"), *steps_folder(folder).glob(f"{_OLD}*")]:
            shutil.rmtree(left)
        for left in folder.glob(".*.tmp"):  # of files that were being replaced
            left.unlink()
        for later in steps_folder(folder).glob("[0-9]*"):
            if later.name.isdecimal() and int(later.name) > step:
                quarantine(later)


def quarantine(path: Path) -> None:
    """Renames what stands where a checkpoint is to be."""
    if not os.path.lexists(path):
        return
    names = (f"{path.name}.broken{count}" for count in ("", *range(2, 1_000_000)))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, aside)
    print(f"{path}: is no checkpoint that holds; it is now {aside.name}")


def choose_step(folder: Path, wanted: int | Literal["latest", "best"]) -> int:
    """The step of a checkpoint that holds: the newest, that of the lowest validation loss, or the one asked for.

    Where the newest or the best is broken, the next one takes its place, and a warning says so.

    Args:
        folder: of the run.
        wanted: which.

    Raises:
        UserError: there is no such checkpoint.
        BrokenError: the one asked for, or every one, is broken.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder}: has no checkpoint; train first: python train.py")
    if isinstance(wanted, int):
        if wanted not in steps:
            raise UserError(f"{folder}: has no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}")
        verify(steps_folder(folder) / str(wanted))
        return wanted
    if wanted == "best":
        losses = _losses(steps_folder(folder))
        # Those whose manifest cannot be read stand first, as the last ones to be tried; then those without a loss.
        ranks = {step: -loss if (loss := losses[step]) is not None else -np.inf for step in losses}
        steps.sort(key=lambda step: (step in losses, ranks.get(step, -np.inf), step))
    for step in reversed(steps):
        try:
            verify(steps_folder(folder) / str(step))
            return step
        except BrokenError as error:
            if os.path.lexists(steps_folder(folder) / str(step)):  # else a run has just deleted it, as it does
                print(f"warning: {error}; trying another checkpoint", file=sys.stderr)
    if saved_steps(folder) != sorted(steps):
        return choose_step(folder, wanted)
    raise BrokenError(
        f"{folder}: none of its checkpoints holds ({', '.join(map(str, sorted(steps)))}); "
        "put them back from a copy, or start another run with --run.folder"
    )


def restore_state(folder: Path, step: int, state: TrainState) -> TrainState:
    """The state at a checkpoint that `choose_step` has chosen, in the places of the given state.

    Raises:
        FaultError: the checkpoint cannot be read, or its arrays have other names, shapes or dtypes.
    """
    params = restore_params(folder, step, state.params)
    opt_state = _restore(folder, step, OPTIMIZER, state.opt_state)
    step_there = jax.device_put(np.int32(step), jnp.asarray(state.step).sharding)
    return state.replace(step=step_there, params=params, opt_state=opt_state)


def restore_params(folder: Path, step: int, params: Any) -> Any:
    """The parameters alone, in the places of the given ones (or of abstract ones); see `restore_state`."""
    return _restore(folder, step, PARAMS, params)


def require_space(folder: Path, state: TrainState, keep_newest: int, num_saves: int) -> None:
    """Raises FaultError where a disk has no room for the checkpoints to come, of which there will be `num_saves`."""
    there = len(saved_steps(folder))
    # The newest, the best, and one that is being written while all of these are still there.
    more = min(keep_newest + 2, there + num_saves) - there
    leaves = jax.tree.leaves((state.params, state.opt_state))
    num_bytes = max(more, 0) * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise FaultError(
            f"{folder}: {more} checkpoints need {num_bytes / 1e9:,.2f} GB there, but {free / 1e9:,.2f} GB are free;\n"
            "free some, keep fewer with --training.keep_newest, or give --run.folder on another disk"
        )


def _restore(folder: Path, step: int, part: str, like: Any) -> Any:
    path = steps_folder(folder) / str(step)
    here = SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        # Without a place for each array Orbax puts it where it was saved, on devices that may not be there.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    _refuse_other_arrays(read_manifest(path), path, part, like)
    abstract = jax.tree.map(target, like)
    reader = ocp.StandardCheckpointer(restore_concurrent_gb=_limit_gb(abstract))
    with as_fault_error(path / part, "cannot be restored"), reader:
        return reader.restore((path / part).absolute(), abstract)


def _refuse_other_arrays(manifest: Manifest, path: Path, part: str, like: Any) -> None:
    """Orbax would cast another dtype without a word."""
    saved, asked = manifest["arrays"].get(part, {}), _describe({part: like})["arrays"][part]
    for name in [*saved, *asked]:
        here, wanted = (" ".join(map(str, of.get(name, ["nothing"]))) for of in (saved, asked))
        if here != wanted:
            raise FaultError(f"{path / part}: cannot be restored: {name} is saved as {here}, asked as {wanted}")


def _describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of trees of arrays and of who wrote them."""
    described = {
        name: {
            jax.tree_util.keystr(path, simple=True, separator="."): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for name, tree in arrays.items()
    }
    return {"arrays": described, "versions": {package: version(package) for package in _PACKAGES}}


def _steps_in(folder: Path) -> list[int]:
    """Folders named as a step is: not 007, which none is, and no links, whose target may be anywhere."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _losses(folder: Path) -> dict[int, float | None]:
    """Validation loss of each step in a folder whose manifest can be read; None where it was not evaluated."""
    losses = {}
    for step in _steps_in(folder):
        with contextlib.suppress(BrokenError):
            losses[step] = read_manifest(folder / str(step))["val_loss"]
    return losses


def _no_metrics(*prefix: Any, **options: Any) -> list[Any]:
    return []


@contextlib.contextmanager
def as_fault_error(path: Path, what: str = "cannot save a checkpoint") -> Iterator[None]:
    """Turns what goes wrong with files, in Python or below Orbax, into a fault with one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, FaultError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FaultError(f"{path}: {what}: {reason[0]}") from error


def _limit_gb(tree: Any) -> float:
    """How much of a tree Orbax may have in its hands at one time, in 10^9 bytes.

    Without a limit it works on all arrays at once, and the model is in memory twice. It refuses an array that is as
    large as the limit, which is therefore a little more than the largest. For each device that reads its part of an
    array Orbax counts the whole; where they cannot do so together, each unpacks the whole for itself.
    """
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)), default=1)
    return 1.01 * largest * jax.local_device_count() / 1e9
