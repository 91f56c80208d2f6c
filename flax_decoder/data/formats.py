"""Files of texts, whatever their format -> documents.

A file is divided into parts of bounded size that can be read in any order and by any process: a range of bytes, of rows
or of tokens. A part is read as pieces of documents, so that no document must fit in memory, unless it is one row.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import shlex
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np

from flax_decoder.data.listing import BUILT_IN
from flax_decoder.errors import DEVICE_FAILS, FaultError, UserError
from flax_decoder.io.files import open_regular
from flax_decoder.io.strict_json import shown

PART_BYTES = 16_000_000
"""Size of a part in a file that can be divided."""
MAX_ROW_BYTES = 32_000_000
"""Of a line of JSON, or of a text in a row."""
_READ_BYTES = 1_000_000
# Of the text before a part that does not begin a document: farther than what a token depends on.
_BEFORE_BYTES = 800
_ROWS_AT_ONCE = 256
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


@dataclasses.dataclass(frozen=True)
class Part:
    """A range of a file.

    Attributes:
        path: of the file; `BUILT_IN` for the built-in text.
        format: "text", "lines" (of JSON), "parquet", "arrow" or "tokens".
        packing: "gz", "zst", "utf-16" or "" (none). A packed text or packed lines can only be read from the start on.
        start: where it begins: the number of a byte of a text or of lines, of a character of a packed text, of a line
            of packed lines, of a row of a table, or of a token.
        stop: where it ends; None is the end of the file.
        num_bytes: about its size on disk, for weighing parts against each other.
    """

    path: str
    format: str
    packing: str
    start: int
    stop: int | None
    num_bytes: int


class Piece(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        text: of the piece.
        begins: it is the first of its document.
        ends: it is the last of its document.
        before: the end of the piece before, if this is not the first.
        row: its line or row, counted from the beginning of the part; None in a text.
    """

    text: str
    begins: bool = True
    ends: bool = True
    before: str = ""
    row: int | None = None


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
        if _is_utf16(head):
            packing = "utf-16"
        elif 0 in head:  # this raises: a large binary file is refused without reading all of it
            decode_text(head[: head.index(0) + 1], str(path), _how_to_convert(path))
    whole = Part(str(path), format, packing, 0, None, num_bytes)
    if format in ("parquet", "arrow"):
        num_rows = _count_rows(whole)
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
        find = _next_line if format == "lines" else _next_cut
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
        border = _after_end(open_tokens(path), border, stop, end_ids)
    elif part.format == "text" and part.packing == "" and stop - start <= 2 * PART_BYTES:
        text = "".join(piece.text for piece in pieces_of(part, ""))  # by characters
        mark = 3 if start == 0 and _has_mark(part) else 0
        border = start + mark + len(text[: int(len(text) * fraction)].encode("utf-8", "surrogatepass"))
    elif part.packing == "" and part.format in ("text", "lines"):
        with open_file(path) as file:
            if part.format == "text":
                border = _next_cut(file, border)
            else:
                after = _next_line(file, border)
                border = after if after < stop else _line_before(file, stop, start)
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
        return _stream_pieces(part) if part.packing else _text_pieces(part)
    rows = _json_rows(part, text_field) if part.format == "lines" else _table_rows(part, text_field)
    return (Piece(_checked_text(text, part, row), row=row) for row, text in rows)


def place_of(part: Part, row: int | None) -> str:
    """File and row of a piece, for messages."""
    if row is None:
        return part.path
    if part.format == "lines":
        return f"{part.path}: line {_first_line(part) + row + 1}"
    return f"{part.path}: row {part.start + row + 1}"


def looks_like_json_lines(path: Path) -> bool:
    """Whether a file that is read as a text has a JSON object in each of its first lines."""
    with open_file(path) as file:
        lines = file.read(100_000).split(b"\n")[:3]
    try:
        return lines[0][:1] == b"{" and all(isinstance(json.loads(line), dict) for line in lines[: len(lines) - 1 or 1])
    except ValueError:
        return False


def built_in_text() -> str:
    """The help texts of Python; raises UserError if it lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("there is no input.txt, and this Python lacks its help texts; give data.path") from None
    return "\n".join(topics[topic] for topic in sorted(topics))  # each topic ends in a newline: a blank line between


def decode_text(content: bytes, name: str, advice: str) -> str:
    """Decodes UTF-8, or UTF-16 with a byte order mark. Newlines stay as they are; one byte order mark is dropped.

    Args:
        content: the bytes.
        name: start of error messages.
        advice: end of error messages: how to convert the text.

    Raises:
        UserError: the bytes are in another encoding, or contain NUL.
    """
    encoding = "utf-16" if _is_utf16(content) else "utf-8"

    def not_text(offset: int) -> UserError:
        line = content[:offset].decode(encoding).count("\n") + 1
        return _not_text(name, encoding, content[offset], offset, line, advice)

    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_text(error.start) from None
    if "\0" in text:
        raise not_text(len(text[: text.index("\0")].encode(encoding)))
    return text.removeprefix("\ufeff") if encoding == "utf-8" else text  # the codec of UTF-16 has dropped its mark


def open_tokens(path: Path) -> np.ndarray:
    """Maps a file of token ids: uint16 as nanoGPT writes them (.bin), or a one-dimensional .npy of integers.

    Raises:
        UserError: it is neither.
    """
    with open_file(path) as file:
        num_bytes, beginning = os.fstat(file.fileno()).st_size, file.read(8)
    try:
        if path.suffix.lower() == ".npy":
            # Unlike np.load, this never opens a pickle or an archive.
            tokens = np.lib.format.open_memmap(path, mode="r")
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"it has {tokens.dtype} {tokens.shape}, but token ids are integers in one dimension")
            return tokens
        if beginning.startswith((b"\x80", b"PK\x03\x04")):
            raise ValueError("it looks like a checkpoint of PyTorch or a pickle")
        if num_bytes % 2:
            raise ValueError(f"it has {num_bytes:,} bytes, an odd number")
        return np.memmap(path, "<u2", "r") if num_bytes else np.zeros(0, np.uint16)
    except Exception as error:  # on a crafted header NumPy raises anything
        raise UserError(
            f"{path}: does not hold token ids, as nanoGPT's .bin (uint16) or a .npy of integers: {error}"
        ) from None


def open_file(path: Path) -> BufferedReader:
    """Opens a file that a corpus names; raises UserError."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a text file, a folder of texts or a glob") from None
    except PermissionError:
        raise UserError(f"{path}: there is no permission to read it; chmod u+r {shlex.quote(str(path))}") from None
    except OSError as error:
        if error.errno in DEVICE_FAILS:
            raise FaultError(f"{path}: cannot be read: {error.strerror}") from error
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a text file") from None


# Texts


def _is_utf16(beginning: bytes) -> bool:
    return beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _has_mark(part: Part) -> bool:
    if part.path == BUILT_IN:
        return False
    with open_file(Path(part.path)) as file:
        return file.read(3) == codecs.BOM_UTF8


def _next_cut(file: BinaryIO, offset: int) -> int:
    """The first place from `offset` on where a text in UTF-8 can be cut.

    After the newline between two visible ASCII characters: tokenizers make no token across it. Where there is none
    near, after any newline, else before any character.
    """
    file.seek(offset)
    window = np.frombuffer(file.read(_READ_BYTES), np.uint8)
    newlines = np.flatnonzero(window[1:-1] == 10) + 1
    visible = (window > 32) & (window < 127)
    good = newlines[visible[newlines - 1] & visible[newlines + 1]]
    starts = np.flatnonzero((window & 0xC0) != 0x80)
    best = good + 1 if len(good) else newlines + 1 if len(newlines) else starts
    return offset + (int(best[0]) if len(best) else len(window))


def _text_pieces(part: Part) -> Iterator[Piece]:
    """A text in UTF-8, or a range of it, as one piece."""
    path, stop = Path(part.path), cast(int, part.stop)
    with open_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        file.seek(max(part.start - _BEFORE_BYTES, 0))
        before = file.read(min(part.start, _BEFORE_BYTES)).decode("utf-8", "ignore")
        content = file.read(stop - part.start)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, part.start + error.start, content[error.start]) from None
    if "\0" in text:
        raise _not_utf8(path, part.start + content.index(0), 0)
    if part.start == 0:
        text = text.removeprefix("\ufeff")
    yield Piece(text, part.start == 0, stop >= num_bytes, before)


def _not_text(name: str, encoding: str, byte: int, offset: int, line: int, advice: str) -> UserError:
    """The error for a byte at which something stops being text."""
    return UserError(
        f"{name}: is not {encoding.upper()} text (byte 0x{byte:02X} at offset {offset}, line {line}); {advice}"
    )


def _not_utf8(path: Path, offset: int, byte: int) -> UserError:
    return _not_text(str(path), "utf-8", byte, offset, _line_number(path, offset), _how_to_convert(path))


def _how_to_convert(path: Path) -> str:
    converted = path.with_suffix(".utf8" + path.suffix)
    return f"convert it, for example: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"


def _line_number(path: Path, offset: int) -> int:
    """The line, from 1, that has a byte of a file."""
    newlines = 0
    with open_file(path) as file:
        while offset > 0 and (block := file.read(min(_READ_BYTES, offset))):
            newlines += block.count(b"\n")
            offset -= len(block)
    return newlines + 1


def _stream_pieces(part: Part) -> Iterator[Piece]:
    """A text that can only be read from its beginning on: packed, or in UTF-16."""
    begins, before = part.start == 0, ""
    held = ""
    for text in _characters(part):
        if len(held) > PART_BYTES:
            cut = held.rfind("\n", PART_BYTES // 2) + 1 or len(held)
            yield Piece(held[:cut], begins, False, before)
            begins, before, held = False, held[max(cut - _BEFORE_BYTES, 0) : cut], held[cut:]
        held += text
    yield Piece(held, begins, True, before)


def _characters(part: Part) -> Iterator[str]:
    """The text of a packed or UTF-16 file, block by block, from the character `start` to `stop`."""
    with _unpacked(part) as file:
        beginning = _read(file, part, 2)
        encoding = "utf-16" if _is_utf16(beginning) else "utf-8"
        decoder = codecs.getincrementaldecoder("utf-16" if encoding == "utf-16" else "utf-8-sig")()
        position, offset, block = 0, 0, beginning
        while True:
            more = _read(file, part, _READ_BYTES)
            block = block + more
            try:
                text = decoder.decode(block, final=not more)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{part.path}: is not {encoding.upper()} text (near byte {offset + error.start}); convert it first"
                ) from None
            if "\0" in text:
                raise UserError(
                    f"{part.path}: has the character NUL at character {position + text.index(chr(0))}; it is no text"
                )
            offset += len(block)
            first, last = max(part.start - position, 0), len(text) if part.stop is None else part.stop - position
            if text[first : max(last, 0)]:
                yield text[first : max(last, 0)]
            position, block = position + len(text), b""
            if not more or (part.stop is not None and position >= part.stop):
                return


@contextlib.contextmanager
def _unpacked(part: Part) -> Iterator[BinaryIO]:
    path = Path(part.path)
    with open_file(path) as file:
        if part.packing == "gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif part.packing == "zst":
            try:
                import zstandard
            except ImportError:
                raise _needs_extra(path, "zstandard") from None
            yield cast(BinaryIO, _Zstandard(file, zstandard.ZstdDecompressor()))
        else:
            yield file


@contextlib.contextmanager
def open_unpacked(part: Part) -> Iterator[BinaryIO]:
    """Opens the file of a part from its beginning on, without its packing.

    Raises:
        UserError: it cannot be read, also later on, where it is damaged.
    """
    with _unpacked(part) as file:
        yield cast(BinaryIO, io.BufferedReader(_Checked(file, part), _READ_BYTES))


class _Checked(io.RawIOBase):
    """A file that is read with `_read`."""

    def __init__(self, file: BinaryIO, part: Part):
        self._file, self._part, self._position = file, part, 0
        self._rest = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        block = self._rest or _read(self._file, self._part, len(buffer))  # may be more than that
        block, self._rest = block[: len(buffer)], block[len(buffer) :]
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


class _Zstandard:
    """A packed file of one or more frames. The package's own reader would take one that is cut off for a whole one."""

    _INPUT_BYTES = 4096  # a malicious frame makes up to 128 MB of them

    def __init__(self, file: BinaryIO, decompressor: Any):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        """Reads at least `size` bytes, unless the file ends; raises EOFError if it ends inside of a frame."""
        parts, length = [], 0
        while length < size and (block := self._file.read(self._INPUT_BYTES)):
            while block:
                self._frame = self._frame or self._decompressor.decompressobj()
                parts.append(self._frame.decompress(block))
                length += len(parts[-1])
                block = b""
                if self._frame.eof:
                    block, self._frame = self._frame.unused_data, None
        if length < size and self._frame is not None:
            raise EOFError("it ends inside of a frame")
        return b"".join(parts)


def _read(file: BinaryIO, part: Part, size: int) -> bytes:
    """`file.read(size)`; raises UserError where a packed file is damaged."""
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(part, error) from None
    except Exception as error:  # zstandard's own class
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(part, error) from None


def _damaged(part: Part, error: Exception) -> UserError:
    return UserError(f"{part.path}: is damaged or cut off: {error}; get it again")


def _needs_extra(path: Path, module: str) -> UserError:
    return UserError(f"{path}: needs the package {module}: pip install 'flax-decoder[data]'")


def _count(part: Part) -> int:
    """The characters or lines of a file that can only be read from its beginning on."""
    whole = dataclasses.replace(part, start=0, stop=None)
    if part.format == "text":
        return sum(map(len, _characters(whole)))
    return sum(1 for _ in _lines(whole))


# Lines of JSON


def _next_line(file: BinaryIO, offset: int) -> int:
    """The first start of a line from `offset` on, or the end of the file."""
    if offset == 0:
        return 0
    position = offset - 1
    file.seek(position)
    while block := file.read(_READ_BYTES):
        if (index := block.find(b"\n")) >= 0:
            return position + index + 1
        position += len(block)
    return position


def _line_before(file: BinaryIO, offset: int, start: int) -> int:
    """The last start of a line before `offset` (which ends one), but at least `start`."""
    position = offset - 1
    while position > start:
        first = max(position - _READ_BYTES, start)
        file.seek(first)
        index = file.read(position - first).rfind(b"\n")
        if index >= 0:
            return first + index + 1
        position = first
    return start


def _lines(part: Part) -> Iterator[bytes]:
    """The lines of a part, with their ends; raises UserError at one that is too long."""
    is_ranged = part.packing == ""
    with _unpacked(part) as file:
        if is_ranged:
            file.seek(part.start)
        number, position = 0, part.start
        held = b""
        while True:
            block = _read(
                file, part, _READ_BYTES if not is_ranged else min(_READ_BYTES, cast(int, part.stop) - position)
            )
            position += len(block)
            lines = (held + block).split(b"\n")
            held = lines.pop() if block else b""
            for line in lines:
                number += 1
                if is_ranged or (number > part.start and (part.stop is None or number <= part.stop)):
                    yield line
            if len(held) > MAX_ROW_BYTES:
                raise UserError(
                    f"{place_of(part, number if is_ranged else number - part.start)} has over {MAX_ROW_BYTES:,} bytes; "
                    "split its text into several lines, or give it as a .txt"
                )
            if not block:
                return


def _first_line(part: Part) -> int:
    """Lines of the file before a part."""
    return part.start if part.packing else _line_number(Path(part.path), part.start) - 1


def _json_rows(part: Part, text_field: str) -> Iterator[tuple[int, str]]:
    """The texts of lines of JSON, each with its number from 0."""
    for index, line in enumerate(_lines(part)):
        if not line.strip():
            continue

        def refuse(reason: str, index: int = index) -> NoReturn:
            raise UserError(f"{place_of(part, index)} {reason}")

        try:
            document = json.loads(line)
        except UnicodeDecodeError:
            refuse("is not UTF-8")
        except (ValueError, RecursionError) as error:
            refuse(
                f"is not JSON: {error}"
                + ("; is it a list or an object over several lines? give one object a line" if index == 0 else "")
            )
        if not isinstance(document, dict):
            refuse(f'must be a JSON object, such as {{{json.dumps(text_field)}: "..."}}, not {_kind(document)}')
        if text_field not in document:
            refuse(f"has no {text_field!r}; it has {shown([*document])}: name the text with data.text_field")
        if not isinstance(document[text_field], str):
            refuse(f"has {_kind(document[text_field])} as {text_field!r}, not a text; choose another data.text_field")
        yield index, document[text_field]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return kinds.get(type(value), "a number")


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


# Tables: Parquet and Arrow


def _count_rows(part: Part) -> int:
    if part.packing:
        raise UserError(f"{part.path}: packed tables are not read; unpack it (Parquet is packed inside)")
    if part.format == "parquet":
        with _parquet(part) as file:
            return int(file.metadata.num_rows)
    with _as_user_error(part):
        return sum(batch.num_rows for batch in _arrow_batches(part))


def _table_rows(part: Part, text_field: str) -> Iterator[tuple[int, str]]:
    """The texts of a table's rows, each with its number in the part."""
    import pyarrow

    start, stop = part.start, cast(int, part.stop)
    batches = _parquet_batches(part, text_field) if part.format == "parquet" else _arrow_ranges(part)
    for first, batch in _errors_named(batches, part):
        names = batch.schema.names
        if text_field not in names:
            raise UserError(
                f"{part.path}: has no column {text_field!r}, but {shown(names)}; name it with data.text_field"
            )
        column = batch.column(names.index(text_field))
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not any(test(column.type) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
            raise UserError(
                f"{part.path}: the column {text_field!r} holds {column.type}, not texts; choose data.text_field"
            )
        for offset in range(max(start - first, 0), min(stop - first, batch.num_rows), _ROWS_AT_ONCE):
            try:
                texts = column.slice(offset, min(_ROWS_AT_ONCE, stop - first - offset)).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{part.path}: near row {first + offset + 1}: is not UTF-8: {error.reason}") from None
            for index, text in enumerate(texts):
                row = first + offset + index - start
                if text is None:
                    raise UserError(f"{place_of(part, row)} has no text: {text_field!r} is null; remove the row")
                yield row, text


def _errors_named(batches: Iterator[tuple[int, Any]], part: Part) -> Iterator[tuple[int, Any]]:
    while True:
        with _as_user_error(part):
            item = next(batches, None)
        if item is None:
            return
        yield item


@contextlib.contextmanager
def _as_user_error(part: Part) -> Iterator[None]:
    """Turns what pyarrow raises at a damaged file into a UserError; its own classes are among these."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise _damaged(part, error) from None


def _parquet(part: Part) -> Any:
    path = Path(part.path)
    try:
        import pyarrow.parquet
    except ImportError:
        raise _needs_extra(path, "pyarrow") from None
    open_file(path).close()
    with _as_user_error(part):
        return pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)


def _parquet_batches(part: Part, text_field: str) -> Iterator[tuple[int, Any]]:
    """Batches of the row groups that a part touches, each with the number of its first row."""
    with _parquet(part) as file:
        columns = [text_field] if text_field in file.schema_arrow.names else None
        first = 0
        for group in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first < cast(int, part.stop) and first + num_rows > part.start:
                row = first
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                    yield row, batch
                    row += batch.num_rows
            first += num_rows


def _arrow_batches(part: Part) -> Iterator[Any]:
    """The record batches of an Arrow file, whose two forms are both common."""
    try:
        import pyarrow
    except ImportError:
        raise _needs_extra(Path(part.path), "pyarrow") from None
    open_file(Path(part.path)).close()
    with pyarrow.memory_map(part.path) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _arrow_ranges(part: Part) -> Iterator[tuple[int, Any]]:
    first = 0
    for batch in _arrow_batches(part):
        if first >= cast(int, part.stop):
            return
        if first + batch.num_rows > part.start:
            yield first, batch
        first += batch.num_rows


# Tokens


def _after_end(tokens: np.ndarray, border: int, stop: int, end_ids: tuple[int, ...]) -> int:
    """The first place from `border` on that is after the end of a document; `border` if none ends after it."""
    for start in range(border, stop if end_ids else border, _READ_BYTES):
        ends = np.flatnonzero(np.isin(tokens[start : min(start + _READ_BYTES, stop)], end_ids))
        if len(ends) and start + int(ends[0]) + 1 < stop:
            return start + int(ends[0]) + 1
    return border
