"""Tables, Parquet and Arrow: a row is a document."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from flax_decoder.data.formats.part import Part, damaged, needs_extra, open_file, place_of
from flax_decoder.errors import UserError
from flax_decoder.io.strict_json import shown

_ROWS_AT_ONCE = 256


def table_rows(part: Part, text_field: str) -> Iterator[tuple[int, str]]:
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


def count_rows(part: Part) -> int:
    """The rows of a file; raises UserError if it cannot be read."""
    if part.packing:
        raise UserError(f"{part.path}: packed tables are not read; unpack it (Parquet is packed inside)")
    if part.format == "parquet":
        with _parquet(part) as file:
            return int(file.metadata.num_rows)
    with _as_user_error(part):
        return sum(batch.num_rows for batch in _arrow_batches(part))


def _parquet(part: Part) -> Any:
    path = Path(part.path)
    try:
        import pyarrow.parquet
    except ImportError:
        raise needs_extra(path, "pyarrow") from None
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
        raise needs_extra(Path(part.path), "pyarrow") from None
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
        raise damaged(part, error) from None
