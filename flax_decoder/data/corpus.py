"""Text files -> one checked token array for training and one for validation.

A text is read byte for byte or refused, with the file, the reason and the way to mend it. Only `save_corpus` writes.
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
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer, pieces_of
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import open_regular, replacing, sha256_of

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
_MAX_FACTS_BYTES = 1_000_000  # of a corpus.json, which has a few hundred and the names of the texts


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
        raise UserError(
            "the path of the text is empty; give a text file, a folder of .txt files or a glob, or leave it out"
        )
    parts = [part for name in names for part in _read_parts(name)]
    ended = [part if part.endswith("\n") else part + "\n" for part in parts[:-1]]
    text = "".join([*ended, parts[-1]])
    sha256 = hashlib.sha256()
    for piece in pieces_of(text):
        sha256.update(piece.encode())
    return SourceText(text, ", ".join(names), sha256.hexdigest())


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
        sum(len(piece.encode()) for piece in pieces_of(part)) for part in (train, validation)
    )
    return tokenizer, Corpus(train_tokens, validation_tokens, train_bytes, validation_bytes, source.name, source.sha256)


def save_corpus(corpus: Corpus, folder: str | os.PathLike[str]) -> None:
    """Writes a corpus; corpus.json comes last, so a folder that has it has everything.

    It holds the SHA-256 of the two files of tokens, by which `load_corpus` knows that no bit of them has changed.

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
        facts["train_sha256"] = _write_tokens(folder / "train.npy", corpus.train_tokens)
        facts["validation_sha256"] = _write_tokens(folder / "validation.npy", corpus.validation_tokens)
        with replacing(folder / "corpus.json") as file:
            file.write(json.dumps(facts, indent=2).encode())
    except OSError as error:
        raise FaultError(f"{folder}: cannot write the corpus: {error}") from error


def load_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Opens a saved corpus; the tokens stay on disk, mapped read-only.

    Raises:
        BrokenError: a file is missing, or is not what corpus.json says.
    """
    folder = Path(folder)
    facts = _read_facts(folder / "corpus.json")
    return Corpus(
        _map_tokens(folder / "train.npy", facts["train_tokens"], facts["train_sha256"]),
        _map_tokens(folder / "validation.npy", facts["validation_tokens"], facts["validation_sha256"]),
        **{name: facts[name] for name in ("train_bytes", "validation_bytes", "source", "sha256")},
    )


# What stands in a corpus.json.
_FACTS = {
    "train_tokens": int,
    "validation_tokens": int,
    "train_bytes": int,
    "validation_bytes": int,
    "source": str,
    "sha256": str,
    "train_sha256": str,
    "validation_sha256": str,
}


def _read_facts(path: Path) -> dict[str, Any]:
    """What a corpus.json says; BrokenError where it does not say all of it and nothing else."""
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_FACTS_BYTES + 1)
        if len(content) > _MAX_FACTS_BYTES:
            raise ValueError(f"it has over {_MAX_FACTS_BYTES:,} bytes")
        pairs = json.loads(content.decode("utf-8"), object_pairs_hook=list)
        kinds = {name: type(value) for name, value in pairs} if _is_object(pairs) else {}
        if kinds != _FACTS or len(pairs) != len(_FACTS):
            different = [name for name in {**_FACTS, **kinds} if kinds.get(name) is not _FACTS.get(name)]
            what = f"{', '.join(map(ascii, different[:3]))}: missing, unknown or of another kind"
            raise ValueError(what if different else "it has a name twice")
        return dict(pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _is_object(pairs: Any) -> bool:
    return isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)


def _write_tokens(path: Path, tokens: np.ndarray) -> str:
    """Writes an array as a .npy file and returns the file's SHA-256, of what was meant and not of what was written."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    sha256 = hashlib.sha256()
    with replacing(path) as file:
        for part in (header.getbuffer(), tokens.data):
            sha256.update(part)
            file.write(part)
    return sha256.hexdigest()


def _map_tokens(path: Path, num_tokens: int, sha256: str) -> np.ndarray:
    """The array of a .npy file; BrokenError where the file or the array is not the one that corpus.json tells of."""
    try:
        actual = sha256_of(path)
        if actual != sha256:
            raise ValueError(f"its SHA-256 is {actual}, but corpus.json says {sha256}")
        # Unlike np.load, it knows nothing of pickles and archives.
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a made-up header makes NumPy raise anything
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
    """The texts behind one name, in order."""
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
            raise UserError(f"{name}: no file matches this pattern; check the folder and the ending")
        yield from (_read_file(Path(match)) for match in matches)
    else:
        yield _read_file(Path(name))


def _text_files(folder: str) -> Iterator[Path]:
    """All .txt files in a folder, however deep; UserError where a part of it cannot be looked into."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename}: this folder cannot be read: {error.strerror}; chmod it, or give its files"
        ) from None

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names if name.endswith(".txt"))


def _read_built_in() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("there is no input.txt, and this Python lacks its help texts; give data.path") from None
    return "\n".join(topics[topic] for topic in sorted(topics))  # each ends its last line: a blank line between


def _read_file(path: Path) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(_SAMPLE_BYTES)
            _refuse_what_is_no_text(content, path)  # at once, however large the file is
            content += file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a text file, a folder of .txt files or a glob") from None
    except PermissionError:
        raise UserError(f"{path}: there is no permission to read it; chmod u+r {shlex.quote(str(path))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None
    except MemoryError:
        raise UserError(f"{path}: is larger than this machine's memory; give a part of it") from None
    text = decode_text(content, str(path), f"if it is Latin-1: {_iconv('latin1', path)}")
    if not text or text.isspace():  # strip() would copy it
        raise UserError(f"{path}: {'has only white space' if text else 'is empty'}; give a file with text in it")
    return text


def decode_text(content: bytes, name: str, mend: str) -> str:
    """The text of some bytes, exactly: no newline is translated; only a mark of UTF-8 at the start is dropped.

    Args:
        content: UTF-8.
        name: of the source, which the message of an error begins with.
        mend: what the message tells the user to do where the bytes are not UTF-8.

    Raises:
        UserError: the bytes are no UTF-8 text.
    """
    _refuse_nul(content, name)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte, place = content[error.start], _place(content, error.start)
        raise UserError(f"{name}: is not UTF-8 (byte 0x{byte:02X} at {place});\n{mend}") from None


def _refuse_what_is_no_text(sample: bytes, path: Path) -> None:
    """Raises UserError for a file whose beginning shows that it is no UTF-8 text."""
    for signature, (what, mend) in _SIGNATURES.items():
        if sample.startswith(signature):
            raise UserError(f"{path}: is {what}, not text; {mend}")
    encoding = _find_other_encoding(sample)
    if encoding is not None:
        raise UserError(f"{path}: is {encoding}, not UTF-8; {_iconv(encoding, path)}")
    _refuse_nul(sample, str(path))


def _refuse_nul(content: bytes, name: str) -> None:
    start = content.find(0)
    if start >= 0:
        raise UserError(
            f"{name}: has NUL bytes (the first at {_place(content, start)}), so it is binary, or text in UTF-16; "
            "give text in UTF-8"
        )


def _place(content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    return f"offset {offset}, line {line}"


def _find_other_encoding(sample: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark; without one, by the NUL bytes beside each ASCII character."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return encoding
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
