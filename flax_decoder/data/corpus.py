"""Text files -> one checked token array for training and one for validation.

A text is read exactly or refused, with the file, the reason and the fix. Only `save_corpus` writes.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer, split_into_pieces
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import is_sha256, make_parents, open_regular, replacing, sha256_of, write_text
from flax_decoder.io.strict_json import SETTINGS, parse_object

BUILT_IN = "pydoc_data.topics"
"""As `data.path`: the help texts of Python, some 465,000 characters of English that every CPython ships."""


@dataclass(frozen=True)
class SourceText:
    """A text and its origin."""

    text: str
    name: str
    """the path as given (several: joined by commas), or `BUILT_IN`; if no path was given, a path that reads the same"""
    sha256: str
    """of the text in UTF-8"""


@dataclass(frozen=True)
class Corpus:
    """A tokenized text, split in two. Bits per byte are computed from the sizes in bytes."""

    train_tokens: np.ndarray
    """one-dimensional; uint16 if the vocabulary has at most 65,536 tokens, else uint32"""
    validation_tokens: np.ndarray
    train_bytes: int
    """size of the training text in UTF-8"""
    validation_bytes: int
    source: str
    """name of the text"""
    sha256: str
    """of the whole text in UTF-8"""


def read_text(path: str | tuple[str, ...] | None) -> SourceText:
    """Reads the text that `data.path` names.

    Args:
        path: a text file, a folder (all .txt files in it, sorted), a glob, `BUILT_IN`, or several of these in order.
            None is input.txt in the current folder, else `BUILT_IN`.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    if path is None:
        path = "input.txt" if os.path.exists("input.txt") else BUILT_IN
    names = (path,) if isinstance(path, str) else path
    if not names or not all(names):
        raise UserError(
            "the path of the text is empty; give a text file, a folder of .txt files or a glob, or leave it out"
        )
    parts = [part for name in names for part in _read_parts(name)]
    ended = [part if part.endswith("\n") else part + "\n" for part in parts[:-1]]
    text = "".join([*ended, parts[-1]])
    sha256 = hashlib.sha256()
    for piece in split_into_pieces(text):  # the whole text in UTF-8 would take its memory again
        sha256.update(piece.encode())
    return SourceText(text, ", ".join(names), sha256.hexdigest())


def split_text(text: str, validation_fraction: float) -> tuple[str, str]:
    """Splits a text into training and validation text; the latter is the last fraction of its characters."""
    border = int(len(text) * (1 - validation_fraction))
    return text[:border], text[border:]


def prepare_corpus(
    data: DataConfig, context_length: int, vocab_size: int | None, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, Corpus]:
    """Reads the text, makes its tokenizer, and encodes both parts. Writes nothing.

    Args:
        data: which text and tokenizer.
        context_length: T; each part must have at least T + 1 tokens.
        vocab_size: V of the model, if it is set: at least that of the tokenizer; more is padding.
        tokenizer: that of the model, if it has one already, in place of the one of `data`.

    Raises:
        UserError: the text or the tokenizer cannot be used, or does not fit the model.
    """
    source = read_text(data.path)
    train, validation = split_text(source.text, data.validation_fraction)
    if tokenizer is None:
        # A char vocabulary without a character of the validation text could not encode it; bpe must not learn from it.
        vocabulary_text = source.text if data.tokenizer == "char" else train
        tokenizer = make_tokenizer(data.tokenizer, vocabulary_text, data.bpe_vocab_size)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is too small: data.tokenizer = {data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens on {source.name}; raise it to that, or leave it to the tokenizer: "
            "--model.vocab-size none"
        )
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    train_tokens, validation_tokens = (tokenizer.encode_array(part, dtype) for part in (train, validation))
    for part, fraction, tokens in (
        ("training", f"first {100 * (1 - data.validation_fraction):g} %", train_tokens),
        ("validation", f"last {100 * data.validation_fraction:g} %", validation_tokens),
    ):
        if len(tokens) < context_length + 1:
            raise UserError(
                f"the {part} part of {source.name} ({fraction}) has {len(tokens)} tokens, but context_length = "
                f"{context_length} needs at least {context_length + 1}: use a longer text or a smaller "
                "model.context_length"
            )
    train_bytes, validation_bytes = (
        sum(len(piece.encode()) for piece in split_into_pieces(part)) for part in (train, validation)
    )
    return tokenizer, Corpus(train_tokens, validation_tokens, train_bytes, validation_bytes, source.name, source.sha256)


def save_corpus(corpus: Corpus, folder: str | os.PathLike[str]) -> None:
    """Writes a corpus. corpus.json is written last: if it exists, the corpus is complete.

    corpus.json has the SHA-256 of both token files, with which `load_corpus` detects any changed bit.

    Raises:
        FaultError: the folder cannot be written.
    """
    folder = Path(folder)
    facts = {
        "train_tokens": len(corpus.train_tokens),
        "validation_tokens": len(corpus.validation_tokens),
        "train_bytes": corpus.train_bytes,
        "validation_bytes": corpus.validation_bytes,
        "source": corpus.source,
        "sha256": corpus.sha256,
    }
    try:
        make_parents(folder / "corpus.json")
        (folder / "corpus.json").unlink(missing_ok=True)
        facts["train_sha256"] = _write_tokens(folder / "train.npy", corpus.train_tokens)
        facts["validation_sha256"] = _write_tokens(folder / "validation.npy", corpus.validation_tokens)
        write_text(folder / "corpus.json", json.dumps(facts, indent=2))
    except OSError as error:
        raise FaultError(f"{folder}: cannot write the corpus: {error}") from error


def load_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Opens a saved corpus; the tokens stay on disk, memory-mapped read-only.

    Raises:
        BrokenError: a file is missing, or does not match corpus.json.
    """
    folder = Path(folder)
    facts = _read_facts(folder / "corpus.json")
    return Corpus(
        _map_tokens(folder / "train.npy", facts["train_tokens"], facts["train_sha256"]),
        _map_tokens(folder / "validation.npy", facts["validation_tokens"], facts["validation_sha256"]),
        **{name: facts[name] for name in ("train_bytes", "validation_bytes", "source", "sha256")},
    )


# The fields of a corpus.json.
_FACTS = {
    **dict.fromkeys(("train_tokens", "validation_tokens", "train_bytes", "validation_bytes"), int),
    **dict.fromkeys(("source", "sha256", "train_sha256", "validation_sha256"), str),
}


def _read_facts(path: Path) -> dict[str, Any]:
    """Reads a corpus.json, which must have exactly the fields of `_FACTS`; raises BrokenError."""
    try:
        with open_regular(path) as file:
            facts = parse_object(file.read(SETTINGS.num_bytes + 1), path.name, SETTINGS)
    except (OSError, UserError) as error:
        raise _damaged(path, error) from None
    types = {name: type(value) for name, value in facts.items()}
    wrong = [name for name in {**_FACTS, **types} if types.get(name) is not _FACTS.get(name)]
    if wrong:
        raise _damaged(path, ValueError(f"{', '.join(map(ascii, wrong[:3]))}: missing, unknown or of the wrong type"))
    if not all(is_sha256(value) for name, value in facts.items() if name.endswith("sha256")):
        raise _damaged(path, ValueError("it has a SHA-256 that is none"))
    empty = [name for name, value in facts.items() if isinstance(value, int) and value < 1]
    if empty:  # bits per byte are computed from them
        raise _damaged(path, ValueError(f"{empty[0]} = {facts[empty[0]]} must be at least 1"))
    return facts


def _write_tokens(path: Path, tokens: np.ndarray) -> str:
    """Writes a .npy file. Returns the SHA-256 of the bytes in memory, so that a wrong write is detected later."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    sha256 = hashlib.sha256()
    with replacing(path) as file:
        for part in (header.getbuffer(), tokens.data):
            sha256.update(part)
            file.write(part)
    return sha256.hexdigest()


def _map_tokens(path: Path, num_tokens: int, sha256: str) -> np.ndarray:
    """Maps the array of a .npy file; raises BrokenError if the file or the array does not match corpus.json."""
    try:
        actual = sha256_of(path)
        if actual != sha256:
            raise ValueError(f"its SHA-256 is {actual}, but corpus.json says {sha256}")
        # Unlike np.load, this never opens a pickle or an archive.
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # on a crafted header NumPy raises anything
        raise _damaged(path, error) from None
    if tokens.shape != (num_tokens,) or tokens.dtype.kind != "u":
        raise BrokenError(f"{path}: holds {tokens.dtype} {tokens.shape}, but corpus.json says {num_tokens} tokens")
    return tokens


def _damaged(path: Path, error: Exception) -> BrokenError:
    return BrokenError(
        f"{path}: is missing or damaged: {getattr(error, 'strerror', None) or error};\n"
        "put back a copy of the run folder, or train again on the text with another --run.folder"
    )


def _read_parts(name: str) -> Iterator[str]:
    """The texts of one path, in order."""
    if name == BUILT_IN:
        yield _read_built_in()
    elif os.path.isdir(name):
        files = sorted(_text_files(name))
        if not files:
            raise UserError(f"{name}: there is no .txt file in this folder; give a folder of .txt files, or one file")
        yield from map(_read_file, files)
    elif glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
        if not matches:
            raise UserError(f"{name}: no file matches this pattern; check the folder and the extension")
        yield from (_read_file(Path(match)) for match in matches)
    else:
        yield _read_file(Path(name))


def _text_files(folder: str) -> Iterator[Path]:
    """All .txt files below a folder; UserError if part of it cannot be read."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename}: this folder cannot be read: {error.strerror}; chmod it, or give its files"
        ) from None

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names if name.endswith(".txt"))


def _read_built_in() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("there is no input.txt, and this Python lacks its help texts; give data.path") from None
    return "\n".join(topics[topic] for topic in sorted(topics))  # each topic ends in a newline: a blank line between


def _read_file(path: Path) -> str:
    converted = path.with_suffix(".utf8" + path.suffix)
    advice = (
        f"convert it, for example: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"
    )
    try:
        with open_regular(path) as file:
            beginning = file.peek()
            if 0 in beginning and _encoding_of(beginning) == "utf-8":
                # This raises: a large binary file is refused without reading all of it.
                decode_text(beginning[: beginning.index(0) + 1], str(path), advice)
            content = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a text file, a folder of .txt files or a glob") from None
    except PermissionError:
        raise UserError(f"{path}: there is no permission to read it; chmod u+r {shlex.quote(str(path))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    except MemoryError:
        raise UserError(f"{path}: is larger than this machine's memory; give a part of it") from None
    text = decode_text(content, str(path), advice)
    if not text or text.isspace():  # strip() would copy it
        raise UserError(f"{path}: {'has only white space' if text else 'is empty'}; give a file with text in it")
    return text


def decode_text(content: bytes, name: str, advice: str) -> str:
    """Decodes UTF-8, or UTF-16 with a byte order mark. Newlines stay as they are; one byte order mark is dropped.

    Args:
        content: the bytes.
        name: start of error messages.
        advice: end of error messages: how to convert the text.

    Raises:
        UserError: the bytes are in another encoding, or contain NUL.
    """
    encoding = _encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(content, error.start, name, advice) from None
    if "\0" in text:
        raise _not_text(content, len(text[: text.index("\0")].encode(encoding)), name, advice)
    return text.removeprefix("\ufeff") if encoding == "utf-8" else text  # the codec of UTF-16 has dropped its mark


def _encoding_of(content: bytes) -> str:
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"


def _not_text(content: bytes, offset: int, name: str, advice: str) -> UserError:
    """The error for a byte at which the content stops being text."""
    encoding = _encoding_of(content)
    line = content[:offset].decode(encoding).count("\n") + 1
    place = f"byte 0x{content[offset]:02X} at offset {offset}, line {line}"
    return UserError(f"{name}: is not {encoding.upper()} text ({place}); {advice}")
