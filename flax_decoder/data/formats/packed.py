"""Files that are packed, .gz and .zst, and their damage."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from flax_decoder.data.formats.part import READ_BYTES, Part, damaged, needs_extra, open_file


@contextlib.contextmanager
def unpacked(part: Part) -> Iterator[BinaryIO]:
    """The file of a part from its beginning on, without its packing; read it with `read_block`."""
    path = Path(part.path)
    with open_file(path) as file:
        if part.packing == "gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif part.packing == "zst":
            try:
                import zstandard
            except ImportError:
                raise needs_extra(path, "zstandard") from None
            yield cast(BinaryIO, _Zstandard(file, zstandard.ZstdDecompressor()))
        else:
            yield file


def read_block(file: BinaryIO, part: Part, size: int) -> bytes:
    """`file.read(size)`; raises UserError where a packed file is damaged."""
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(part, error) from None
    except Exception as error:  # zstandard's own class
        if type(error).__name__ != "ZstdError":
            raise
        raise damaged(part, error) from None


@contextlib.contextmanager
def open_unpacked(part: Part) -> Iterator[BinaryIO]:
    """Opens the file of a part from its beginning on, without its packing.

    Raises:
        UserError: it cannot be read, also later on, where it is damaged.
    """
    with unpacked(part) as file:
        yield cast(BinaryIO, io.BufferedReader(_Checked(file, part), READ_BYTES))


class _Checked(io.RawIOBase):
    """A file that is read with `read_block`."""

    def __init__(self, file: BinaryIO, part: Part):
        self._file, self._part, self._position = file, part, 0
        self._rest = b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        block = self._rest or read_block(self._file, self._part, len(buffer))  # may be more than that
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
