"""Files and folders that are there whole or not at all, and files that are safe to read."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

# Opening a FIFO waits for a writer, unless told not to. Windows knows no FIFOs, but text files.
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: str | os.PathLike[str], *, follows: bool = True) -> BufferedReader:
    """Opens a file to read its bytes, if it is one: a FIFO might never answer, a device never end.

    Args:
        path: of the file.
        follows: also reads the file to which a link leads.

    Raises:
        OSError: there is nothing to read there; its `strerror` says why.
    """
    mode = os.stat(path, follow_symlinks=follows).st_mode
    if stat.S_ISREG(mode):  # else it is not opened: some devices act on that alone
        descriptor = os.open(path, _READING if follows else _READING | _NO_LINK)
        mode = os.fstat(descriptor).st_mode  # something else may have taken its name in between
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "not a regular file"
    raise OSError(errno.EINVAL, f"is {kind}", os.fspath(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is complete and on disk, and not before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)
        flush_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled beside `path`, whose name it gets when all went well; an empty folder there gives way."""
    path = path.absolute()
    # Two processes that make the same folder must not take each other's; the first one to be ready has it.
    mark = f".{path.name}.new-{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(mark)}*"):
        if not _is_another(left.name.removeprefix(mark)):
            shutil.rmtree(left, ignore_errors=True)  # what a crash left; another process may be at it too
    unfinished = path.with_name(f"{mark}{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, path)
        flush_names(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, in UTF-8 and with newlines as they are."""
    with replacing(path) as file:
        file.write(text.encode())


def flush(file: BinaryIO) -> None:
    """Returns when what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Returns when the names in a folder are on disk: a file that was flushed may else be there, but not be found."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_another(process_id: str) -> bool:
    """Whether this is another process of this machine that runs."""
    if process_id == str(os.getpid()):  # that of a container often is 1, time after time
        return False
    try:
        os.kill(int(process_id), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True
