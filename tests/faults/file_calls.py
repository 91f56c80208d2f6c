"""What a process does to files below a folder, call by call; see file_calls.c."""

import ctypes
import errno
import functools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_run import _FOLDERS

HERE = Path(__file__).parent
OPERATIONS = ("create", "write", "truncate", "rename", "link", "unlink", "mkdir", "rmdir", "fsync")
_HEAD = struct.Struct("=4I2Q")


class Operation(NamedTuple):
    """A call that changed something, or flushed it.

    Attributes:
        kind: one of OPERATIONS.
        path: its file or folder.
        target: the new name, of a rename or a link.
        inode: the number of the file; 0 if it does not matter.
        offset: where a write begins, or the new length of a file.
        content: what was written.
    """

    kind: str
    path: str
    target: str = ""
    inode: int = 0
    offset: int = 0
    content: bytes = b""


@functools.cache
def library() -> str:
    """The library of file_calls.c; skips the test where it cannot be built or loaded."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("recording the calls of a process needs Linux and a C compiler, cc")
    path = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory())) / "file_calls.so"
    source = HERE / "file_calls.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path, source, "-ldl", "-lpthread"], check=True)
    return str(path)


def read_operations(path: Path) -> Iterator[Operation]:
    """The records in a file, in their order."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        kind, *lengths, inode, offset = _HEAD.unpack_from(content, start)
        start += _HEAD.size
        parts = []
        for length in lengths:
            parts.append(content[start : start + length])
            start += length
        yield Operation(OPERATIONS[kind], parts[0].decode(), parts[1].decode(), inode, offset, parts[2])


class Recorder:
    """Records what this process does below a folder, without the library, call by call of fsync and rename.

    What else has changed between two of them is found by looking, and recorded in any order.
    """

    def __init__(self, root: Path) -> None:
        self.operations: list[Operation] = []
        self._root = root
        self._known: dict[str, tuple[int, bytes | None]] = {}

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Records from now on, until the patches are undone."""
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def recording_fsync(descriptor: int) -> None:
            self.look()
            fsync(descriptor)
            inode = os.fstat(descriptor).st_ino
            path = next((path for path, (known, _) in self._known.items() if known == inode), str(self._root))
            self.operations.append(Operation("fsync", path, inode=inode))

        def recording(call: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
            def renamed(source: Path, target: Path) -> None:
                self.look()
                call(source, target)
                self.operations.append(Operation("rename", str(source), str(target)))
                self._known = self._found()

            return renamed

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(os, "rename", recording(rename))
        monkeypatch.setattr(os, "replace", recording(replace))

    def look(self) -> None:
        """Records what has changed since the last look."""
        before, now = self._known, self._found()
        for path in sorted(before, reverse=True):
            if now.get(path, (0,))[0] != before[path][0]:
                self.operations.append(Operation("rmdir" if before[path][1] is None else "unlink", path))
        for path, (inode, content) in sorted(now.items()):
            old_inode, old = before.get(path, (0, b""))
            if old_inode != inode:
                self.operations.append(Operation("mkdir" if content is None else "create", path, inode=inode))
                old = b""
            if content and content != old:
                if not content.startswith(old):
                    self.operations.append(Operation("truncate", path, inode=inode))
                    old = b""
                self.operations.append(Operation("write", path, "", inode, len(old), content[len(old) :]))
        self._known = now

    def _found(self) -> dict[str, tuple[int, bytes | None]]:
        """The inode and content of each file and folder."""
        paths = list(self._root.rglob("*"))
        return {str(path): (path.stat().st_ino, path.read_bytes() if path.is_file() else None) for path in paths}


# For the process in which the library is loaded.


def watch(folder: Path, records: Path | None = None) -> None:
    """Watches the calls below a folder from now on, and records them in a file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    ctypes.CDLL(None).file_calls_watch(os.fsencode(folder), -1 if records is None else os.open(records, flags, 0o600))


def fail(number: int, error: int | None, *, all_later: bool = False, reads: bool = False) -> None:
    """Makes the given call, from 1, fail: with an error, or by writing half of its bytes. 0 counts the calls only.

    Args:
        number: of the call below the folder that is watched; -1 for none.
        error: a number of `errno`; None for a short write.
        all_later: all calls after it fail as well.
        reads: calls that open or read a file count, too.
    """
    ctypes.CDLL(None).file_calls_fail(ctypes.c_long(number), error or 0, all_later, reads)


def failed_call() -> str:
    """The first call that was made to fail, as "write PATH"; empty if there was none."""
    function = ctypes.CDLL(None).file_calls_failed
    function.restype = ctypes.c_char_p
    return function().decode()


def num_calls() -> int:
    """How many calls there have been since the last `fail`."""
    function = ctypes.CDLL(None).file_calls_count
    function.restype = ctypes.c_long
    return int(function())


ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EINTR", "EDQUOT")} | {"short": None}
