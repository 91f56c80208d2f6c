"""One owner of a folder at a time, on one machine or, where the file system knows locks, on several."""

import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from flax_decoder.errors import FaultError, InUseError

LOCK = ".lock"


class FolderLock:
    """The right to write into a folder. The system takes it back when the process ends, however it ends.

    The file that is locked stays: were it deleted, a second process could lock the old one and a third a new one. It
    says who the owner is once `announce` was called; to be refused changes nothing in it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> None:
        """Takes the folder, which may be renamed afterwards.

        Raises:
            InUseError: another process has it; the message names it.
            FaultError: the lock file cannot be opened or locked.
        """
        path = folder / LOCK
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            self.release()
            raise InUseError(f"{folder}: is in use by {holder}; wait for it, or give another --run.folder") from None
        except OSError as error:
            self.release()
            raise FaultError(f"{path}: cannot be locked: {error.strerror}") from error

    def announce(self) -> None:
        """Writes down who has the folder."""
        assert self._descriptor is not None
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Gives the folder free, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def refuse_if_in_use(folder: Path) -> None:
    """Raises InUseError where another process has the folder; changes nothing in it."""
    if (folder / LOCK).is_file():
        with FolderLock() as lock:
            lock.take(folder)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken it
        return "another process"
