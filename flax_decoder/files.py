"""Files and folders that are there whole or not at all, and files that are safe to read."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

# Opening a FIFO waits for a writer, unless told not to. Windows knows no FIFOs, but text files.
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read its bytes, if it is one: a FIFO might never answer, a device never end.

    Raises:
        OSError: there is nothing to read there; its `strerror` says why.
    """
    refusal = OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    if not stat.S_ISREG(os.stat(path).st_mode):  # not opened: some devices act on that alone
        raise refusal
    descriptor = os.open(path, _READING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # something else took its name in between
        os.close(descriptor)
        raise refusal
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is complete and on disk, and not before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled beside `path`, whose name it gets when all went well; an empty folder there gives way."""
    path = path.absolute()
    unfinished = path.with_name(f".{path.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a crash left
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, in UTF-8 and with newlines as they are."""
    with replacing(path) as file:
        file.write(text.encode())
