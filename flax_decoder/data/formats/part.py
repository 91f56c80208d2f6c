"""A part of a file, and the pieces of documents that are read from it."""

import dataclasses
import shlex
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from flax_decoder.errors import DEVICE_FAILS, FaultError, UserError
from flax_decoder.io.files import open_regular

BUILT_IN = "pydoc_data.topics"
"""As `data.path`: the help texts of Python, some 465,000 characters of English that every CPython ships."""
PART_BYTES = 16_000_000
"""Size of a part in a file that can be divided."""
MAX_ROW_BYTES = 32_000_000
"""Of a line of JSON, or of a text in a row."""
READ_BYTES = 1_000_000
"""Of a block that is read at a time."""


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


def line_number(path: Path, offset: int) -> int:
    """The line, from 1, that has a byte of a file."""
    newlines = 0
    with open_file(path) as file:
        while offset > 0 and (block := file.read(min(READ_BYTES, offset))):
            newlines += block.count(b"\n")
            offset -= len(block)
    return newlines + 1


def place_of(part: Part, row: int | None) -> str:
    """File and row of a piece, for messages."""
    if row is None:
        return part.path
    if part.format == "lines":
        return f"{part.path}: line {_first_line(part) + row + 1}"
    return f"{part.path}: row {part.start + row + 1}"


def _first_line(part: Part) -> int:
    """Lines of the file before a part."""
    return part.start if part.packing else line_number(Path(part.path), part.start) - 1


def damaged(part: Part, error: Exception) -> UserError:
    """The error for a file that cannot be read to its end."""
    return UserError(f"{part.path}: is damaged or cut off: {error}; get it again")


def needs_extra(path: Path, module: str) -> UserError:
    """The error for a file that needs a package which is not installed."""
    return UserError(f"{path}: needs the package {module}: pip install 'flax-decoder[data]'")
