"""Files and folders that are there whole or not at all."""

import contextlib
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
        if not _is_alive(left.name.removeprefix(mark)):
            shutil.rmtree(left)  # what a crash left
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_alive(process_id: str) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(int(process_id), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True
