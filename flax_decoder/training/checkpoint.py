"""Checkpoints: saved atomically in the background; the newest few and the best one are kept.

Orbax writes the arrays into a temporary folder. The manifest of all files is added, everything is flushed to disk, the
log of the run too, and only then is the folder renamed to the number of its step. A folder with such a name is a
checkpoint; its manifest shows whether its files are still those that were saved.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import SingleDeviceSharding

from flax_decoder.errors import BrokenError, FaultError, UserError, as_whole_number
from flax_decoder.io.files import flush_names, make_folder
from flax_decoder.io.place import Place
from flax_decoder.io.terminal import print_escaped
from flax_decoder.parallel.processes import gather_at_first, is_first
from flax_decoder.training.average import swapped
from flax_decoder.training.environment import VERSIONS, versions
from flax_decoder.training.manifest import NO_ENTRIES, Manifest, file_entries, read_manifest, verify, write_manifest
from flax_decoder.training.metrics import flush_log
from flax_decoder.training.step import TrainState

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

PARAMS, OPTIMIZER = "params", "optimizer"
# Prefixes of folders that are being written or deleted: not the name of a step, so never taken for a checkpoint.
_NEW, _OLD = ".new-", ".old-"
# Manifest entries of a run about which nothing is known.
NO_FACTS: Mapping[str, Any] = {"seed": None, "config": None, "inputs": {}}
_Result = TypeVar("_Result")


class Checkpoints:
    """Writes the checkpoints of a run, each named by its number of completed steps.

    Parameters and optimizer state are separate items, so that generation reads only the parameters. Set `folder` where
    the run folder has been renamed.
    """

    def __init__(self, folder: Path, keep_newest: int, facts: Mapping[str, Any] = NO_FACTS, place: Place | None = None):
        """Keeps the newest `keep_newest` checkpoints of a run folder, and the one with the lowest validation loss.

        `facts` about the run, JSON values, become part of each manifest. With a `place`, a save that began before the
        folder was renamed is committed where it is.
        """
        self.folder = folder
        self._place = place
        self._keep_newest = keep_newest
        self._facts = facts
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(PARAMS, OPTIMIZER))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: Future[None] | None = None
        # Orbax collects these metrics at every save, and tensorstore (0.1.86) leaks 53 KB each time.
        self._collect = tensorstore.experimental_collect_matching_metrics
        tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []

    def save(self, state: TrainState, val_loss: float | None) -> None:
        """Copies the state and writes it in the background; without `val_loss` it cannot become the best checkpoint.

        Raises:
            FaultError: this save or the previous one failed.
        """
        self.wait()
        step = int(state.step)
        state = swapped(state)  # the parameters of a checkpoint are those that others use
        arrays = {PARAMS: state.params, OPTIMIZER: state.opt_state}
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        facts = {"step": step, "val_loss": val_loss, **self._facts, **_describe(arrays)}
        # Orbax writes by path, for long: into the folder of the run also where it is renamed meanwhile.
        folder = self.folder
        if self._place is not None and jax.process_count() == 1:
            folder = self._place.path_that_follows()
        new = steps_folder(folder.absolute()) / f"{_NEW}{step}"
        with as_fault_error(steps_folder(self.folder), written=new.parent):
            if is_first():
                make_folder(new.parent)
            self._writer.save(new, args=ocp.args.Composite(**items))
        self._unfinished = self._thread.submit(self._finish, new, facts)

    def check(self) -> None:
        """Raises FaultError if a background save has failed; does not wait for one that is running."""
        if self._unfinished is not None and self._unfinished.done():
            self.wait()

    def wait(self) -> None:
        """Waits until all saves are committed. Raises FaultError if one has failed."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def close(self) -> None:
        """Waits for the last save and stops the writing threads. Raises FaultError if it has failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()
            tensorstore.experimental_collect_matching_metrics = self._collect

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # An error that is already being raised matters more than a failed last save.
        with contextlib.nullcontext() if error is None else contextlib.suppress(FaultError):
            self.close()

    def _finish(self, new: Path, facts: Mapping[str, Any]) -> None:
        """Commits a save when its arrays are written; runs in the background thread."""
        with as_fault_error(steps_folder(self.folder), written=new.parent):
            try:
                self._writer.wait_until_finished()
                entries = joined_entries(new)
                if is_first():
                    folder = self.folder if self._place is None else self._place.find().absolute()
                    commit(steps_folder(folder) / new.name, facts, entries)
                    prune(folder, self._keep_newest)
            except BaseException:
                for leftover in new.parent.glob(f"{new.name}*"):  # the disk may be full
                    shutil.rmtree(leftover, ignore_errors=True)
                raise


def joined_entries(new: Path) -> dict[str, Any]:
    """The manifest's entries of the arrays of a save, each hashed by the process that wrote it; in the first process.

    A single process hashes its files when it writes the manifest.
    """
    if jax.process_count() == 1:
        return {}
    own_part = f"ocdbt.process_{jax.process_index()}"  # so Orbax names the folders

    def own_entries() -> str:
        return json.dumps(file_entries(new, lambda name: own_part in name.split("/")))

    entries: dict[str, Any] = {}
    for text in gather_at_first(f"checkpoint {new.name}", own_entries):
        entries |= json.loads(text)
    return entries


def commit(new: Path, facts: Mapping[str, Any], entries: Mapping[str, Any] = NO_ENTRIES) -> None:
    """Adds the manifest to a folder with the arrays of a step, and renames the folder to the step."""
    make_folder(new.parent)  # Orbax writes by path: it is still a folder, not a link to one
    write_manifest(new, facts, entries)
    flush_log(new.parent.parent)
    flush_names(new.parent.parent)  # Orbax, or a process that was killed, may have made the folder
    final = new.with_name(str(facts["step"]))
    quarantine(final)
    os.rename(new, final)
    flush_names(final.parent)


def prune(folder: Path, keep_newest: int) -> None:
    """Deletes all checkpoints but the newest and the best; renamed first, so that a step's folder is never partial.

    Each new name is on disk before a file is deleted, so that a power cut cannot bring back the old one without files.
    """
    losses = _losses(folder)
    if not losses:  # the disk does not give the manifests now
        return
    newest = sorted(losses)[-keep_newest:]
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(evaluated, key=lambda step: evaluated[step], default=newest[-1])
    for step in sorted(losses.keys() - {*newest, best}):
        old = steps_folder(folder) / f"{_OLD}{step}"
        os.rename(old.with_name(str(step)), old)
        flush_names(old.parent)
        shutil.rmtree(old)


def save_params(folder: Path, step: int, params: Any, facts: Mapping[str, Any] = NO_FACTS) -> None:
    """Writes a checkpoint without optimizer state: enough for everything but resuming. Raises FaultError."""
    new = steps_folder(folder).absolute() / f"{_NEW}{step}"
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=_limit_gb(params))
    with as_fault_error(new.parent):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{PARAMS: handler})) as writer:
            writer.save(new, args=ocp.args.Composite(**{PARAMS: ocp.args.StandardSave(params)}))
        commit(new, {"step": step, "val_loss": None, **facts, **_describe({PARAMS: params})})


def steps_folder(folder: Path) -> Path:
    """The folder of a run's checkpoints, one folder per step."""
    return folder / "checkpoints"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run folder, oldest first; they are not verified.

    Other names, such as 007, are ignored, and so are links, whose targets may be anywhere.

    Raises:
        UserError: the folder of the checkpoints is a link.
    """
    if steps_folder(folder).is_symlink():
        raise UserError(f"{steps_folder(folder)}: is a link, which is not followed; only a whole run folder may be one")
    try:
        names = [entry.name for entry in os.scandir(steps_folder(folder)) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def newest_manifest(folder: Path) -> Manifest | None:
    """The newest readable manifest in a run folder; the other files of that checkpoint are not verified.

    Raises:
        BrokenError: there is none, but perhaps one that the disk does not give now: its facts are not passed over.
    """
    unread = None
    for step in reversed(saved_steps(folder)):
        try:
            return read_manifest(steps_folder(folder) / str(step))
        except BrokenError as error:
            unread = unread or (error if isinstance(error.__cause__, OSError) else None)
    if unread is not None:
        raise unread
    return None


def remove_unfinished(folder: Path, step: int) -> None:
    """Prepares a run folder for continuing from a step; the caller holds its lock.

    Leftovers of killed saves are deleted. Later checkpoints were found to be damaged, or the run would continue from
    them: they are renamed, not deleted, in case their owner can still use them.
    """
    saved_steps(folder)  # raises if the folder is a link
    with as_fault_error(steps_folder(folder)):
        for leftover in [*steps_folder(folder).glob(f"{_NEW}*"), *steps_folder(folder).glob(f"{_OLD}*")]:
            shutil.rmtree(leftover)
        for leftover in folder.glob(".*.tmp"):  # of files that were being replaced
            leftover.unlink()
        for later in steps_folder(folder).glob("[0-9]*"):
            if later.name.isdecimal() and int(later.name) > step:
                quarantine(later)


def quarantine(path: Path) -> None:
    """Renames whatever has the name of a checkpoint but is not a valid one."""
    if not os.path.lexists(path):
        return
    names = (f"{path.name}.broken{count}" for count in ("", *range(2, 1_000_000)))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, aside)
    flush_names(path.parent)
    print_escaped(f"{path}: not a valid checkpoint; renamed to {aside.name}")


def choose_step(folder: Path, wanted: int | Literal["latest", "best"]) -> int:
    """The step of a verified checkpoint: the newest, the one with the lowest validation loss, or the given one.

    If the newest or the best is damaged, the next one is used, with a warning.

    Raises:
        UserError: there is no such checkpoint, or `wanted` is none of these.
        BrokenError: the given one, or all of them, are damaged.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder}: has no checkpoint; train first: python train.py")
    if isinstance(wanted, str) and wanted not in ("latest", "best"):
        raise UserError(f'step = "{wanted}" must be "latest", "best" or the number of a step')
    if not isinstance(wanted, str):
        wanted = as_whole_number("step", wanted, 0)
        if wanted not in steps:
            raise UserError(f"{folder}: has no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}")
        try:
            verify(steps_folder(folder) / str(wanted))
        except BrokenError:
            if os.path.lexists(steps_folder(folder) / str(wanted)):
                raise
            return choose_step(folder, wanted)  # a running training has just pruned it, which the message says
        return wanted
    if wanted == "best":
        losses = _losses(folder)

        def rank(step: int) -> tuple[bool, float, int]:
            """Readable manifests above unreadable ones, then by loss, then the newest."""
            loss = losses.get(step)
            return step in losses, -np.inf if loss is None else -loss, step

        steps.sort(key=rank)
    for step in reversed(steps):
        try:
            verify(steps_folder(folder) / str(step))
            return step
        except BrokenError as error:
            if os.path.lexists(steps_folder(folder) / str(step)):  # else a running training has just pruned it
                print_escaped(f"warning: {error}; trying another checkpoint", file=sys.stderr)
    if saved_steps(folder) != sorted(steps):
        return choose_step(folder, wanted)
    raise BrokenError(
        f"{folder}: all its checkpoints are damaged ({', '.join(map(str, sorted(steps)))}); "
        "restore one from a copy, or start another run with --run.folder"
    )


def read_checkpoint(folder: Path, wanted: int | Literal["latest", "best"], read: Callable[[int], _Result]) -> _Result:
    """What `read` makes of the checkpoint that `choose_step` chooses; of the next one if that is pruned meanwhile.

    A running training takes the name of a checkpoint away before it deletes files: what was read is whole if the name
    is still there.

    Raises:
        UserError: as `choose_step`, also for the given step if it has been pruned.
        FaultError: as `choose_step` and `read`.
    """
    while True:
        step = choose_step(folder, wanted)
        path = steps_folder(folder) / str(step)
        try:
            result = read(step)
        except FaultError:
            if os.path.lexists(path):
                raise
        else:
            if os.path.lexists(path):
                return result


def restore_state(folder: Path, step: int, state: TrainState) -> TrainState:
    """The state of a checkpoint chosen by `choose_step`, with the shardings of the given state.

    Raises:
        FaultError: the checkpoint cannot be read, or its arrays have other names, shapes or dtypes.
    """
    state = swapped(state)
    saved = state.replace(
        step=jax.device_put(np.int32(step), jnp.asarray(state.step).sharding),
        params=restore_params(folder, step, state.params),
        opt_state=_restore(folder, step, OPTIMIZER, state.opt_state),
    )
    return swapped(saved)


def restore_params(folder: Path, step: int, params: Any) -> Any:
    """The parameters of a checkpoint, as in `restore_state`; `params` may be abstract."""
    return _restore(folder, step, PARAMS, params)


def require_space(folder: Path, state: TrainState, keep_newest: int, num_saves: int) -> None:
    """Raises FaultError if the disk cannot hold the checkpoints of the next `num_saves` saves."""
    num_saved = len(saved_steps(folder))
    # The newest, the best, and the one being written before others are pruned.
    more = min(keep_newest + 2, num_saved + num_saves) - num_saved
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
    default = SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        # Without a sharding Orbax restores an array to the devices it was saved on, which may not exist here.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)

    _require_same_arrays(read_manifest(path), path, part, like)
    abstract = jax.tree.map(target, like)
    reader = ocp.StandardCheckpointer(restore_concurrent_gb=_limit_gb(abstract))
    with as_fault_error(path / part, "cannot be restored"), reader:
        return reader.restore((path / part).absolute(), abstract)


def _require_same_arrays(manifest: Manifest, path: Path, part: str, like: Any) -> None:
    """Raises FaultError if names, dtypes or shapes differ: Orbax would silently cast to another dtype."""
    saved, expected = manifest["arrays"].get(part, {}), _describe({part: like})["arrays"][part]
    for name in [*saved, *expected]:
        found, wanted = (" ".join(map(str, arrays.get(name, ["nothing"]))) for arrays in (saved, expected))
        if found != wanted:
            raise FaultError(f"{path / part}: cannot be restored: {name} is saved as {found}, but expected as {wanted}")


def _describe(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest entries about trees of arrays and the versions of the packages that write them."""
    described = {
        name: {
            jax.tree_util.keystr(path, simple=True, separator="."): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for name, tree in arrays.items()
    }
    return {"arrays": described, VERSIONS: versions()}


def _losses(folder: Path) -> dict[int, float | None]:
    """Validation loss of each checkpoint with a readable manifest; None if it was not evaluated."""
    losses = {}
    for step in saved_steps(folder):
        with contextlib.suppress(BrokenError):
            losses[step] = read_manifest(steps_folder(folder) / str(step))["val_loss"]
    return losses


@contextlib.contextmanager
def as_fault_error(path: Path, what: str = "cannot save a checkpoint", written: Path | None = None) -> Iterator[None]:
    """Turns errors of Python, Orbax and tensorstore, which may call `path` `written`, into a FaultError of one line."""
    try:
        with _without_late_results():
            yield
    except Exception as error:
        # Orbax raises plain exceptions, too.
        is_meant = type(error) is Exception or isinstance(error, OSError | ValueError | KeyError | RuntimeError)
        if isinstance(error, FaultError) or not is_meant:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        # Tensorstore and Orbax append how the array is stored, in kilobytes.
        short = reason[0].partition(" [tensorstore_spec")[0].partition(" See full TensorStore details")[0]
        raise FaultError(f"{path}: {what}: {short.replace(str(written or path), str(path))}") from error


@contextlib.contextmanager
def _without_late_results() -> Iterator[None]:
    """Silences the reads and writes that Orbax leaves behind when one has failed: each would print a traceback.

    They end at any time later, in threads of tensorstore, and call an event loop that is closed by then, or fail too.
    So after a failure the hook stays; it passes on everything else.
    """
    before = sys.unraisablehook
    if not (isinstance(before, functools.partial) and before.func is _drop_late_result):
        sys.unraisablehook = functools.partial(_drop_late_result, before)
    yield
    sys.unraisablehook = before


def _drop_late_result(hook: Callable[["UnraisableHookArgs"], Any], dropped: "UnraisableHookArgs") -> None:
    is_late = dropped.exc_type is RuntimeError and str(dropped.exc_value) == "Event loop is closed"
    is_late |= dropped.exc_type is Exception and str(dropped.exc_value).startswith("Encountered error while reading")
    if not is_late:
        hook(dropped)


def _limit_gb(tree: Any) -> float:
    """Memory that Orbax may use at one time, in 10^9 bytes; without a limit it holds the whole tree a second time.

    Orbax refuses an array as large as the limit, hence slightly more than the largest one. It counts a whole array for
    each device that reads its part; where they cannot share one copy, each decompresses the whole.
    """
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)), default=1)
    return 1.01 * largest * jax.local_device_count() / 1e9
