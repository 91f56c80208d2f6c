"""Text files -> one checked token array for training and one for validation.

A text is read byte for byte or refused, with the file, the reason and the way to mend it. Only `save_corpus` writes.
"""

import codecs
import glob
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer
from flax_decoder.errors import FaultError, UserError
from flax_decoder.files import replacing

BUILT_IN = "pydoc_data.topics"
"""As `data.path`: the help texts of Python, some 465,000 characters of English that every CPython ships."""

# How files that are no text begin, what they are, and what to do instead.
_SIGNATURES = {
    b"\x89PNG": ("a PNG image", "give a text file"),
    b"\x1f\x8b": ("gzip-compressed", "unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive", "unpack it, or export its text"),
    b"%PDF-": ("a PDF", "export its text, as with pdftotext"),
}
# Longest first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_UNMARKED_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
_SAMPLE_BYTES = 4096  # enough to tell an encoding by


@dataclass(frozen=True)
class SourceText:
    """A text and where it came from."""

    text: str
    name: str
    """the path as given (several: with commas between), or `BUILT_IN`; where no path was given, reads the same again"""
    sha256: str
    """of the text in UTF-8"""


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, in two parts. The sizes in bytes are what bits per byte are counted in."""

    train_tokens: np.ndarray
    """one-dimensional; uint16 where the vocabulary has at most 65,536 tokens, else uint32"""
    validation_tokens: np.ndarray
    train_bytes: int
    """size of the training part of the text in UTF-8"""
    validation_bytes: int
    source: str
    """name of the text"""
    sha256: str
    """of the whole text in UTF-8"""


def read_text(path: str | tuple[str, ...] | None) -> SourceText:
    """Reads the text that `data.path` names.

    Args:
        path: a text file, a folder (all .txt in it, sorted), a glob, `BUILT_IN`, or several of these in order. None is
            input.txt in the current folder, else `BUILT_IN`.

    Raises:
        UserError: there is no text there, or it is not UTF-8.
    """
    if path is None:
        path = "input.txt" if os.path.exists("input.txt") else BUILT_IN
    names = (path,) if isinstance(path, str) else path
    if not names or not all(names):
        raise UserError("data.path is empty; give a text file, a folder of .txt files or a glob, or leave it out")
    parts = [part for name in names for part in _read_parts(name)]
    ended = [part if part.endswith("\n") else part + "\n" for part in parts[:-1]]
    text = "".join([*ended, parts[-1]])
    return SourceText(text, ", ".join(names), hashlib.sha256(text.encode()).hexdigest())


def split_text(text: str, validation_fraction: float) -> tuple[str, str]:
    """Cuts a text into its training part and, the last part by characters, its validation part."""
    border = int(len(text) * (1 - validation_fraction))
    return text[:border], text[border:]


def prepare_corpus(data: DataConfig, context_length: int, vocab_size: int | None) -> tuple[Tokenizer, Corpus]:
    """Reads the text, makes its tokenizer, and encodes both parts. Writes nothing.

    Args:
        data: what to read, and how it becomes tokens.
        context_length: T; each part must hold a window of T + 1 tokens.
        vocab_size: V of the model, if it is set: at least that of the tokenizer; more is padding.

    Raises:
        UserError: the text or the tokenizer cannot be used, or does not go with the model.
    """
    source = read_text(data.path)
    train, validation = split_text(source.text, data.validation_fraction)
    # A char vocabulary that lacks a character of the validation part could not encode it; bpe must not learn from it.
    vocabulary_text = source.text if data.tokenizer == "char" else train
    tokenizer = make_tokenizer(data.tokenizer, vocabulary_text, data.bpe_vocab_size)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is too small: data.tokenizer = {data.tokenizer} has "
            f"{tokenizer.vocab_size} tokens on {source.name}; raise it to that or leave it out"
        )
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    train_tokens = tokenizer.encode_array(train).astype(dtype)
    validation_tokens = tokenizer.encode_array(validation).astype(dtype)
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
    sizes = len(train.encode()), len(validation.encode())
    return tokenizer, Corpus(train_tokens, validation_tokens, *sizes, source.name, source.sha256)


def save_corpus(corpus: Corpus, folder: str | os.PathLike[str]) -> None:
    """Writes a corpus; corpus.json comes last, so a folder that has it has everything.

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
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus.json").unlink(missing_ok=True)
        with replacing(folder / "train.npy") as file:
            np.save(file, corpus.train_tokens)
        with replacing(folder / "validation.npy") as file:
            np.save(file, corpus.validation_tokens)
        with replacing(folder / "corpus.json") as file:
            file.write(json.dumps(facts, indent=2).encode())
    except OSError as error:
        raise FaultError(f"{folder}: cannot write the corpus: {error}") from error


def load_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Opens a saved corpus; the tokens stay on disk, mapped read-only.

    Raises:
        FaultError: a file is missing, or is not what corpus.json says.
    """
    folder = Path(folder)
    path = folder / "corpus.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        num_train, num_validation = facts.pop("train_tokens"), facts.pop("validation_tokens")
        train_tokens = _map_tokens(folder / "train.npy", num_train)
        validation_tokens = _map_tokens(folder / "validation.npy", num_validation)
        return Corpus(train_tokens, validation_tokens, **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FaultError(f"{path}: is missing or damaged; make the corpus again from its text: {error!r}") from None


def _map_tokens(path: Path, num_tokens: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise FaultError(f"{path}: is missing or damaged; make the corpus again from its text: {error!r}") from None
    if tokens.shape != (num_tokens,) or tokens.dtype.kind != "u":
        raise FaultError(f"{path}: holds {tokens.dtype} {tokens.shape}, but corpus.json says {num_tokens} tokens")
    return tokens


def _read_parts(name: str) -> Iterator[str]:
    """The texts behind one name, in order."""
    if name == BUILT_IN:
        yield _read_built_in()
    elif os.path.isdir(name):
        files = sorted(file for file in Path(name).rglob("*.txt") if not file.is_dir())
        if not files:
            raise UserError(f"{name}: there is no .txt file in this folder; give a folder of .txt files, or one file")
        yield from map(_read_file, files)
    elif glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
        if not matches:
            raise UserError(f"{name}: no file matches this pattern; check the folder and the ending")
        yield from (_read_file(Path(match)) for match in matches)
    else:
        yield _read_file(Path(name))


def _read_built_in() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("there is no input.txt, and this Python lacks its help texts; give data.path") from None
    return "\n".join(topics[topic] for topic in sorted(topics))  # each ends its last line: a blank line between


def _read_file(path: Path) -> str:
    try:
        # Looked at before it is opened: opening a FIFO waits for a writer, reading a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is not a regular file; give a text file")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a text file, a folder of .txt files or a glob") from None
    except PermissionError:
        raise UserError(f"{path}: there is no permission to read it; chmod u+r {shlex.quote(str(path))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    return _decode(content, path)


def _decode(content: bytes, path: Path) -> str:
    """The text of a file, exactly: no newline is translated; only a mark of UTF-8 at the start is dropped."""
    for signature, (what, mend) in _SIGNATURES.items():
        if content.startswith(signature):
            raise UserError(f"{path}: is {what}, not text; {mend}")
    encoding = _find_other_encoding(content)
    if encoding is not None:
        raise UserError(f"{path}: is {encoding}, not UTF-8; {_iconv(encoding, path)}")
    if b"\0" in content:
        raise UserError(
            f"{path}: has NUL bytes (the first at offset {content.index(0)}), so it is binary, or text in UTF-16; "
            "give a text file in UTF-8"
        )
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: is not UTF-8 (byte 0x{content[error.start]:02X} at offset {error.start}, line {line});\n"
            f"if it is Latin-1: {_iconv('latin1', path)}"
        ) from None
    if not text.strip():
        raise UserError(f"{path}: {'has only white space' if text else 'is empty'}; give a file with text in it")
    return text


def _find_other_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark; without one, by the NUL bytes beside each ASCII character."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return encoding
    sample = content[:_SAMPLE_BYTES]
    if 4 * sample.count(0) < len(sample):  # English is half NUL bytes in UTF-16, three quarters in UTF-32
        return None
    for encoding in _UNMARKED_ENCODINGS:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        # In the wrong byte order a space or a letter is some U+xx00, so no ASCII is left.
        readable = all(character.isprintable() or character.isspace() for character in text)
        if readable and any(character.isascii() for character in text):
            return encoding
    return None


def _iconv(encoding: str, path: Path) -> str:
    converted = path.with_suffix(".utf8" + path.suffix)
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"
