"""Every file of a run on which something hangs, held to what was once written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flax_decoder.config_file import load_config
from flax_decoder.data.corpus import load_corpus
from flax_decoder.data.tokenizer import load_tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.lens.history import FOLDER as LENS
from flax_decoder.lens.history import read_history
from flax_decoder.training.checkpoint import saved_steps, steps_folder
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.run_folder import refuse_changed_files, refuse_changed_model


@dataclass(frozen=True)
class Finding:
    """What was found at one place of a run folder.

    Attributes:
        path: the place.
        holds: whether it is as it was written; None where it plays no part.
        what: in words.
    """

    path: Path
    holds: bool | None
    what: str

    def __str__(self) -> str:
        word = {True: "ok", False: "BROKEN", None: "ignored"}[self.holds]
        return f"{word:7}  {self.path}: {self.what}"


def verify_run(folder: Path) -> Iterator[Finding]:
    """Looks at all checkpoints of a run, oldest first, and at what they need; changes nothing."""
    steps = steps_folder(folder)
    own = [steps / str(step) for step in saved_steps(folder)]
    for path in own:
        yield _look(path, _checkpoint)
    others = set(steps.iterdir() if steps.is_dir() else ()) - set(own)
    for path in sorted(others):
        yield Finding(path, None, "is no checkpoint by its name")
    yield _look(folder / "config.toml", _config)
    yield _look(folder / "tokenizer.json", _tokenizer)
    if (folder / "corpus").exists():  # a converted model has neither
        yield _look(folder / "corpus", _corpus)
        yield _look(folder / "metrics.jsonl", _metrics)
    if (folder / LENS).exists():
        yield _look(folder / LENS, _history)


def _look(path: Path, act: Callable[[Path], str]) -> Finding:
    try:
        return Finding(path, True, act(path))
    except (FaultError, UserError) as error:
        return Finding(path, False, str(error).removeprefix(f"{path}: "))


def _checkpoint(path: Path) -> str:
    files = verify(path)["files"].values()
    return f"{len(files)} files, {sum(file['bytes'] for file in files):,} bytes"


def _config(path: Path) -> str:
    refuse_changed_model(path.parent, load_config(path))
    return "the model of the checkpoints"


def _tokenizer(path: Path) -> str:
    refuse_changed_files(path.parent, [path.name])
    return f"{load_tokenizer(path).vocab_size:,} tokens"


def _corpus(path: Path) -> str:
    refuse_changed_files(path.parent, ["corpus/corpus.json"])
    return f"{len(load_corpus(path).train_tokens):,} tokens to train on"


def _metrics(path: Path) -> str:
    return f"{len(read_metrics(path)):,} lines"


def _history(path: Path) -> str:
    history = read_history(path.parent)
    return "no snapshot yet" if history is None else f"attention at {len(history.steps_M)} snapshots of training"
