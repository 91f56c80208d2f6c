"""Paths -> which parts of which files are for training and which for validation. No text is tokenized yet."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flax_decoder.config import DataConfig
from flax_decoder.data.conversations import begins_with_example
from flax_decoder.data.formats import files
from flax_decoder.data.formats.files import format_of, parts_of, pieces_of
from flax_decoder.data.formats.lines import looks_like_json_lines
from flax_decoder.data.formats.packed import open_unpacked
from flax_decoder.data.formats.part import BUILT_IN, PART_BYTES, Part, open_file
from flax_decoder.data.formats.texts import built_in_text
from flax_decoder.data.listing import Listing, list_files
from flax_decoder.data.shards import TOKENIZER, hash_of_hashes
from flax_decoder.data.tokenizer import Tokenizer, make_tokenizer
from flax_decoder.errors import FolderWarning, UserError
from flax_decoder.io.files import sha256_of

Progress = Callable[[int, int, int], None]
"""Called with the bytes that are done, all bytes, and the documents so far."""


def no_progress(done_bytes: int, all_bytes: int, documents: int) -> None:
    """Shows nothing."""


_MAX_SHARDS = 2000  # in larger corpora the shards are larger
_MAX_SHOWN_ERRORS = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of a corpus.

    Attributes:
        train: parts in the order of the files; of conversations without files for validation all of them.
        validation: likewise.
        listing: where they are from.
        num_empty: empty files, which were passed over.
        cut: the text in whose middle the validation split begins; None if it begins with a document.
        tokenizer: the one for it, unless it is to be made of the texts.
        has_examples: it is of conversations.
    """

    train: list[Part]
    validation: list[Part]
    listing: Listing
    num_empty: int
    cut: str | None
    tokenizer: Tokenizer | None
    has_examples: bool

    @property
    def parts(self) -> list[Part]:
        """All parts."""
        return self.train + self.validation

    @property
    def num_bytes(self) -> int:
        """The size of all parts on disk."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def is_one_text(self) -> bool:
        """Whether all of it is one text, which needs nothing between documents."""
        return len({part.path for part in self.parts}) == 1 and self.parts[0].format == "text"

    def shards(self, parts: Iterable[Part]) -> Iterator[tuple[Part, ...]]:
        """Groups parts into shards of bounded size and number."""
        size = max(PART_BYTES, self.num_bytes // _MAX_SHARDS)
        group: list[Part] = []
        for part in parts:
            if group and sum(member.num_bytes for member in group) + part.num_bytes > size * 5 // 4:
                yield tuple(group)
                group = []
            group.append(part)
        if group:
            yield tuple(group)

    def fingerprint(self, data: DataConfig) -> str:
        """Of everything that the shards depend on, but the content of the files; these have sizes and times."""
        files = [(str(file), *_size_and_time(file)) for file in self.listing.files]
        parts = [[dataclasses.astuple(part) for part in split] for split in (self.train, self.validation)]
        return hashlib.sha256(json.dumps([files, parts, dataclasses.asdict(data)]).encode()).hexdigest()


def paths_of(path: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The paths that `data.path` names: if it is left out, input.txt in the current folder, else `BUILT_IN`."""
    if path is None:
        path = "input.txt" if os.path.exists("input.txt") else BUILT_IN
    return (path,) if isinstance(path, str) else path


def make_plan(data: DataConfig, tokenizer: Tokenizer | None = None) -> Plan:
    """Lists and divides the files of a corpus, and reads the tokenizer that `data` names.

    Args:
        data: which texts, and how they are split.
        tokenizer: that of the model, if it has one already, in place of the one of `data`.

    Raises:
        UserError: files cannot be used; the message has all of them.
    """
    if tokenizer is None and data.tokenizer not in ("char", "bpe"):
        tokenizer = make_tokenizer(data.tokenizer, "", data.bpe_vocab_size)
    end_ids = () if tokenizer is None else tokenizer.end_ids
    parts, listing, num_empty, errors = divide(data.path)
    validation: list[Part] = []
    if data.validation_path is not None:
        validation, other, more, more_errors = divide(data.validation_path)
        num_empty, errors = num_empty + more, errors + more_errors
        listing.files += other.files
        listing.num_hidden += other.num_hidden
        listing.endings += other.endings
    raise_all(errors)
    if not parts or (data.validation_path is not None and not validation):
        raise UserError(f"{', '.join(paths_of(data.path))}: all of it is empty; give a file with text in it")
    cut, has_examples = None, _are_examples(parts, data.text_field)
    if data.validation_path is None and not has_examples:
        try:
            parts, validation, cut = split_parts(parts, data.validation_fraction, end_ids)
        except UserError as error:
            raise_all(_unreadable(parts, data.text_field) or [str(error)])
    return Plan(parts, validation, listing, num_empty, cut, tokenizer, has_examples)


def item_bytes(tokenizer: Tokenizer) -> int:
    """The bytes of a token on disk."""
    return 2 if tokenizer.vocab_size <= 2**16 else 4


def facts_of(plan: Plan, data: DataConfig, folder: Path, tokenizer: Tokenizer, what_was_read: str) -> dict[str, Any]:
    """What corpus.json says of a whole corpus; the folder has the tokenizer already."""
    return {
        "source": ", ".join(paths_of(data.path)),
        "sha256": hash_of_files(plan.listing.files),
        "what_was_read": what_was_read,
        "item_bytes": item_bytes(tokenizer),
        "tokenizer_sha256": sha256_of(folder / TOKENIZER),
        "settings": dataclasses.asdict(data),
    }


def has_examples(data: DataConfig) -> bool:
    """Whether `data.path` names conversations. Raises UserError as `divide`."""
    return _are_examples(divide(data.path)[0], data.text_field)


def _are_examples(parts: Iterable[Part], text_field: str) -> bool:
    """Whether parts are of conversations: by the first line of the first file of lines."""
    part = next((part for part in parts if part.format == "lines"), None)
    if part is None:
        return False
    with open_unpacked(part) as file:
        return begins_with_example(file, text_field)


def source_hash(data: DataConfig) -> str:
    """The hash of all files of a corpus, by which a resumed run sees that its text is the same."""
    paths = paths_of(data.path) + (() if data.validation_path is None else paths_of(data.validation_path))
    return hash_of_files(list_files(paths).files)


def hash_of_files(files: Iterable[Path]) -> str:
    """The SHA-256 of one file, or one for those of several."""
    return hash_of_hashes([_hash_of(file) for file in files])


def split_parts(
    parts: list[Part], fraction: float, end_ids: tuple[int, ...] = ()
) -> tuple[list[Part], list[Part], str | None]:
    """Splits off about the last fraction of parts, by size, between two documents.

    One long text is cut where no border is near: where the validation split would be under half or over twice as large
    as it should be.

    Args:
        parts: at least one.
        fraction: of the validation split.
        end_ids: what ends a document in files of tokens.

    Returns:
        The parts of both splits, and the text that is cut, if one is.

    Raises:
        UserError: there is only one document, and it is no text.
    """
    total = sum(part.num_bytes for part in parts)
    wanted = total * fraction
    index, position = 0, 0
    while index < len(parts) - 1 and position + parts[index].num_bytes <= total - wanted:
        position += parts[index].num_bytes
        index += 1
    part = parts[index]
    if part.format == "text":
        first = next(i for i in range(index, -1, -1) if parts[i].start == 0)
        last = next((i for i in range(index + 1, len(parts)) if parts[i].start == 0), len(parts))
        if first > 0 and sum(part.num_bytes for part in parts[first:]) <= 2 * wanted:
            return parts[:first], parts[first:], None
        if last < len(parts) and sum(part.num_bytes for part in parts[last:]) >= wanted / 2:
            return parts[:last], parts[last:], None
    inside = 1 - fraction if len(parts) == 1 else (total - wanted - position) / max(part.num_bytes, 1)
    halves = files.split(part, inside, end_ids)
    if halves is not None:
        cut = part.path if part.format == "text" else None
        return [*parts[:index], halves[0]], [halves[1], *parts[index + 1 :]], cut
    border = index if index > 0 else 1
    if border == len(parts):
        if part.format == "text":
            raise UserError(f"{part.path}: is empty, or a single character; give a file with text in it")
        raise UserError(
            f"{part.path}: has only one document, which cannot be split into training and validation; add documents, "
            "or give data.validation_path"
        )
    return parts[:border], parts[border:], None


def raise_all(errors: list[str]) -> None:
    """Raises one UserError for all errors, if there are any."""
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        shown = "\n".join(f"  {error}" for error in errors[:_MAX_SHOWN_ERRORS])
        more = f"\n  and {len(errors) - _MAX_SHOWN_ERRORS} more" if len(errors) > _MAX_SHOWN_ERRORS else ""
        raise UserError(f"{len(errors)} files or rows cannot be used:\n{shown}{more}")


def _unreadable(parts: list[Part], text_field: str) -> list[str]:
    """A message for each file with something that cannot be read."""
    errors: dict[str, str] = {}
    for part in parts:
        try:
            for _ in pieces_of(part, text_field) if part.format != "tokens" else ():
                pass
        except UserError as error:
            errors.setdefault(part.path, str(error))
    return [*errors.values()]


def divide(path: str | tuple[str, ...] | None) -> tuple[list[Part], Listing, int, list[str]]:
    """Divides the files that a path names.

    Returns:
        Their parts, the files, how many of them are empty, and a message for each that cannot be used.

    Raises:
        UserError: a path names nothing, or a folder cannot be read.
    """
    listing = list_files(paths_of(path))
    parts: list[Part] = []
    num_empty, errors = 0, []
    for file in listing.files:
        try:
            found = parts_of(file)
        except UserError as error:
            errors.append(str(error))
            continue
        if any(part.num_bytes > 0 and part.stop != 0 for part in found):
            parts += found
        elif file in listing.named and len(listing.files) == 1:
            errors.append(f"{file}: is empty; give a file with text in it")
        else:
            num_empty += 1
    _warn_of_json(listing)
    return parts, listing, num_empty, errors


def _warn_of_json(listing: Listing) -> None:
    for file in listing.files:
        is_text = str(file) != BUILT_IN and format_of(file) in (None, ("text", "")) and os.path.isfile(file)
        if is_text and looks_like_json_lines(file):
            warnings.warn(
                f"{file}: looks like lines of JSON, but is read as plain text, braces and all; if each line is a "
                "document, rename it to .jsonl",
                FolderWarning,
                stacklevel=2,
            )
            return  # once is enough


def _size_and_time(file: Path) -> tuple[int, int]:
    if str(file) == BUILT_IN:
        return 0, 0
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _hash_of(file: Path) -> str:
    if str(file) == BUILT_IN:
        return hashlib.sha256(built_in_text().encode()).hexdigest()
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
