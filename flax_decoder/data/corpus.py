"""Texts -> a corpus on disk: tokenized part by part, by several processes, in bounded memory.

Each shard is computed by itself from a plan that depends on the files only. So the bytes of a corpus are the same for
any number of processes, and whatever was done before an interruption.
"""

import contextlib
import dataclasses
import os
import queue
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data import encoding
from flax_decoder.data.encoding import Ending, Result, Task
from flax_decoder.data.example_corpus import prepare_examples
from flax_decoder.data.formats.files import pieces_of
from flax_decoder.data.formats.part import PART_BYTES, Part
from flax_decoder.data.plan import (
    Plan,
    Progress,
    divide,
    facts_of,
    item_bytes,
    make_plan,
    no_progress,
    paths_of,
    raise_all,
    source_hash,
)
from flax_decoder.data.shards import (
    CORPUS,
    TOKENIZER,
    is_corpus,
    load_corpus,
    read_facts,
    shard_name,
    starts_name,
    write_facts,
)
from flax_decoder.data.splits import Corpus, Mixture
from flax_decoder.data.tokenizer import KINDS, Tokenizer, load_tokenizer, make_tokenizer, write_tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.io.files import flush_names, make_folder, make_parents, sha256_of, write_text
from flax_decoder.io.line_process import LineProcess
from flax_decoder.io.lock import LOCK, FolderLock

PLAN = "plan.json"
# Above this, several processes pay for their start.
_SINGLE_PROCESS_BYTES = 2 * PART_BYTES
_HASHES_AT_ONCE = 4_000_000


def read_text(path: str | tuple[str, ...] | None) -> str:
    """All of the text that a path names, with a newline between two documents if the first does not end in one.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    parts, _, _, errors = divide(path)
    texts: list[str] = []
    for part in parts:
        try:
            if part.format == "tokens":
                raise UserError(f"{part.path}: holds tokens; give a text")
            for piece in pieces_of(part, DataConfig.text_field):
                if piece.begins and texts and not texts[-1].endswith("\n"):
                    texts.append("\n")
                texts.append(piece.text)
        except UserError as error:
            errors.append(str(error))
    raise_all(errors)
    text, name = "".join(texts), ", ".join(paths_of(path))
    if not text or text.isspace():  # strip() would copy it
        raise UserError(f"{name}: {'has only white space' if text else 'is empty'}; give a file with text in it")
    return text


def prepare_corpus(
    data: DataConfig,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    plans: Sequence[Plan | Path] | None = None,
    model_folder: Path | None = None,
    context_length: int | None = None,
    num_processes: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Tokenizer, Corpus | Mixture]:
    """Makes a corpus of the texts or conversations that `data` names, or takes one that is prepared already.

    Args:
        data: which texts, and how they become tokens.
        folder: exists. It gets the corpus and its tokenizer.json; what an interrupted call has finished in it is kept.
        tokenizer: that of the model, if it has one already, in place of the one of `data`.
        plans: from `make_plans` with the same arguments, if they were made before.
        model_folder: for conversations, where the model's chat template is.
        context_length: for conversations, T.
        num_processes: by default one for a small text, else as many as there are cores.
        progress: called now and then.

    Raises:
        UserError: a text or the tokenizer cannot be used.
        FaultError: the folder cannot be written.
    """
    try:
        plans = plans or make_plans(data, tokenizer)
        tokenizer = _write(
            data,
            folder,
            plans,
            num_processes,
            progress,
            tokenizer=tokenizer,
            model_folder=model_folder,
            context_length=context_length,
        )
    except OSError as error:
        raise FaultError(f"{folder}: cannot write the corpus: {error.strerror or error}") from error
    return tokenizer, load_corpus(folder)


def prepare_folder(
    data: DataConfig, out: Path, *, num_processes: int | None = None, progress: Progress
) -> dict[str, Any]:
    """Makes a corpus in a new folder, for many runs; a call that was interrupted is finished by the same call.

    It does not open the corpus, whose tokens may be more than the process may map into memory.

    Args:
        data: which texts, and how they become tokens.
        out: the folder; until the corpus is complete it is called .NAME.unfinished.
        num_processes: see `prepare_corpus`.
        progress: see `prepare_corpus`.

    Returns:
        What its corpus.json says.

    Raises:
        UserError: a text cannot be used, or the folder exists; nothing is left of it.
        InUseError: another process is at it.
        FaultError: the folder cannot be written.
    """
    if data.mixture is not None:
        raise UserError("data.mixture: prepare each of its sources in a folder of its own, all with one tokenizer.json")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists; give a new folder")
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        make_parents(unfinished)
        make_folder(unfinished)
        with FolderLock() as lock:
            lock.take(unfinished)
            lock.announce()
            try:
                _write(data, unfinished, make_plans(data), num_processes, progress)
            except UserError:
                shutil.rmtree(unfinished)
                raise
            (unfinished / LOCK).unlink()
            os.rename(unfinished, out)
            flush_names(out.parent)
    except OSError as error:
        raise FaultError(f"{out}: cannot be written: {error.strerror or error}") from error
    return read_facts(out)


def make_plans(data: DataConfig, tokenizer: Tokenizer | None = None) -> list[Plan | Path]:
    """What is to be done for each source of a text: see `make_plan`; or its folder, if it was prepared before.

    Args:
        data: see `make_plan`.
        tokenizer: see `make_plan`.

    Raises:
        UserError: see `make_plan`; or prepared sources have different tokenizers.
    """
    sources = [source for source, _ in data.sources]
    prepared = [prepared_folder(source) for source in sources]
    if data.mixture is not None:
        tokenizer = tokenizer or _common_tokenizer(prepared)
    plans = [folder or make_plan(source, tokenizer) for folder, source in zip(prepared, sources, strict=True)]
    for source, plan in zip(sources, plans, strict=True):
        if data.mixture is not None and isinstance(plan, Plan) and plan.has_examples:
            raise UserError(
                f"{', '.join(paths_of(source.path))}: has conversations, which are not mixed with texts; train on "
                "them alone: --data.path"
            )
    return plans


def _write(
    data: DataConfig,
    folder: Path,
    plans: Sequence[Plan | Path],
    num_processes: int | None,
    progress: Progress,
    *,
    tokenizer: Tokenizer | None = None,
    model_folder: Path | None = None,
    context_length: int | None = None,
) -> Tokenizer:
    """Writes the files of a corpus; see `prepare_corpus`."""
    if data.mixture is not None:
        return _write_mixture(data, folder, tokenizer, plans, num_processes, progress)
    plan = plans[0]
    if isinstance(plan, Path):
        return _take_prepared(data, plan, folder, tokenizer)
    if plan.has_examples:
        if context_length is None:
            raise UserError(
                f"{', '.join(paths_of(data.path))}: has conversations, which each run prepares for its own model; "
                "give it to train.py with --data.path"
            )
        return prepare_examples(plan, data, folder, model_folder, context_length, progress)
    _keep_what_is_done(plan, data, folder)
    tokenizer = plan.tokenizer or _make_tokenizer([plan], data, folder, num_processes)
    _encode(plan, data, folder, tokenizer, num_processes, progress)
    return tokenizer


def _write_mixture(
    data: DataConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    plans: Sequence[Plan | Path],
    num_processes: int | None,
    progress: Progress,
) -> Tokenizer:
    """A corpus of each source in a folder of its own, all with one tokenizer."""
    sources = [source for source, _ in data.sources]
    made = [plan for plan in plans if isinstance(plan, Plan)]
    tokenizer = (
        tokenizer
        or _common_tokenizer([plan for plan in plans if isinstance(plan, Path)])
        or made[0].tokenizer
        or _make_tokenizer(made, data, folder, num_processes)
    )
    write_tokenizer(folder / TOKENIZER, tokenizer)
    all_bytes, before = sum(plan.num_bytes for plan in made), [0, 0]

    def go_on(done_bytes: int, _: int, documents: int) -> None:
        progress(before[0] + done_bytes, all_bytes, before[1] + documents)

    for index, (source, plan) in enumerate(zip(sources, plans, strict=True)):
        inner = folder / str(index)
        if inner.exists():  # of an interrupted call, perhaps with another tokenizer
            shutil.rmtree(inner)
        make_folder(inner)
        if isinstance(plan, Plan):
            num_documents = _encode(plan, source, inner, tokenizer, num_processes, go_on)
            before = [before[0] + plan.num_bytes, before[1] + num_documents]
        else:
            _take_prepared(source, plan, inner, tokenizer)
        (inner / TOKENIZER).unlink()
    names = _names_of([paths_of(source.path)[0] for source in sources])
    facts = [
        {"name": name, "weight": weight, "sha256": sha256_of(folder / str(index) / CORPUS)}
        for index, (name, (_, weight)) in enumerate(zip(names, data.sources, strict=True))
    ]
    write_facts(folder, {"mixture": facts})
    return tokenizer


def _common_tokenizer(folders: Sequence[Path | None]) -> Tokenizer | None:
    """The tokenizer of all prepared sources of a mixture; raises UserError if two differ."""
    prepared = [folder for folder in folders if folder is not None]
    tokenizers = [load_tokenizer(path / TOKENIZER) for path in prepared if read_facts(path)]
    for path, tokenizer in zip(prepared, tokenizers, strict=True):
        if tokenizer.to_json() != tokenizers[0].to_json():
            raise UserError(
                f"{path}: was prepared with another tokenizer than {prepared[0]}; prepare it again with "
                f"--data.tokenizer {prepared[0] / TOKENIZER}"
            )
    return tokenizers[0] if tokenizers else None


def _names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each source of a mixture, from its path: safe to print and to log, no two alike."""
    names: list[str] = []
    for path in paths:
        words = [re.sub(r"[^A-Za-z0-9]+", "-", part.lstrip(".").split(".")[0]) for part in reversed(Path(path).parts)]
        word = next(filter(None, (word.strip("-")[:28] for word in words)), "source")
        numbered = (f"{word}-{count}" for count in range(2, len(paths) + 2))
        names.append(next(name for name in (word, *numbered) if name not in names))
    return names


def prepared_folder(data: DataConfig) -> Path | None:
    """The corpus that `data` names, if it was prepared before."""
    paths = paths_of(data.path)
    return Path(paths[0]) if len(paths) == 1 and is_corpus(paths[0]) else None


def _encode(
    plan: Plan, data: DataConfig, folder: Path, tokenizer: Tokenizer, num_processes: int | None, progress: Progress
) -> int:
    """Writes the corpus of a plan; returns the number of its documents."""
    write_tokenizer(folder / TOKENIZER, tokenizer)
    ending = ending_of(plan, data, tokenizer)
    tasks = {
        split: [
            Task(group, str(folder / shard_name(split, index)), data.text_field, ending, item_bytes(tokenizer))
            for index, group in enumerate(plan.shards(parts))
        ]
        for split, parts in (("train", plan.train), ("validation", plan.validation))
    }
    all_tasks = [*tasks["train"], *tasks["validation"]]
    found = _run(all_tasks, tokenizer, folder, num_processes, progress)
    results = {task.output: result for task, result in zip(all_tasks, found, strict=True)}
    raise_all([error for result in results.values() for error in result.errors])
    splits = {
        name: {
            "bytes": sum(results[task.output].bytes for task in group),
            "shards": [_shard_facts(task, results[task.output]) for task in group],
        }
        for name, group in tasks.items()
    }
    for name, split in splits.items():
        if split["bytes"] == 0 or not any(result.has_text for result in found):
            source = ", ".join(paths_of(data.path))
            raise UserError(f"{source}: has only white space, or nothing, for {name}; give files with text in them")
    what_was_read = _what_was_read(plan, found, folder)
    write_facts(folder, facts_of(plan, data, folder, tokenizer, what_was_read) | splits)
    for path in folder.iterdir():
        if path.name == PLAN or path.suffix in (".hashes", ".done"):
            path.unlink()
    return sum(result.documents for result in found)


def source_identity(data: DataConfig) -> str:
    """The SHA-256 that the corpus of these texts has; raises UserError if they cannot be read."""
    prepared = prepared_folder(data)
    return source_hash(data) if prepared is None else str(read_facts(prepared)["sha256"])


def require_fit(
    corpus: Corpus | Mixture, tokenizer: Tokenizer, data: DataConfig, context_length: int, vocab_size: int | None
) -> None:
    """Raises UserError if a corpus does not fit a model.

    Args:
        corpus: each part of a text must have at least `context_length` + 1 tokens.
        tokenizer: its own.
        data: where it is from.
        context_length: T.
        vocab_size: V of the model, if it is set: at least that of the tokenizer; more is padding.
    """
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is too small: data.tokenizer = {data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens on {corpus.source}; raise it to that, or leave it to the tokenizer: "
            "--model.vocab-size none"
        )
    for source in corpus.sources:
        _require_windows(source.corpus, data, context_length)


def _require_windows(corpus: Corpus, data: DataConfig, context_length: int) -> None:
    for part, split, fraction in (
        ("training", corpus.train, f"first {100 * (1 - data.validation_fraction):g} %"),
        ("validation", corpus.validation, f"last {100 * data.validation_fraction:g} %"),
    ):
        if not corpus.train.has_examples and split.num_tokens < context_length + 1:
            source = f"{corpus.source} ({fraction})" if data.validation_path is None else corpus.source
            raise UserError(
                f"the {part} part of {source} has {split.num_tokens} tokens, but context_length = {context_length} "
                f"needs at least {context_length + 1}: use a longer text or a smaller model.context_length"
            )


def _shard_facts(task: Task, result: Result) -> dict[str, Any]:
    return {
        "name": Path(task.output).name,
        "tokens": result.tokens,
        "documents": result.documents,
        "sha256": result.sha256,
        "starts_sha256": result.starts_sha256,
    }


def ending_of(plan: Plan, data: DataConfig, tokenizer: Tokenizer) -> Ending:
    """What ends each document: that of `data`, else the end token, else a newline; nothing does after a single text."""
    separator = data.document_separator
    if separator is not None:
        id = tokenizer.token_id(separator) if separator else None
        return Ending(id) if id is not None else Ending(text=separator)
    if plan.is_one_text:
        return Ending(text="")
    return Ending(tokenizer.end_ids[0]) if tokenizer.end_ids else Ending()


def _keep_what_is_done(plan: Plan, data: DataConfig, folder: Path) -> None:
    """Deletes what an earlier call left in a folder, unless it was about the same texts and settings."""
    fingerprint = plan.fingerprint(data)
    if (folder / PLAN).is_file() and (folder / PLAN).read_text("utf-8") == fingerprint:
        return
    for path in folder.iterdir():
        if path.name in (PLAN, TOKENIZER) or path.suffix in (".bin", ".hashes", ".done", ".tmp"):
            path.unlink()
    write_text(folder / PLAN, fingerprint)


def _make_tokenizer(plans: Sequence[Plan], data: DataConfig, folder: Path, num_processes: int | None) -> Tokenizer:
    """A char tokenizer of all text, or a bpe tokenizer of the training text."""
    with contextlib.suppress(UserError):  # of an interrupted call
        return load_tokenizer(folder / TOKENIZER)
    tokens = next((part.path for plan in plans for part in plan.parts if part.format == "tokens"), None)
    if tokens is not None:
        raise UserError(
            f"{tokens}: holds tokens, but data.tokenizer = {data.tokenizer}; give the path of the tokenizer.json that "
            "they were made with"
        )
    if data.tokenizer == "char":
        separator = "\n" if data.document_separator is None else data.document_separator
        # A char vocabulary without a character of the validation text could not encode it.
        tasks = [Task(group, "", data.text_field, Ending()) for plan in plans for group in plan.shards(plan.parts)]
        results = list(_run(tasks, None, folder, num_processes, no_progress))
        raise_all([error for result in results for error in result.errors])
        between = "" if all(plan.is_one_text for plan in plans) else separator
        return make_tokenizer("char", [between, *(result.characters for result in results)], 0)
    return make_tokenizer("bpe", _sample([part for plan in plans for part in plan.train], data), data.bpe_vocab_size)


def _sample(parts: Sequence[Part], data: DataConfig) -> Iterator[str]:
    """Training text of at most about `data.bpe_train_bytes`: the beginning of each part."""
    share = min(data.bpe_train_bytes / sum(part.num_bytes for part in parts), 1)
    for part in parts:
        rest = part.num_bytes * share if share < 1 else float("inf")
        for piece in pieces_of(part, data.text_field):
            text = piece.text if len(piece.text) <= rest else piece.text[: int(rest)]
            yield text
            rest -= len(text)
            if rest <= 0:
                break


def _run(
    tasks: Sequence[Task], tokenizer: Tokenizer | None, folder: Path, num_processes: int | None, progress: Progress
) -> list[Result]:
    """The results of tasks, in their order; `tokenizer` is that in the folder."""
    sizes = [sum(part.num_bytes for part in task.parts) for task in tasks]
    if num_processes is None:
        num_processes = 1 if sum(sizes) <= _SINGLE_PROCESS_BYTES else len(os.sched_getaffinity(0))
    results: dict[int, Result] = {}

    def note(index: int, result: Result) -> None:
        results[index] = result
        done = sum(sizes[index] for index in results)
        progress(done, sum(sizes), sum(result.documents for result in results.values()))

    if min(num_processes, len(tasks)) == 1:
        for index, task in enumerate(tasks):
            note(index, encoding.perform(task, tokenizer))
        return [results[index] for index in range(len(tasks))]

    arguments = ["-m", encoding.__name__, *([] if tokenizer is None else [str(folder / TOKENIZER)])]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # one thread each
    with contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[LineProcess] = queue.SimpleQueue()
        for _ in range(min(num_processes, len(tasks))):
            free.put(stack.enter_context(contextlib.closing(LineProcess(arguments, environment))))

        def perform(task: Task) -> Result:
            process = free.get()
            try:
                return _performed(task, process)
            finally:
                free.put(process)

        with ThreadPoolExecutor(num_processes) as threads:
            futures = {threads.submit(perform, task): index for index, task in enumerate(tasks)}
            try:
                for future in as_completed(futures):
                    note(futures[future], future.result())
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                stack.close()  # ends the processes, and with them the threads that wait for them
                raise
    return [results[index] for index in range(len(tasks))]


def _performed(task: Task, process: LineProcess) -> Result:
    """The result of a task in a process of `encoding`; raises FaultError if that ends, or cannot write."""
    reply = process.exchange(dataclasses.asdict(task))
    if reply is None:
        raise FaultError(f"a process that reads texts has ended with code {process.wait()}; is there enough memory?")
    if "fault" in reply:
        raise FaultError(f"{task.output}: cannot be written: {reply['fault']}")
    return Result(**reply)


def _what_was_read(plan: Plan, results: Sequence[Result], folder: Path) -> str:
    """A line on files, documents and what was passed over."""
    documents, empty = (sum(getattr(result, name) for result in results) for name in ("documents", "empty"))
    listing, empty = plan.listing, empty + plan.num_empty
    parts = [
        f"{len(listing.files) - plan.num_empty:,} file{'s' * (len(listing.files) - plan.num_empty != 1)}, "
        f"{documents:,} document{'s' * (documents != 1)}, {_as_bytes(sum(result.bytes for result in results))}"
    ]
    skipped = [f"{count:,} {what}" for count, what in ((empty, "empty"), (listing.num_hidden, "hidden")) if count]
    if skipped:
        parts.append(f"skipped: {', '.join(skipped)}")
    if listing.endings:
        endings = ", ".join(f"{ending or 'none'} {count:,}" for ending, count in listing.endings.most_common(8))
        parts.append(f"ignored endings: {endings}")
    duplicates = count_duplicates(sorted(folder.glob("*.hashes")))
    if duplicates:
        parts.append(f"{duplicates:,} document{'s are' if duplicates > 1 else ' is'} the same as an earlier one")
    if plan.cut is not None and not plan.is_one_text:
        parts.append(f"validation begins inside of {plan.cut}")
    return "; ".join(parts)


def count_duplicates(paths: Sequence[Path]) -> int:
    """How many of the hashes in files are equal to another one before them, in bounded memory."""
    total = sum(path.stat().st_size for path in paths) // encoding.HASH_BYTES
    num_rounds = -(-total // _HASHES_AT_ONCE)
    duplicates = 0
    for number in range(num_rounds):
        chosen = []
        for path in paths:
            hashes = np.fromfile(path, "<u8")
            chosen.append(hashes[hashes % num_rounds == number])
        hashes = np.concatenate(chosen)
        duplicates += len(hashes) - len(np.unique(hashes))
    return duplicates


def _as_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _take_prepared(data: DataConfig, prepared: Path, folder: Path, tokenizer: Tokenizer | None) -> Tokenizer:
    """Puts the files of a prepared corpus into a folder: as second names of the same files where that can be."""
    facts, own = read_facts(prepared), load_tokenizer(prepared / TOKENIZER)
    if tokenizer is not None and tokenizer.to_json() != own.to_json():
        raise UserError(
            f"{prepared}: was prepared with another tokenizer than the model's; prepare the texts again with it"
        )
    if data.tokenizer not in (*KINDS, facts["settings"].get("tokenizer")):
        given = load_tokenizer(data.tokenizer)
        if given.to_json() != own.to_json():
            raise UserError(f"{prepared}: was prepared with another tokenizer than data.tokenizer = {data.tokenizer}")
    shards = [shard["name"] for split in ("train", "validation") for shard in facts[split]["shards"]]
    for name in (*shards, *map(starts_name, shards), TOKENIZER, "corpus.json"):
        target = folder / name
        target.unlink(missing_ok=True)
        try:
            os.link(prepared / name, target, follow_symlinks=False)
        except OSError:  # another file system, or one without such links
            shutil.copyfile(prepared / name, target, follow_symlinks=False)
    return own
