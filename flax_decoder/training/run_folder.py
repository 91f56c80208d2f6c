"""The folder of a run: made whole or not at all, one process at a time its owner, never filled with another run."""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flax_decoder.config import Config, fixed_fields, warmup_within
from flax_decoder.config_file import config_of, load_config, to_toml
from flax_decoder.data.corpus import Corpus, load_corpus, prepare_corpus, read_text, save_corpus
from flax_decoder.data.tokenizer import KINDS, Tokenizer, load_tokenizer
from flax_decoder.errors import BrokenError, FaultError, InUseError, UserError
from flax_decoder.io.files import new_folder, sha256_of, write_text
from flax_decoder.io.lock import FolderLock
from flax_decoder.training.checkpoint import newest_manifest, saved_steps

# This one may change in one way: shortened where the run has few steps, it is what was asked for once it has more.
WARMUP = "optimizer.warmup_steps"

# Files of a run on which its checkpoints hang, and what each is in a message. The corpus has hashes of its own arrays.
INPUTS = {"tokenizer.json": "tokenizer", "corpus/corpus.json": "corpus"}


def open_run(
    config: Config, folder: Path, check: Callable[[Config, Tokenizer, Corpus], Any], lock: FolderLock | None
) -> tuple[Config, Tokenizer, Corpus]:
    """Makes the folder of a new run, or opens that of one to be continued.

    Args:
        config: the run as asked for.
        folder: where it lives.
        check: raises UserError where a run cannot be trained here, once everything in its config is known.
        lock: takes the folder; None in processes of a job whose first one has it.

    Returns:
        The config with everything in it that the text decides, the tokenizer, and the corpus on disk.

    Raises:
        UserError: the text cannot be used, or the folder holds something else; nothing is written.
        InUseError: another process has the folder.
        FaultError: the folder cannot be read or written, or a file in it is damaged.
    """
    started = (folder / "config.toml").is_file() and (folder / "corpus").is_dir()
    if config.run.resume == "must" and not saved_steps(folder):
        raise UserError(f'{folder}: has no checkpoint to continue from, but run.resume = "must"')
    if config.run.resume == "never" and started:
        raise UserError(f'{folder}: holds a run already, but run.resume = "never"; give another --run.folder')
    if started:
        if lock is not None:
            lock.take(folder)
        refuse_changed_files(folder)
        corpus, tokenizer = load_corpus(folder / "corpus"), load_tokenizer(folder / "tokenizer.json")
        config = _resolve(config, tokenizer, corpus)
        check(config, tokenizer, corpus)
        _refuse_another_run(config, saved_config(folder), tokenizer, corpus, folder)
        return config, tokenizer, corpus

    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder}: is the current folder; give a new --run.folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds no run; give an empty or a new --run.folder")
    tokenizer, corpus = prepare_corpus(config.data, config.model.context_length, config.model.vocab_size)
    config = _resolve(config, tokenizer, corpus)
    check(config, tokenizer, corpus)
    try:
        with new_folder(folder) as unfinished:
            save_corpus(corpus, unfinished / "corpus")
            write_text(unfinished / "tokenizer.json", tokenizer.to_json())
            write_text(unfinished / "config.toml", to_toml(config))
            if lock is not None:
                lock.take(unfinished)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InUseError(f"{folder}: another process has just made it; give another --run.folder") from None
        raise FaultError(f"{folder}: cannot make the run folder: {error}") from error
    return config, tokenizer, load_corpus(folder / "corpus")


def _resolve(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> Config:
    """Fills in what the text decides."""
    return dataclasses.replace(
        config,
        model=config.model.with_vocab_size(tokenizer.vocab_size),
        data=dataclasses.replace(config.data, path=config.data.path or corpus.source),
    )


def facts_of(config: Config, folder: Path) -> dict[str, Any]:
    """What the manifests of a run's checkpoints say of the run: its config, seed, tokenizer and corpus."""
    return {
        "seed": config.training.seed,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "inputs": {name: sha256_of(folder / name) for name in INPUTS if (folder / name).is_file()},
    }


def refuse_changed_files(folder: Path, names: Iterable[str] = INPUTS) -> None:
    """Raises BrokenError where the tokenizer or the corpus is not what it was when the newest checkpoint was saved."""
    manifest = newest_manifest(folder)
    saved = manifest["inputs"] if manifest is not None else {}
    for name in saved.keys() & set(names):
        path, wanted = folder / name, saved[name]
        try:
            actual = sha256_of(path)
        except OSError as error:
            raise BrokenError(f"{path}: cannot be read: {error.strerror}; the checkpoints need it") from error
        if actual != wanted:
            raise BrokenError(
                f"{path}: has changed since the checkpoints were saved: its SHA-256 is {actual}, and was {wanted};\n"
                f"put the {INPUTS[name]} back from a copy"
            )


def refuse_changed_model(folder: Path, config: Config) -> None:
    """Raises BrokenError where the config in a run folder describes another model than its checkpoints hold."""
    for name, saved, found in _guarded(config, saved_config(folder)):
        if name.startswith("model.") and saved != found:
            raise BrokenError(
                f"{folder / 'config.toml'}: {name} is {found}, but the checkpoints were saved with {saved}; put it back"
            )


def saved_config(folder: Path) -> Config:
    """The settings with which a run was trained until now: those of its newest checkpoint, if it has one."""
    manifest = newest_manifest(folder)
    if manifest is None or manifest["config"] is None:
        return load_config(folder / "config.toml")
    return config_of(manifest["config"], f"the checkpoint of step {manifest['step']} in {folder}")


def _guarded(asked: Config, saved: Config) -> list[tuple[str, Any, Any]]:
    """The fields on which the losses hang: dotted name, value saved, value asked."""
    return [
        (f"{section}.{name}", *(getattr(getattr(config, section), name) for config in (saved, asked)))
        for section, name in fixed_fields()
    ]


def _refuse_another_run(config: Config, saved: Config, tokenizer: Tokenizer, corpus: Corpus, folder: Path) -> None:
    rows = [row for row in _guarded(config, saved) if row[0] != WARMUP or not same_warmup(config, saved)]
    if config.data.tokenizer not in KINDS and Path(config.data.tokenizer).is_file():
        saved_json, asked_json = (one.to_json() for one in (tokenizer, load_tokenizer(config.data.tokenizer)))
        rows.append(("data.tokenizer, SHA-256", _sha256(saved_json), _sha256(asked_json)))
    try:
        rows.append(("data.path, SHA-256 of the text", corpus.sha256, read_text(config.data.path).sha256))
    except UserError:
        if config.data.path != saved.data.path:
            raise
        # The text is gone, but the run keeps its tokens.
    rows = [row for row in rows if row[1] != row[2]]
    if rows:
        width = max(len(name) for name, _, _ in rows)
        table = "\n".join(f"{name + ':':{width + 1}} saved {saved}, asked {asked}" for name, saved, asked in rows)
        raise UserError(
            f"{folder}: holds a run with other settings; take them back, or give this one its own --run.folder\n{table}"
        )


def same_warmup(config: Config, saved: Config) -> bool:
    """Whether one setting of the warm-up gives both, each within the steps of its run."""
    asked_steps, saved_steps = config.training.num_steps, saved.training.num_steps
    asked, known = config.optimizer.warmup_steps, saved.optimizer.warmup_steps
    # Where both were shortened, it is in neither: any that is as long as either run does.
    settings = (asked, known, max(asked_steps, saved_steps))
    return any(
        warmup_within(setting, asked_steps) == asked and warmup_within(setting, saved_steps) == known
        for setting in settings
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
