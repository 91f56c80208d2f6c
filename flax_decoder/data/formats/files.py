"""What a file holds, how it is divided into parts, and what is read from a part."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from flax_decoder.data.formats.lines import json_rows, line_before, lines_of, next_line
from flax_decoder.data.formats.part import BUILT_IN, PART_BYTES, Part, Piece, open_file, place_of
from flax_decoder.data.formats.tables import count_rows, table_rows
from flax_decoder.data.formats.texts import (
    built_in_text,
    characters_of,
    decode_text,
    has_mark,
    how_to_convert,
    is_utf16,
    next_cut,
    stream_pieces,
    text_pieces,
)
from flax_decoder.data.formats.tokens import after_end, open_tokens
from flax_decoder.errors import UserError

_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "tokens",
    ".npy": "tokens",
}
_PACKINGS = {".gz": "gz", ".zst": "zst"}
# How files begin that are no text, whatever their names say.
_BEGINNINGS = {
    b"\x1f\x8b": "a gzip file; give it the ending .gz",
    b"\x28\xb5\x2f\xfd": "a zstandard file; give it the ending .zst",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"ARROW1": "an Arrow file; give it the ending .arrow",
    b"%PDF": "a PDF file; convert it to text first",
    b"PK\x03\x04": "a zip file, as .docx and .epub are; convert it to text first",
}


def format_of(path: Path) -> tuple[str, str] | None:
    """Format and packing of a file by its ending, without regard to case; None if the ending says nothing."""
    packing = _PACKINGS.get(path.suffix.lower(), "")
    ending = (Path(path.stem).suffix if packing else path.suffix).lower()
    return (_FORMATS[ending], packing) if ending in _FORMATS else None


def parts_of(path: Path) -> list[Part]:
    """Divides a file into parts of about `PART_BYTES`.

    Raises:
        UserError: it cannot be read, or is not what its ending says.
    """
    if str(path) == BUILT_IN:
        num_bytes = len(built_in_text().encode())
        return [Part(BUILT_IN, "text", "", 0, num_bytes, num_bytes)]
    format, packing = format_of(path) or ("text", _PACKINGS.get(path.suffix.lower(), ""))
    with open_file(path) as file:
        num_bytes, head = os.fstat(file.fileno()).st_size, file.peek()
    if not packing and format in ("text", "lines"):
        for mark, what in _BEGINNINGS.items():
            if head.startswith(mark):
                raise UserError(f"{path}: is {what}")
    if not packing and format == "text":
        if is_utf16(head):
            packing = "utf-16"
        elif 0 in head:  # this raises: a large binary file is refused without reading all of it
            decode_text(head[: head.index(0) + 1], str(path), how_to_convert(path))
    whole = Part(str(path), format, packing, 0, None, num_bytes)
    if format in ("parquet", "arrow"):
        num_rows = count_rows(whole)
        whole = dataclasses.replace(whole, stop=num_rows)
        per_part = max(num_rows * PART_BYTES // max(num_bytes, 1), 1)
        borders = [*range(0, num_rows, per_part), num_rows] if num_rows else []
    elif format == "tokens":
        tokens = open_tokens(path)
        whole = dataclasses.replace(whole, stop=len(tokens))
        borders = [*range(0, len(tokens), PART_BYTES // tokens.itemsize), len(tokens)] if len(tokens) else []
    elif packing:
        borders = []
    else:
        whole = dataclasses.replace(whole, stop=num_bytes)
        nominal = range(PART_BYTES, num_bytes - PART_BYTES // 2, PART_BYTES)
        find = next_line if format == "lines" else next_cut
        with open_file(path) as file:
            borders = sorted({0, *(min(find(file, offset), num_bytes) for offset in nominal), num_bytes})
    if len(borders) < 3:
        return [whole]
    total = borders[-1]
    return [
        dataclasses.replace(whole, start=start, stop=stop, num_bytes=num_bytes * (stop - start) // total)
        for start, stop in itertools.pairwise(borders)
    ]


def split(part: Part, fraction: float, end_ids: tuple[int, ...] = ()) -> tuple[Part, Part] | None:
    """Splits a part near a fraction of it, between two documents unless it is one text; None if that cannot be.

    Args:
        part: with at least one document.
        fraction: between 0 and 1.
        end_ids: of tokens: what ends a document.

    Raises:
        UserError: it cannot be read.
    """
    path, start = Path(part.path), part.start
    if part.stop is None:  # it can only be read from its beginning on
        part = dataclasses.replace(part, stop=_count(part))
    stop = cast(int, part.stop)
    border = start + int((stop - start) * fraction)
    if part.format == "tokens":
        border = after_end(open_tokens(path), border, stop, end_ids)
    elif part.format == "text" and part.packing == "" and stop - start <= 2 * PART_BYTES:
        text = "".join(piece.text for piece in pieces_of(part, ""))  # by characters
        mark = 3 if start == 0 and has_mark(part) else 0
        border = start + mark + len(text[: int(len(text) * fraction)].encode("utf-8", "surrogatepass"))
    elif part.packing == "" and part.format in ("text", "lines"):
        with open_file(path) as file:
            if part.format == "text":
                border = next_cut(file, border)
            else:
                after = next_line(file, border)
                border = after if after < stop else line_before(file, stop, start)
    else:
        border = min(max(border, start + 1), stop - 1)
    if not start < border < stop:
        return None
    first = part.num_bytes * (border - start) // (stop - start)
    return (
        dataclasses.replace(part, stop=border, num_bytes=first),
        dataclasses.replace(part, start=border, num_bytes=part.num_bytes - first),
    )


def pieces_of(part: Part, text_field: str) -> Iterator[Piece]:
    """Reads a part: documents, or pieces of long ones, in order.

    Args:
        part: of a format other than "tokens".
        text_field: the name of the text in a line of JSON or a row of a table.

    Raises:
        UserError: it is damaged, or has something that is no text; the message names the row.
    """
    if part.path == BUILT_IN:
        text = built_in_text()
        piece = text.encode()[part.start : part.stop].decode()
        is_last = part.stop is None or part.stop >= len(text.encode())
        return iter([Piece(piece, part.start == 0, is_last)])
    if part.format == "text":
        return stream_pieces(part) if part.packing else text_pieces(part)
    rows = json_rows(part, text_field) if part.format == "lines" else table_rows(part, text_field)
    return (Piece(_checked_text(text, part, row), row=row) for row, text in rows)


def _checked_text(text: str, part: Part, row: int) -> str:
    """Raises UserError at what cannot be in a text."""
    if "\0" in text:
        raise UserError(f"{place_of(part, row)} has the character NUL in its text; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"{place_of(part, row)} has U+{code:04X}, half a surrogate pair, which is no character; remove it"
        ) from None
    return text


def _count(part: Part) -> int:
    """The characters or lines of a file that can only be read from its beginning on."""
    whole = dataclasses.replace(part, start=0, stop=None)
    if part.format == "text":
        return sum(map(len, characters_of(whole)))
    return sum(1 for _ in lines_of(whole))
