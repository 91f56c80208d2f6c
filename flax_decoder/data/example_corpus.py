"""Files of conversations -> a corpus on disk: the tokens of all examples, and which of them are learned."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.chat_template import find_chat_template
from flax_decoder.data.conversations import Example, encode_examples, read_examples, turn_ends
from flax_decoder.data.formats.packed import open_unpacked
from flax_decoder.data.formats.part import Part
from flax_decoder.data.plan import (
    Plan,
    Progress,
    divide,
    facts_of,
    item_bytes,
    no_progress,
    paths_of,
    raise_all,
)
from flax_decoder.data.shards import TOKENIZER, learned_name, shard_name, starts_name, write_facts
from flax_decoder.data.splits import ExampleSplit
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer, write_tokenizer
from flax_decoder.data.windows import Examples
from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing, sha256_of


def prepare_examples(
    plan: Plan,
    data: DataConfig,
    folder: Path,
    model_folder: Path | None,
    context_length: int,
    progress: Progress,
) -> Tokenizer:
    """Makes a corpus of conversations.

    Args:
        plan: their files, and the tokenizer; its end tokens get those that end answers.
        data: how they are split.
        folder: exists. It gets the corpus and its tokenizer.json.
        model_folder: where the model's chat template is; without one, only prompts and completions can be read.
        context_length: T; longer examples are cut at their end.
        progress: called now and then.

    Returns:
        The tokenizer.

    Raises:
        UserError: an example or the tokenizer cannot be used.
    """
    files = [_files(parts) for parts in (plan.train, plan.validation)]
    template = None if model_folder is None else find_chat_template(model_folder)
    tokenizer = plan.tokenizer or _make_tokenizer(data, *files)

    def encode(files: list[Part]) -> Examples:
        name = ", ".join(file.path for file in files)
        return encode_examples(_read(files, progress), tokenizer, template, context_length, name)

    encoded = [encode(group) for group in files if group]
    train, validation = encoded if len(encoded) == 2 else _split(encoded[0], data, files[0][0].path)
    ends = [id for examples in (train, validation) for id in turn_ends(examples, tokenizer)]
    tokenizer.end_ids = tuple(dict.fromkeys((*tokenizer.end_ids, *ends)))
    write_tokenizer(folder / TOKENIZER, tokenizer)
    splits = {}
    for name, examples in (("train", train), ("validation", validation)):
        num_bytes = learned_bytes(examples, tokenizer)
        if num_bytes == 0:
            source = ", ".join(paths_of(data.path))
            raise UserError(f"{source}: all answers for {name} are empty; give some with text in them")
        splits[name] = {"bytes": num_bytes, "shards": [_write(folder, name, examples, item_bytes(tokenizer))]}
    what_was_read = _what_was_read(len({*files[0], *files[1]}), plan.num_empty, encoded, context_length)
    write_facts(folder, facts_of(plan, data, folder, tokenizer, what_was_read) | splits)
    return tokenizer


def split_of(path: str, tokenizer: Tokenizer, model_folder: Path | None, context_length: int) -> ExampleSplit:
    """The conversations in a file, as one split in memory. Raises UserError as `prepare_examples`."""
    template = None if model_folder is None else find_chat_template(model_folder)
    parts, _, _, errors = divide(path)
    raise_all(errors)
    examples = encode_examples(_read(_files(parts)), tokenizer, template, context_length, path)
    num_bytes = learned_bytes(examples, tokenizer)
    if num_bytes == 0:
        raise UserError(f"{path}: all answers are empty; give some with text in them")
    starts = np.append(0, examples.ends[:-1])
    return ExampleSplit(examples.tokens, starts, num_bytes, learned=examples.learned.view(np.uint8))


def _read(files: list[Part], progress: Progress = no_progress) -> Iterator[Example]:
    """The examples in files."""
    total, before, count = sum(file.num_bytes for file in files), 0, 0
    for file in files:
        with open_unpacked(file) as lines:
            for example in read_examples(lines, file.path):
                yield example
                count += 1
                progress(before + min(lines.tell(), file.num_bytes), total, count)
        before += file.num_bytes
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


def _files(parts: list[Part]) -> list[Part]:
    """The files that parts are of, each as one part; raises UserError if one is not of lines."""
    other = next((part for part in parts if part.format != "lines"), None)
    if other is not None:
        raise UserError(
            f"{other.path}: is no file of conversations, but others are; give these alone as data.path, or name the "
            "text in their lines with data.text_field"
        )
    firsts = (part for part in dict.fromkeys(parts) if part.start == 0)
    return [dataclasses.replace(part, stop=None, num_bytes=os.path.getsize(part.path)) for part in firsts]


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


def _make_tokenizer(data: DataConfig, train: list[Part], validation: list[Part]) -> Tokenizer:
    """A tokenizer of the texts of prompts and completions: char of all of them, bpe of those for training."""
    files = train + validation if data.tokenizer == "char" else train
    texts = (message["content"] for example in _read(files) for message in example.messages)
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
