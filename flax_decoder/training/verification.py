"""Checks every file of a run that checkpoints depend on."""

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
from flax_decoder.lens.history import FOLDER as LENS
from flax_decoder.lens.history import read_history
from flax_decoder.training.checkpoint import saved_steps, steps_folder
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import LOG, lost_line, metrics_rows
from flax_decoder.training.run_folder import BASE, BASE_MANIFEST, FOREIGN, require_same_inputs, require_same_model


@dataclass(frozen=True)
class CheckResult:
    """The result of checking one path in a run folder.

    Attributes:
        path: what was checked.
        passed: whether it is unchanged; None if it was ignored.
        message: what was found.
    """

    path: Path
    passed: bool | None
    message: str

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
    checked: set[int] = set()
    while unchecked := [step for step in saved_steps(folder) if step not in checked]:  # a running training saves more
        path = steps / str(unchecked[0])
        result = _check(path, _checkpoint)
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
        yield _check(folder / LOG, functools.partial(_log, steps=checked))
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


def _checkpoint(path: Path) -> str:
    files = verify(path)["files"].values()
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


def _log(path: Path, steps: set[int]) -> str:
    missing, num_lines = steps - {0}, 0
    for row in metrics_rows(path):  # a log may be larger than memory
        missing.discard(row["step"])
        num_lines += 1
    if missing:
        raise BrokenError(lost_line(min(missing)))
    return f"{num_lines:,} lines"


def _history(path: Path) -> str:
    history = read_history(path.parent)
    return "no snapshot yet" if history is None else f"attention at {len(history.steps_M)} snapshots of training"
