"""The folder of a run: created atomically, locked by one process at a time, never reused for another run."""

import dataclasses
import errno
import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_decoder.config import Config, DataConfig, LoraConfig, ModelConfig, fixed_fields, is_used, warmup_within
from flax_decoder.config_file import config_of, load_config, to_toml
from flax_decoder.data.corpus import make_plans, prepare_corpus, require_fit, source_identity
from flax_decoder.data.reading_progress import ReadingProgress
from flax_decoder.data.shards import load_corpus
from flax_decoder.data.splits import Corpus, Mixture
from flax_decoder.data.tokenizer import KINDS, Tokenizer, load_tokenizer
from flax_decoder.errors import BrokenError, FaultError, InUseError, UserError
from flax_decoder.huggingface.folder import read_kept_files, write_tokenizer_files
from flax_decoder.io.files import make_folder, new_folder, not_plain, sha256_of, write_text
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.lock import FolderLock
from flax_decoder.io.strict_json import SETTINGS, parse_object
from flax_decoder.nn.lora import init_adapters
from flax_decoder.training.checkpoint import newest_manifest, read_checkpoint, restore_params, save_params, saved_steps
from flax_decoder.training.environment import ENVIRONMENT, environment
from flax_decoder.training.manifest import MANIFEST
from flax_decoder.training.run_id import RUN_ID, new_id, read_id
from flax_decoder.training.start import Start

# May change in one way: a warm-up that was shortened to fit few steps gets its full length when the run has more.
WARMUP = "optimizer.warmup_steps"

# Where a run began that did not draw its weights.
START_FROM = "start_from.json"

# The model whose weights stay as they are while adapters learn: a run folder of its own, written with the run.
BASE = "base"

# Folders in a run folder in which another library writes, and makes links of its own.
FOREIGN = ("wandb",)

# Files that the checkpoints depend on, and their names in messages. corpus.json in turn has hashes of the token arrays,
# and the manifest of the base those of its weights.
BASE_MANIFEST = f"{BASE}/checkpoints/0/{MANIFEST}"
INPUTS = {"tokenizer.json": "tokenizer", "corpus/corpus.json": "corpus", BASE_MANIFEST: "base"}


def open_run(
    config: Config,
    folder: Path,
    check: Callable[[Config, Tokenizer, Corpus | Mixture], Any],
    lock: FolderLock | None,
    start: Start | None = None,
) -> tuple[Config, Tokenizer, Corpus | Mixture]:
    """Creates the folder of a new run, or opens that of an existing one.

    `check` is called with the resolved config, and raises UserError if the run cannot be trained here. `lock` locks the
    folder; it is None in processes of a job whose first process has the lock.

    Returns:
        The config, with the fields that the text determines, the tokenizer, and the corpus on disk.

    Raises:
        UserError: the text cannot be used, or the folder has other contents; nothing is written.
        InUseError: another process has locked the folder.
        FaultError: the folder cannot be read or written, or a file in it is damaged.
    """
    # In this order: a run that another process creates appears whole, so what is in use now is a run by the next line.
    in_use = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    started = (folder / "config.toml").is_file() and (folder / "corpus").is_dir()
    if config.run.resume == "must" and not saved_steps(folder):
        raise UserError(f'{folder}: has no checkpoint to resume from, but run.resume = "must"')
    if config.run.resume == "never" and started:
        raise UserError(f'{folder}: already has a run, but run.resume = "never"; give another --run.folder')
    if started:
        require_plain(folder)
        _require_same_start(config, folder, start)
        if lock is not None:
            lock.take(folder)
        require_same_inputs(folder)
        corpus = load_corpus(folder / "corpus").arranged(config.data)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        config = _resolve(config, tokenizer, corpus)
        check(config, tokenizer, corpus)
        _require_same_run(config, saved_config(folder), tokenizer, corpus, folder)
        return config, tokenizer, corpus

    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder}: is the current folder; give a new --run.folder")
    if in_use:
        raise UserError(f"{folder}: exists and is not a run; give an empty or a new --run.folder")
    given, source = None if start is None else start.tokenizer, model_folder(config, start)
    plans = make_plans(config.data, given)
    try:
        with new_folder(folder) as unfinished, ReadingProgress() as progress:
            (unfinished / "corpus").mkdir()
            tokenizer, corpus = prepare_corpus(
                config.data,
                unfinished / "corpus",
                given,
                plans=plans,
                model_folder=source,
                context_length=config.model.context_length,
                progress=progress,
            )
            corpus = corpus.arranged(config.data)
            require_fit(corpus, tokenizer, config.data, config.model.context_length, config.model.vocab_size)
            (unfinished / "corpus" / "tokenizer.json").replace(unfinished / "tokenizer.json")
            config = _resolve(config, tokenizer, corpus)
            check(config, tokenizer, corpus)
            write_text(unfinished / "config.toml", to_toml(config))
            write_text(unfinished / RUN_ID, new_id() + "\n")
            if start is not None or corpus.train.has_examples:
                kept = start.kept if start is not None else read_kept_files(source) if source else {}
                write_tokenizer_files(unfinished, tokenizer, kept)
            if start is not None:
                write_text(unfinished / START_FROM, json.dumps(start.record(), indent=1))
            if start is not None and config.lora.rank is not None:
                write_run(unfinished / BASE, config.model, start.params, tokenizer, start.kept)
            if lock is not None:
                lock.take(unfinished)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InUseError(f"{folder}: another process has just created it; give another --run.folder") from None
        raise FaultError(f"{folder}: cannot create the run folder: {error}") from error
    # What is mapped stays so when the folder is renamed.
    return config, tokenizer, corpus


def model_folder(config: Config, start: Start | None = None) -> Path | None:
    """The folder with the files around the tokenizer.json of a new run, such as a chat template, if there is one."""
    source = config.run.start_from if start is None else start.path
    if source is not None:
        return Path(source) if Path(source).is_dir() else None
    return None if config.data.tokenizer in KINDS else Path(config.data.tokenizer).parent


def _require_same_start(config: Config, folder: Path, start: Start | None) -> None:
    """Raises UserError if a run would go on from other weights than those it was told to start from."""
    record = folder / START_FROM
    asked, has_record = config.run.start_from, record.is_file()
    if asked is not None and not has_record:
        raise UserError(
            f"{folder}: has a run that began elsewhere than run.start_from = {asked}; give another --run.folder"
        )
    if has_record and start is None and not saved_steps(folder):
        raise UserError(f"{folder}: has no checkpoint yet: give --run.start-from again, as {record} has it")
    if has_record and start is not None and start_record(folder)["sha256"] != start.record()["sha256"]:
        raise UserError(f"{folder}: began with other weights than {start.path} has now; give another --run.folder")


def require_plain(folder: Path) -> None:
    """Raises UserError if a run folder has a link, a FIFO or a device: it may come from somebody else.

    Through a link, a run would write and delete outside of its folder. The folder itself may be a link.
    """
    for path, kind in not_plain(folder, FOREIGN):
        raise UserError(
            f"{path}: is {kind}, and a run folder has only files and folders: delete it, or, if you\n"
            f"trust where its links lead, train in a copy without them: cp -rL {shlex.quote(str(folder))} NEW_FOLDER"
        )


def _resolve(config: Config, tokenizer: Tokenizer, corpus: Corpus | Mixture) -> Config:
    """Sets the fields that the text determines."""
    data = config.data
    if data.mixture is None:
        data = dataclasses.replace(data, path=data.path or corpus.source)
    return dataclasses.replace(config, model=config.model.with_vocab_size(tokenizer.vocab_size), data=data)


def write_run(
    folder: Path,
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    kept: Mapping[str, bytes],
    lora: LoraConfig | None = None,
    adapters: Any = None,
) -> None:
    """Writes the run folder of a model that was trained elsewhere; its only checkpoint is that of step 0.

    With `adapters`, `params` are their base, and `lora` says how they count. For `kept` see `Start`.
    """
    make_folder(folder)
    write_tokenizer_files(folder, tokenizer, kept)
    if adapters is not None:
        write_run(folder / BASE, model, params, tokenizer, kept)
    config = Config(model=model, data=DataConfig(tokenizer="tokenizer.json"), lora=lora or LoraConfig())
    write_text(folder / "config.toml", to_toml(config))
    save_params(folder, 0, params if adapters is None else adapters, facts_of(config, folder))


def start_record(folder: Path) -> dict[str, Any]:
    """Where a run began that did not draw its weights: `Start.record`. Raises BrokenError if it is damaged."""
    path = folder / START_FROM
    try:
        record = parse_object(
            read_content(open_inside(folder, path.name), SETTINGS.num_bytes, str(path)), str(path), SETTINGS
        )
    except UserError as error:
        raise BrokenError(str(error)) from None
    texts = [value for name, value in record.items() if name in ("path", "model_type")]
    if not {"path", "sha256"} <= record.keys() or not all(isinstance(text, str) for text in texts):
        raise BrokenError(f"{path}: is damaged: it lacks an entry, or has one of the wrong type")
    return record


def read_base(folder: Path, like: Any) -> Any:
    """The frozen parameters of a run whose adapters learn; `like` has their shapes and shardings. Raises FaultError."""
    base = folder / BASE
    return read_checkpoint(base, 0, lambda step: restore_params(base, step, like))


def read_adapters(folder: Path, step: int, lora: LoraConfig, base: Any) -> Any:
    """The adapters in a checkpoint of a run, as NumPy arrays; `base` has the shapes of its base. Raises FaultError."""
    like = jax.eval_shape(functools.partial(init_adapters, lora), base, jax.random.key(0))
    return jax.tree.map(np.asarray, restore_params(folder, step, like))


def facts_of(config: Config, folder: Path) -> dict[str, Any]:
    """The manifest entries about a run: id, machine, seed, config, and hashes of tokenizer and corpus."""
    return {
        RUN_ID: read_id(folder / RUN_ID),
        ENVIRONMENT: environment(),
        "seed": config.training.seed,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "inputs": {name: sha256_of(folder / name) for name in INPUTS if (folder / name).is_file()},
    }


def require_same_inputs(folder: Path, names: Iterable[str] = INPUTS) -> None:
    """Raises BrokenError if tokenizer or corpus have changed since the newest checkpoint was saved."""
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
                f"{path}: has changed since the checkpoints were saved: its SHA-256 is {actual}, but was {wanted};\n"
                f"restore the {INPUTS[name]} from a copy"
            )


def require_same_model(folder: Path, config: Config) -> None:
    """Raises BrokenError if the config in a run folder describes another model than that of its checkpoints."""
    for name, saved, found in _guarded(config, saved_config(folder)):
        if name.startswith(("model.", "lora.")) and saved != found:
            raise BrokenError(
                f"{folder / 'config.toml'}: {name} is {found}, but the checkpoints were saved with {saved}; restore it"
            )


def saved_config(folder: Path) -> Config:
    """The config of a run so far: that of its newest checkpoint, or of config.toml if there is none."""
    manifest = newest_manifest(folder)
    if manifest is None or manifest["config"] is None:
        return load_config(folder / "config.toml")
    return config_of(manifest["config"], f"the checkpoint of step {manifest['step']} in {folder}")


def _guarded(asked: Config, saved: Config) -> list[tuple[str, Any, Any]]:
    """The fields that the losses depend on: dotted name, saved value, requested value."""
    return [
        (f"{section}.{name}", *(getattr(getattr(config, section), name) for config in (saved, asked)))
        for section, name in fixed_fields()
        if is_used(getattr(asked, section), name)
    ]


def _require_same_run(
    config: Config, saved: Config, tokenizer: Tokenizer, corpus: Corpus | Mixture, folder: Path
) -> None:
    rows = [row for row in _guarded(config, saved) if row[0] != WARMUP or not same_warmup(config, saved)]
    if config.data.tokenizer not in KINDS and Path(config.data.tokenizer).is_file():
        both = tokenizer, load_tokenizer(config.data.tokenizer)
        saved_hash, asked_hash = (hashlib.sha256(one.to_json().encode()).hexdigest() for one in both)
        rows.append(("data.tokenizer, SHA-256", saved_hash, asked_hash))
    rows += _text_rows(config.data, saved.data, corpus)
    rows = [row for row in rows if row[1] != row[2]]
    if rows:
        width = max(len(name) for name, _, _ in rows)
        table = "\n".join(f"{name + ':':{width + 1}} saved {saved}, asked {asked}" for name, saved, asked in rows)
        raise UserError(
            f"{folder}: holds a run with other settings; restore them, or give another --run.folder, in which "
            f"--run.start-from {folder} begins with its weights\n{table}"
        )


def _text_rows(asked: DataConfig, saved: DataConfig, corpus: Corpus | Mixture) -> list[tuple[str, Any, Any]]:
    """What identifies the text of a run, and each source of a mixture with its weight: name, saved, requested value."""
    if len(asked.sources) != len(corpus.sources):
        return [("data.mixture, number of sources", len(corpus.sources), len(asked.sources))]
    rows: list[tuple[str, Any, Any]] = []
    for index, (known, (source, weight)) in enumerate(zip(corpus.sources, asked.sources, strict=True)):
        name = "data" if asked.mixture is None else f"data.mixture[{index}]"
        rows.append((f"{name}.weight, part of all rows", f"{known.weight:.6g}", f"{weight:.6g}"))
        try:
            rows.append((f"{name}.path, SHA-256 of the text", known.corpus.sha256, source_identity(source)))
        except UserError:
            if (asked.path, asked.mixture) != (saved.path, saved.mixture):
                raise
            # The text has been deleted, but the run has its tokens.
    return rows


def same_warmup(config: Config, saved: Config) -> bool:
    """Whether one requested warm-up gives both, each shortened to fit the steps of its run."""
    asked_steps, saved_steps = config.training.num_steps, saved.training.num_steps
    asked, known = config.optimizer.warmup_steps, saved.optimizer.warmup_steps
    # The third one stands for all that are too long for both runs.
    requests = (asked, known, max(asked_steps, saved_steps))
    return any(
        warmup_within(request, asked_steps) == asked and warmup_within(request, saved_steps) == known
        for request in requests
    )
