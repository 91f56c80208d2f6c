"""Atomic writes of files and folders, and files that are safe to read."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from flax_decoder.errors import FaultError

# Windows lacks it.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Without O_NONBLOCK, opening a FIFO waits for a writer. Windows lacks it, and needs O_BINARY.
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: str | os.PathLike[str], *, follow_links: bool = True) -> BufferedReader:
    """Opens a regular file for reading: a FIFO might block forever, a device never end.

    Raises:
        OSError: it is not a regular file or cannot be read; `strerror` is the reason.
    """
    mode = os.stat(path, follow_symlinks=follow_links).st_mode
    if stat.S_ISREG(mode):  # checked before opening, which alone has effects on some devices
        descriptor = os.open(path, _READING if follow_links else _READING | _NO_LINK)
        mode = os.fstat(descriptor).st_mode  # the path may have been replaced in between
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise OSError(errno.EINVAL, f"is {_kind(mode)}", os.fspath(path))


def without_links(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """An opener for `open`, for a file that is written in its place: never through a link to somewhere else.

    Raises:
        OSError: a link, a FIFO or something else has the name; or as `os.open`.
    """
    with contextlib.suppress(FileNotFoundError):
        _require(stat.S_ISREG, os.lstat(path).st_mode, path)
    # Another process may have replaced it in between.
    descriptor = os.open(path, flags | _NO_LINK | getattr(os, "O_NONBLOCK", 0), mode)
    try:
        _require(stat.S_ISREG, os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def make_folder(path: Path) -> None:
    """Creates a folder where there is none; its name is then on disk.

    Raises:
        OSError: something else has the name, such as a link to a folder, or there is no parent folder.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        flush_names(path.parent)
    _require(stat.S_ISDIR, os.lstat(path).st_mode, path)


def make_parents(path: Path) -> None:
    """Creates the folders in which a path lies, where there are none; their names are then on disk."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        flush_names(parent.parent)


def not_plain(folder: Path, unread: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
    """Yields what is neither a regular file nor a folder, and which it is: "a link" or "not a regular file".

    Everything below the folder, which may be a link itself, is looked at, but for what is in the folders `unread` of
    it. No link is followed.
    """
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in sorted([*folders, *names])):
            with contextlib.suppress(FileNotFoundError):  # another process may delete files
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    yield path, _kind(mode)
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in unread]


def _require(is_wanted: Callable[[int], bool], mode: int, path: str | os.PathLike[str]) -> None:
    if not is_wanted(mode):
        raise OSError(errno.EINVAL, f"is {_kind(mode)}", os.fspath(path))


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "not a regular file"


def expand_home(path: str) -> str:
    """The path with the user's home folder in place of a `~` at its start; the same path if there is no such folder."""
    if os.environ.get("HOME") == "":  # for which expanduser returns the root folder
        return path
    expanded = os.path.expanduser(path)
    home = os.path.expanduser(path.partition("/")[0])
    return expanded if os.path.isabs(home) and os.path.isdir(home) else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that atomically replaces `path` when the block ends without an error and it is on disk.

    A link at `path` is replaced itself; one that has the name of the temporary file is deleted. An OSError without a
    file name, as of a full disk, gets that of `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a crash, or a link from whoever made the folder
        with open(temporary, "xb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)
        flush_names(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # the next to write `path` deletes it
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` when the block ends without an error.

    The block flushes its files; the names of all files and folders are on disk when this returns. An empty folder at
    `path` is replaced, and so is one to which a link at `path` leads; any other is an OSError.
    """
    path = path.resolve() if path.is_dir() else path.absolute()
    # The name has host and process, so that two processes do not share a folder; the first to finish gets the path.
    prefix = f".{path.name}.new-{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        if not is_another_process(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)  # of a crash; another process may be removing it too
    unfinished = path.with_name(f"{prefix}{os.getpid()}")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    try:
        make_parents(unfinished)
        unfinished.mkdir()
        yield unfinished
        flush_folders(unfinished)
        os.rename(unfinished, path)
        new_parents = []
        flush_names(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may use them by now
            for parent in new_parents:
                parent.rmdir()


@contextlib.contextmanager
def as_write_fault(path: Path) -> Iterator[None]:
    """Turns an OSError into a FaultError that names the file or folder, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise FaultError(f"{path}: cannot be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8, with newlines as they are."""
    with replacing(path) as file:
        file.write(text.encode())


def flush(file: BinaryIO) -> None:
    """Waits until the content of a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on disk; without it a crash may lose the name of a flushed file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folders(folder: Path) -> None:
    """As `flush_names`, for a folder and all below it."""
    for inner, _, _ in os.walk(folder, topdown=False):
        flush_names(Path(inner))


def sha256_of(path: Path, *, follow_links: bool = True) -> str:
    """The SHA-256 of a file's content, in hexadecimal; raises OSError as `open_regular`."""
    with open_regular(path, follow_links=follow_links) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sha256(value: Any) -> bool:
    """Whether a value from a file can be the result of `sha256_of`."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_another_process(process_id: str) -> bool:
    """Whether another process on this machine has this id."""
    if process_id == str(os.getpid()):  # left by an earlier process: in a container each start may have the same id
        return False
    try:
        os.kill(int(process_id), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # it runs as another user
        pass
    return True
