"""Lines of JSON, one document each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from flax_decoder.data.formats.packed import read_block, unpacked
from flax_decoder.data.formats.part import MAX_ROW_BYTES, READ_BYTES, Part, open_file, place_of
from flax_decoder.errors import UserError
from flax_decoder.io.strict_json import shown


def json_rows(part: Part, text_field: str) -> Iterator[tuple[int, str]]:
    """The texts of lines of JSON, each with its number from 0."""
    for index, line in enumerate(lines_of(part)):
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


def lines_of(part: Part) -> Iterator[bytes]:
    """The lines of a part, with their ends; raises UserError at one that is too long."""
    is_ranged = part.packing == ""
    with unpacked(part) as file:
        if is_ranged:
            file.seek(part.start)
        number, position = 0, part.start
        held = b""
        while True:
            block = read_block(
                file, part, READ_BYTES if not is_ranged else min(READ_BYTES, cast(int, part.stop) - position)
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


def next_line(file: BinaryIO, offset: int) -> int:
    """The first start of a line from `offset` on, or the end of the file."""
    if offset == 0:
        return 0
    position = offset - 1
    file.seek(position)
    while block := file.read(READ_BYTES):
        if (index := block.find(b"\n")) >= 0:
            return position + index + 1
        position += len(block)
    return position


def line_before(file: BinaryIO, offset: int, start: int) -> int:
    """The last start of a line before `offset` (which ends one), but at least `start`."""
    position = offset - 1
    while position > start:
        first = max(position - READ_BYTES, start)
        file.seek(first)
        index = file.read(position - first).rfind(b"\n")
        if index >= 0:
            return first + index + 1
        position = first
    return start


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return kinds.get(type(value), "a number")


def looks_like_json_lines(path: Path) -> bool:
    """Whether a file that is read as a text has a JSON object in each of its first lines."""
    with open_file(path) as file:
        lines = file.read(100_000).split(b"\n")[:3]
    try:
        return lines[0][:1] == b"{" and all(isinstance(json.loads(line), dict) for line in lines[: len(lines) - 1 or 1])
    except ValueError:
        return False
