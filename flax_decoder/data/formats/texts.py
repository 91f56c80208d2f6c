"""Texts: in UTF-8, of which any range can be read; packed or in UTF-16, which are read from their beginning on."""

import codecs
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from flax_decoder.data.formats.packed import read_block, unpacked
from flax_decoder.data.formats.part import BUILT_IN, PART_BYTES, READ_BYTES, Part, Piece, line_number, open_file
from flax_decoder.errors import UserError

# Of the text before a part that does not begin a document: farther than what a token depends on.
_BEFORE_BYTES = 800


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
    encoding = "utf-16" if is_utf16(content) else "utf-8"

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


def text_pieces(part: Part) -> Iterator[Piece]:
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


def stream_pieces(part: Part) -> Iterator[Piece]:
    """A text that can only be read from its beginning on: packed, or in UTF-16."""
    begins, before = part.start == 0, ""
    held = ""
    for text in characters_of(part):
        if len(held) > PART_BYTES:
            cut = held.rfind("\n", PART_BYTES // 2) + 1 or len(held)
            yield Piece(held[:cut], begins, False, before)
            begins, before, held = False, held[max(cut - _BEFORE_BYTES, 0) : cut], held[cut:]
        held += text
    yield Piece(held, begins, True, before)


def characters_of(part: Part) -> Iterator[str]:
    """The text of a packed or UTF-16 file, block by block, from the character `start` to `stop`."""
    with unpacked(part) as file:
        beginning = read_block(file, part, 2)
        encoding = "utf-16" if is_utf16(beginning) else "utf-8"
        decoder = codecs.getincrementaldecoder("utf-16" if encoding == "utf-16" else "utf-8-sig")()
        position, offset, block = 0, 0, beginning
        while True:
            more = read_block(file, part, READ_BYTES)
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


def next_cut(file: BinaryIO, offset: int) -> int:
    """The first place from `offset` on where a text in UTF-8 can be cut.

    After the newline between two visible ASCII characters: tokenizers make no token across it. Where there is none
    near, after any newline, else before any character.
    """
    file.seek(offset)
    window = np.frombuffer(file.read(READ_BYTES), np.uint8)
    newlines = np.flatnonzero(window[1:-1] == 10) + 1
    visible = (window > 32) & (window < 127)
    good = newlines[visible[newlines - 1] & visible[newlines + 1]]
    starts = np.flatnonzero((window & 0xC0) != 0x80)
    best = good + 1 if len(good) else newlines + 1 if len(newlines) else starts
    return offset + (int(best[0]) if len(best) else len(window))


def is_utf16(beginning: bytes) -> bool:
    """Whether a text begins with a byte order mark of UTF-16."""
    return beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def has_mark(part: Part) -> bool:
    """Whether the file of a part begins with a byte order mark of UTF-8."""
    if part.path == BUILT_IN:
        return False
    with open_file(Path(part.path)) as file:
        return file.read(3) == codecs.BOM_UTF8


def _not_text(name: str, encoding: str, byte: int, offset: int, line: int, advice: str) -> UserError:
    """The error for a byte at which something stops being text."""
    return UserError(
        f"{name}: is not {encoding.upper()} text (byte 0x{byte:02X} at offset {offset}, line {line}); {advice}"
    )


def _not_utf8(path: Path, offset: int, byte: int) -> UserError:
    return _not_text(str(path), "utf-8", byte, offset, line_number(path, offset), how_to_convert(path))


def how_to_convert(path: Path) -> str:
    """A command that makes UTF-8 of a text, for messages."""
    converted = path.with_suffix(".utf8" + path.suffix)
    return f"convert it, for example: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"
