"""Checks every file of a run that checkpoints depend on."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flax_decoder.config_file import load_config
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.tokenizer import load_tokenizer
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import not_plain
from flax_decoder.io.lock import run_in_lock
from flax_decoder.io.strict_json import shown
from flax_decoder.lens.history import FOLDER as LENS
from flax_decoder.lens.history import read_history
from flax_decoder.training.checkpoint import saved_steps, steps_folder
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import LOG, lost_line, metrics_rows
from flax_decoder.training.run_folder import BASE, BASE_MANIFEST, FOREIGN, require_same_inputs, require_same_model
from flax_decoder.training.run_id import RUN_ID, read_id


@dataclass(frozen=True)
class CheckResult:
    """The result of checking one path in a run folder."""

    path: Path
    passed: bool | None  # whether it is unchanged; None if it was ignored
    message: str  # what was found

    def __str__(self) -> str:
        word = {True: "ok", False: "BROKEN", None: "ignored"}[self.passed]
        return f"{word:7}  {self.path}: {self.message}"


def verify_run(folder: Path) -> Iterator[CheckResult]:
    """Checks all checkpoints of a run, oldest first, and the files they depend on; changes nothing."""
    for path, kind in not_plain(folder, FOREIGN):
        yield CheckResult(path, False, f"is {kind}; a run folder has only files and folders")
    steps = steps_folder(folder)
    if steps.is_symlink():  # no link is followed
        return
    run_id = None
    with contextlib.suppress(BrokenError):  # which the check says
        run_id = read_id(folder / RUN_ID)
    if os.path.lexists(folder / RUN_ID):
        yield _check(folder / RUN_ID, _run_id)
    checked: set[int] = set()
    while unchecked := [step for step in saved_steps(folder) if step not in checked]:  # a running training saves more
        path = steps / str(unchecked[0])
        result = _check(path, functools.partial(_checkpoint, run_id))
        # It takes the name of a checkpoint away before it deletes its files.
        yield result if os.path.lexists(path) else CheckResult(path, None, "a running training has just deleted it")
        checked.add(unchecked[0])
    others = {path for path in (steps.iterdir() if steps.is_dir() else ()) if path.name not in map(str, checked)}
    for path in sorted(others):
        yield CheckResult(path, None, "not named like a checkpoint")
    yield _check(folder / "config.toml", _config)
    yield _check(folder / "tokenizer.json", _tokenizer)
    if (folder / "corpus").exists():  # a converted model has no corpus and no log
        yield _check(folder / "corpus", _corpus)
        yield _check(folder / LOG, functools.partial(_log, steps=checked, run_id=run_id))
    if (folder / BASE).exists():
        yield _check(folder / BASE, _base)
        yield from verify_run(folder / BASE)
    if (folder / LENS).exists():
        yield _check(folder / LENS, _history)


def _check(path: Path, check: Callable[[Path], str]) -> CheckResult:
    try:
        return CheckResult(path, True, check(path))
    except (FaultError, UserError) as error:
        return CheckResult(path, False, str(error).removeprefix(f"{path}: "))


def _run_id(path: Path) -> str:
    run_id, in_lock = read_id(path), run_in_lock(path.parent)
    if in_lock not in (None, run_id):
        raise BrokenError(f"is {run_id}, but the last training here was of run {shown(in_lock)}")
    return f"{run_id}"


def _checkpoint(run_id: str | None, path: Path) -> str:
    manifest = verify(path)
    written_by = manifest.get(RUN_ID)
    if run_id is not None and written_by not in (None, run_id):
        raise BrokenError(f"is of another run, {shown(written_by)}, and not of {run_id}")
    files = manifest["files"].values()
    return f"{len(files)} files, {sum(file['bytes'] for file in files):,} bytes"


def _config(path: Path) -> str:
    require_same_model(path.parent, load_config(path))
    return "the model matches the checkpoints"


def _tokenizer(path: Path) -> str:
    require_same_inputs(path.parent, [path.name])
    return f"{load_tokenizer(path).vocab_size:,} tokens"


def _corpus(path: Path) -> str:
    require_same_inputs(path.parent, ["corpus/corpus.json"])
    return f"{load_corpus(path, checks_all=True).train.num_tokens:,} tokens to train on"


def _base(path: Path) -> str:
    require_same_inputs(path.parent, [BASE_MANIFEST])
    return "is that of the adapters in the checkpoints"


def _log(path: Path, steps: set[int], run_id: str | None) -> str:
    missing, num_lines = steps - {0}, 0
    for row in metrics_rows(path, run_id):  # a log may be larger than memory
        missing.discard(row["step"])
        num_lines += 1
    if missing:
        raise BrokenError(lost_line(min(missing)))
    return f"{num_lines:,} lines"


def _history(path: Path) -> str:
    history = read_history(path.parent)
    return "no snapshot yet" if history is None else f"attention at {len(history.steps_M)} snapshots of training"
