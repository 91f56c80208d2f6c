"""Parts of files -> a shard of tokens. Run as a program, it does so for a process that sends it tasks.

It reads tasks and writes results, one JSON object a line, until its standard input ends. Its argument is the path of
the tokenizer, if the tasks need one.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_decoder.data.formats.files import pieces_of
from flax_decoder.data.formats.part import Part, Piece, place_of
from flax_decoder.data.formats.tokens import open_tokens
from flax_decoder.data.shards import starts_name
from flax_decoder.data.tokenizer import Tokenizer, load_tokenizer
from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing, write_text

# Of what is encoded at once.
_GROUP_CHARACTERS, _GROUP_DOCUMENTS = 1_000_000, 10_000
_TOKENS_AT_ONCE = 1_000_000
_MAX_ERRORS = 100
HASH_BYTES = 8  # of a document: to count duplicates


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends each document.

    Attributes:
        id: a token; None is none.
        text: a text; None is a newline, where a document does not end in one.
    """

    id: int | None = None
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to compute.

    Attributes:
        parts: what goes into it.
        output: its file; "" only collects the characters.
        text_field: see `DataConfig`.
        ending: of documents.
        item_bytes: of a token, 2 or 4.
    """

    parts: tuple[Part, ...]
    output: str
    text_field: str
    ending: Ending
    item_bytes: int = 2


@dataclasses.dataclass
class Result:
    """What a task has found, and written.

    Attributes:
        tokens: their number.
        documents: those that start in the shard.
        bytes: of text, in UTF-8.
        empty: documents without any text, which were passed over.
        has_text: some document has more than white space.
        sha256: of the tokens.
        starts_sha256: of the starts of documents.
        characters: that occur, if that was the task.
        errors: messages, one a file.
    """

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    empty: int = 0
    has_text: bool = False
    sha256: str = ""
    starts_sha256: str = ""
    characters: str = ""
    errors: list[str] = dataclasses.field(default_factory=list)


def perform(task: Task, tokenizer: Tokenizer | None) -> Result:
    """Computes a shard, or takes it if it was finished before.

    Returns:
        The result; if it has errors, the shard is not to be used.

    Raises:
        OSError: the shard cannot be written.
    """
    if tokenizer is None:
        return _characters(task)
    done = Path(f"{task.output}.done")
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return Result(**json.loads(done.read_text("utf-8")))
    result = _encode(task, tokenizer)
    if not result.errors:
        write_text(done, json.dumps(dataclasses.asdict(result)))
    return result


def _characters(task: Task) -> Result:
    found: set[str] = set()
    result = Result()
    for part in task.parts:
        try:
            for piece in pieces_of(part, task.text_field):
                found.update(piece.text)
        except UserError as error:
            result.errors.append(str(error))
    result.characters = "".join(sorted(found))
    return result


class _Writer:
    """A file of numbers, and their hash."""

    def __init__(self, file: BinaryIO):
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, numbers: np.ndarray | bytes) -> None:
        data = numbers if isinstance(numbers, bytes) else np.ascontiguousarray(numbers).data.cast("B")
        self._sha256.update(data)
        self._file.write(data)

    def sha256(self) -> str:
        return self._sha256.hexdigest()


def _encode(task: Task, tokenizer: Tokenizer) -> Result:
    output, result = Path(task.output), Result()
    with (
        replacing(output) as tokens_file,
        replacing(output.with_name(starts_name(output.name))) as starts_file,
        replacing(Path(f"{output}.hashes")) as hashes_file,
    ):
        tokens, starts = _Writer(tokens_file), _Writer(starts_file)
        for part in task.parts:
            if len(result.errors) >= _MAX_ERRORS:
                break
            try:
                if part.format == "tokens":
                    _copy_tokens(part, task, tokenizer, tokens, starts, result)
                else:
                    _encode_part(part, task, tokenizer, tokens, starts, hashes_file, result)
            except UserError as error:
                result.errors.append(str(error))
        result.sha256, result.starts_sha256 = tokens.sha256(), starts.sha256()
    return result


def _encode_part(
    part: Part, task: Task, tokenizer: Tokenizer, tokens: _Writer, starts: _Writer, hashes: BinaryIO, result: Result
) -> None:
    dtype = np.dtype(f"<u{task.item_bytes}")
    ending = np.array([] if task.ending.id is None else [task.ending.id], dtype)
    for group in _groups(pieces_of(part, task.text_field)):
        pieces = [piece for piece in group if not (piece.begins and piece.ends and not piece.text.strip())]
        result.empty += len(group) - len(pieces)
        texts = [piece.text + _ending_text(piece, task.ending) for piece in pieces]
        lengths, firsts = [], []
        for piece, text, ids in zip(pieces, texts, _encoded(part, pieces, texts, tokenizer), strict=True):
            if piece.begins:
                firsts.append(result.tokens)
            if piece.begins and piece.ends:
                hashes.write(hashlib.blake2b(piece.text.encode(), digest_size=HASH_BYTES).digest())
            array = ids.astype(dtype, copy=False)
            lengths.append(array)
            if piece.ends:
                lengths.append(ending)
            result.tokens += len(ids) + (len(ending) if piece.ends else 0)
            result.bytes += len(text.encode())
            result.has_text = result.has_text or not piece.text.isspace()
        tokens.write(np.concatenate([*lengths, ending[:0]]))
        starts.write(np.array(firsts, "<i8"))
        result.documents += len(firsts)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _ending_text(piece: Piece, ending: Ending) -> str:
    if not piece.ends or ending.id is not None:
        return ""
    if ending.text is None:
        return "" if piece.text.endswith("\n") else "\n"
    return ending.text


def _encoded(part: Part, pieces: list[Piece], texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    befores = [piece.before for piece in pieces]
    try:
        return tokenizer.encode_many(list(zip(befores, texts, strict=True)))
    except UserError:
        for piece, text in zip(pieces, texts, strict=True):  # which one was it?
            try:
                tokenizer.encode_many([(piece.before, text)])
            except UserError as error:
                raise UserError(f"{place_of(part, piece.row)}: {error}") from None
        raise


def _copy_tokens(
    part: Part, task: Task, tokenizer: Tokenizer, tokens: _Writer, starts: _Writer, result: Result
) -> None:
    """Copies tokens, and finds the documents in them."""
    mapped = open_tokens(Path(part.path))
    follows_end = part.start == 0 or int(mapped[part.start - 1]) in tokenizer.end_ids
    for first in range(part.start, part.stop or 0, _TOKENS_AT_ONCE):
        ids = np.asarray(mapped[first : min(first + _TOKENS_AT_ONCE, part.stop or 0)])
        wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
        if len(wrong):
            raise UserError(
                f"{part.path}: has the token {ids[wrong[0]]} at {first + int(wrong[0])}, but the tokenizer has "
                f"{tokenizer.vocab_size:,}; give data.tokenizer = the tokenizer.json that the tokens were made with"
            )
        begins = np.concatenate([[follows_end], np.isin(ids[:-1], tokenizer.end_ids)])
        follows_end = bool(ids[-1] in tokenizer.end_ids)
        tokens.write(ids.astype(f"<u{task.item_bytes}"))
        starts.write(np.flatnonzero(begins).astype("<i8") + result.tokens)
        result.documents += int(begins.sum())
        result.tokens += len(ids)
        result.has_text = True
        result.bytes += len(tokenizer.decode(ids).encode())


def task_of(document: dict[str, Any]) -> Task:
    """The task of a JSON object, as `dataclasses.asdict` made it."""
    parts = tuple(Part(**part) for part in document["parts"])
    return Task(**document | {"parts": parts, "ending": Ending(**document["ending"])})


def main() -> None:
    """Performs tasks until there are no more."""
    tokenizer = load_tokenizer(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in sys.stdin.buffer:
        try:
            reply: dict[str, Any] = dataclasses.asdict(perform(task_of(json.loads(line)), tokenizer))
        except (OSError, MemoryError) as error:
            reply = {"fault": f"{getattr(error, 'strerror', None) or 'memory does not suffice'}"}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
