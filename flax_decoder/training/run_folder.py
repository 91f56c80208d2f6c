"""The folder of a run: made whole or not at all, and never filled with another run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_decoder.config import Config, load_config, to_toml
from flax_decoder.data.corpus import Corpus, load_corpus, prepare_corpus, read_text, save_corpus
from flax_decoder.data.tokenizer import Tokenizer, load_tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.files import new_folder, write_text
from flax_decoder.training.checkpoint import saved_steps

# What may differ when a run is continued, because the losses of its steps do not hang on it.
FREE_FIELDS = {
    "model": {"attention", "scan_layers", "remat"},
    "data": {"path"},  # the text itself is compared
    "optimizer": set(),
    "training": {
        "num_steps",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep_newest",
        "log_every",
        "sample_tokens",
        "loss_chunk_tokens",
    },
}


def open_run(config: Config, folder: Path, check: Callable[[Config], Any]) -> tuple[Config, Tokenizer, Corpus]:
    """Makes the folder of a new run, or opens that of one to be continued.

    Args:
        config: the run as asked for.
        folder: where it lives.
        check: raises UserError where a run cannot be trained here, once everything in its config is known.

    Returns:
        The config with everything in it that the text decides, the tokenizer, and the corpus on disk.

    Raises:
        UserError: the text cannot be used, or the folder holds something else; nothing is written.
        FaultError: the folder cannot be read or written.
    """
    started = (folder / "config.toml").is_file() and (folder / "corpus").is_dir()
    if config.run.resume == "must" and not saved_steps(folder):
        raise UserError(f'{folder}: has no checkpoint to continue from, but run.resume = "must"')
    if config.run.resume == "never" and started:
        raise UserError(f'{folder}: holds a run already, but run.resume = "never"; give another --run.folder')
    if started:
        corpus, tokenizer = load_corpus(folder / "corpus"), load_tokenizer(folder / "tokenizer.json")
        config = _resolve(config, tokenizer, corpus)
        check(config)
        _refuse_another_run(config, load_config(folder / "config.toml"), corpus, folder)
        return config, tokenizer, corpus

    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder}: is the current folder; give a new --run.folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds no run; give an empty or a new --run.folder")
    tokenizer, corpus = prepare_corpus(config.data, config.model.context_length, config.model.vocab_size)
    config = _resolve(config, tokenizer, corpus)
    check(config)
    try:
        with new_folder(folder) as unfinished:
            save_corpus(corpus, unfinished / "corpus")
            write_text(unfinished / "tokenizer.json", tokenizer.to_json())
            write_text(unfinished / "config.toml", to_toml(config))
    except OSError as error:
        raise FaultError(f"{folder}: cannot make the run folder: {error}") from error
    return config, tokenizer, load_corpus(folder / "corpus")


def _resolve(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> Config:
    """Fills in what the text decides."""
    return dataclasses.replace(
        config,
        model=config.model.with_vocab_size(tokenizer.vocab_size),
        data=dataclasses.replace(config.data, path=config.data.path or corpus.source),
    )


def _refuse_another_run(config: Config, saved: Config, corpus: Corpus, folder: Path) -> None:
    differences = [
        f"{section}.{name}: saved {_value(saved, section, name)}, asked {_value(config, section, name)}"
        for section, free in FREE_FIELDS.items()
        for name in dataclasses.asdict(getattr(saved, section))
        if name not in free and _value(saved, section, name) != _value(config, section, name)
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{folder}: holds a run with other settings: {differences[0]}{more};\n"
            "give this one its own --run.folder, or take the settings back"
        )
    try:
        text = read_text(config.data.path)
    except UserError:
        if config.data.path == saved.data.path:
            return  # the text is gone, but the run keeps its tokens
        raise
    if text.sha256 != corpus.sha256:
        raise UserError(
            f"{folder}: holds a run on another text ({corpus.source}, now {text.name}, or its content changed);\n"
            "give this one its own folder: --run.folder runs/NAME"
        )


def _value(config: Config, section: str, name: str) -> Any:
    return getattr(getattr(config, section), name)
