"""Files of conversations -> a corpus on disk: the tokens of all examples, and which of them are learned."""

import codecs
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.chat_template import find_chat_template
from flax_decoder.data.conversations import LINE, Example, encode_examples, read_examples, turn_ends
from flax_decoder.data.formats.files import format_of
from flax_decoder.data.formats.packed import open_unpacked
from flax_decoder.data.formats.part import Part
from flax_decoder.data.listing import list_files
from flax_decoder.data.plan import divide, paths_of, raise_all, source_hash
from flax_decoder.data.shards import (
    is_corpus,
    learned_name,
    shard_name,
    starts_name,
    write_facts,
)
from flax_decoder.data.splits import ExampleSplit
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer, write_tokenizer
from flax_decoder.data.windows import Examples
from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing, sha256_of

_KEYS: tuple[set[str], ...] = ({"messages"}, {"prompt", "completion"})

Progress = Callable[[int, int, int], None]


def has_examples(data: DataConfig) -> bool:
    """Whether `data.path` names conversations: by the keys of the first line of the first file of lines.

    A line with the field `data.text_field` is a text, whatever else it has.

    Raises:
        UserError: a path names nothing, or the file cannot be read.
    """
    paths = () if data.mixture is not None else paths_of(data.path)
    if not paths or any(map(is_corpus, paths)):
        return False
    files = list_files(paths, lambda path: format_of(path) is not None).files
    file = next((file for file in files if (format_of(file) or ("",))[0] == "lines"), None)
    if file is None:
        return False
    with open_unpacked(_whole(file)) as lines:
        contents = (line.removeprefix(codecs.BOM_UTF8) for line in iter(lambda: lines.readline(LINE.num_bytes), b""))
        first = next((line for line in contents if line.strip()), b"")
    try:
        document = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(document, dict)
        and data.text_field not in document
        and any(keys <= document.keys() for keys in _KEYS)
    )


def prepare_examples(
    data: DataConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    model_folder: Path | None,
    context_length: int,
    progress: Progress,
) -> Tokenizer:
    """Makes a corpus of the conversations that `data` names.

    Args:
        data: which, and how they are split.
        folder: exists. It gets the corpus and its tokenizer.json.
        tokenizer: of the model; its end tokens get those that end answers. None makes that of `data`.
        model_folder: where the model's chat template is; without one, only prompts and completions can be read.
        context_length: T; longer examples are cut at their end.
        progress: called now and then.

    Returns:
        The tokenizer.

    Raises:
        UserError: an example or the tokenizer cannot be used.
    """
    parts, empty = _parts(data.path)
    others, more_empty = _parts(data.validation_path) if data.validation_path is not None else ([], 0)
    template = None if model_folder is None else find_chat_template(model_folder)
    if tokenizer is None:
        tokenizer = _make_tokenizer(data, parts)

    def encode(parts: list[Part]) -> Examples:
        name = ", ".join(part.path for part in parts)
        return encode_examples(_read(parts, progress), tokenizer, template, context_length, name)

    train = encode(parts)
    encoded = [train]
    if others:
        validation = encode(others)
        encoded.append(validation)
    else:
        train, validation = _split(train, data, parts[0].path)
    ends = [id for examples in (train, validation) for id in turn_ends(examples, tokenizer)]
    tokenizer.end_ids = tuple(dict.fromkeys((*tokenizer.end_ids, *ends)))
    write_tokenizer(folder / "tokenizer.json", tokenizer)
    item_bytes = 2 if tokenizer.vocab_size <= 2**16 else 4
    source = ", ".join(paths_of(data.path))
    facts = {
        "source": source,
        "sha256": source_hash(data),
        "what_was_read": _what_was_read(len({*parts, *others}), empty + more_empty, encoded, context_length),
        "item_bytes": item_bytes,
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "settings": json.loads(json.dumps(dataclasses.asdict(data))),
    }
    for name, examples in (("train", train), ("validation", validation)):
        num_bytes = learned_bytes(examples, tokenizer)
        if num_bytes == 0:
            raise UserError(f"{source}: all answers for {name} are empty; give some with text in them")
        facts[name] = {"bytes": num_bytes, "shards": [_write(folder, name, examples, item_bytes)]}
    write_facts(folder, facts)
    return tokenizer


def split_of(path: str, tokenizer: Tokenizer, model_folder: Path | None, context_length: int) -> ExampleSplit:
    """The conversations in a file, as one split in memory. Raises UserError as `prepare_examples`."""
    template = None if model_folder is None else find_chat_template(model_folder)
    examples = encode_examples(_read(_parts(path)[0]), tokenizer, template, context_length, path)
    num_bytes = learned_bytes(examples, tokenizer)
    if num_bytes == 0:
        raise UserError(f"{path}: all answers are empty; give some with text in them")
    starts = np.append(0, examples.ends[:-1])
    return ExampleSplit(examples.tokens, starts, num_bytes, learned=examples.learned.view(np.uint8))


def _read(parts: Iterable[Part], progress: Progress = lambda done, all, documents: None) -> Iterator[Example]:
    """The examples in files."""
    parts = list(parts)
    total, before, count = sum(part.num_bytes for part in parts), 0, 0
    for part in parts:
        with open_unpacked(part) as file:
            for example in read_examples(file, part.path):
                yield example
                count += 1
                progress(before + min(file.tell(), part.num_bytes), total, count)
        before += part.num_bytes
        progress(before, total, count)


def learned_bytes(examples: Examples, tokenizer: Tokenizer) -> int:
    """The size in UTF-8 of what is learned, without special tokens, as bits per byte of a text count them."""
    special = [tokenizer.token_id(token) for token in tokenizer.special_tokens]
    is_text = examples.learned & ~np.isin(examples.tokens, [id for id in special if id is not None])
    starts = np.append(0, examples.ends[:-1])
    return sum(
        len(tokenizer.decode(examples.tokens[start:end][is_text[start:end]]).encode())
        for start, end in zip(starts.tolist(), examples.ends.tolist(), strict=True)
    )


def _parts(path: str | tuple[str, ...] | None) -> tuple[list[Part], int]:
    """The files of conversations that a path names, and how many are empty; raises UserError."""
    found, _, num_empty, errors = divide(path)
    raise_all(errors)
    for part in found:
        if part.format != "lines":
            raise UserError(
                f"{part.path}: is no file of conversations, but others are; give these alone as data.path, or name the "
                "text in their lines with data.text_field"
            )
    if not found:
        raise UserError(f"{', '.join(paths_of(path))}: all of it is empty; give a file with conversations in it")
    return [_whole(Path(path)) for path in dict.fromkeys(part.path for part in found)], num_empty


def _whole(file: Path) -> Part:
    format, packing = format_of(file) or ("lines", "")
    num_bytes = file.stat().st_size if file.is_file() else 0
    return Part(str(file), format, packing, 0, None, num_bytes)


def _split(examples: Examples, data: DataConfig, path: str) -> tuple[Examples, Examples]:
    """Splits off the last examples for validation."""
    count = len(examples.ends)
    if count < 2:
        raise UserError(f"{path}: has one example only, but training and validation need one each; add examples")
    num_train = count - min(max(round(count * data.validation_fraction), 1), count - 1)
    border = int(examples.ends[num_train - 1])
    return (
        Examples(examples.tokens[:border], examples.learned[:border], examples.ends[:num_train]),
        Examples(examples.tokens[border:], examples.learned[border:], examples.ends[num_train:] - border),
    )


def _make_tokenizer(data: DataConfig, parts: list[Part]) -> Tokenizer:
    """That of `data`; char and bpe are made of the texts of prompts and completions."""
    if data.tokenizer not in ("char", "bpe"):
        return make_tokenizer(data.tokenizer, "", data.bpe_vocab_size)
    others = _parts(data.validation_path)[0] if data.validation_path is not None and data.tokenizer == "char" else []
    texts = (message["content"] for example in _read([*parts, *others]) for message in example.messages)
    return make_tokenizer(
        data.tokenizer, _first(texts, data) if data.tokenizer == "bpe" else texts, data.bpe_vocab_size
    )


def _first(texts: Iterator[str], data: DataConfig) -> Iterator[str]:
    """The first of some texts: about `data.bpe_train_bytes`."""
    size = 0
    for text in texts:
        if size >= data.bpe_train_bytes:
            return
        size += len(text)
        yield text


def _write(folder: Path, split: str, examples: Examples, item_bytes: int) -> dict[str, Any]:
    """Writes a split as one shard; returns what corpus.json says of it."""
    name = shard_name(split, 0)
    arrays = {
        name: examples.tokens.astype(f"<u{item_bytes}"),
        starts_name(name): np.append(0, examples.ends[:-1]).astype("<i8"),
        learned_name(name): examples.learned.view(np.uint8),
    }
    for file_name, array in arrays.items():
        with replacing(folder / file_name) as file:
            file.write(np.ascontiguousarray(array).data.cast("B"))
    tokens, starts, learned = (sha256_of(folder / file_name) for file_name in arrays)
    sizes = {"name": name, "tokens": len(examples.tokens), "documents": len(examples.ends)}
    return sizes | {"sha256": tokens, "starts_sha256": starts, "learned_sha256": learned}


def _what_was_read(num_files: int, num_empty: int, encoded: list[Examples], context_length: int) -> str:
    """A line on files, examples and what was cut or passed over."""
    count, tokens = sum(len(one.ends) for one in encoded), sum(len(one.tokens) for one in encoded)
    learned = sum(int(np.count_nonzero(one.learned)) for one in encoded)
    truncated, dropped = sum(one.num_truncated for one in encoded), sum(one.num_dropped for one in encoded)
    parts = [
        f"{num_files:,} file{'s' * (num_files != 1)}, {count:,} conversations, "
        f"{learned:,} of {tokens:,} tokens are learned"
    ]
    limit = f"model.context_length = {context_length}"
    if truncated:
        parts.append(f"{truncated:,} cut at their end, as they are longer than {limit}")
    if dropped:
        parts.append(f"{dropped:,} dropped, as none of their answer is within {limit}")
    if num_empty:
        parts.append(f"skipped: {num_empty:,} empty")
    return "; ".join(parts)
