"""Exclusive use of a folder, on one machine or, if the file system supports locks, across machines."""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
from pathlib import Path
from typing import Self

from flax_decoder.errors import FaultError, InUseError, UserError
from flax_decoder.io.files import is_another_process, open_regular, without_links
from flax_decoder.io.strict_json import SETTINGS, parse_object

LOCK = ".lock"
_MAX_SHOWN_CHARACTERS = 1000  # of the owner; a command can be as long as its arguments


class FolderLock:
    """An exclusive lock on a folder, which the system releases when the process ends, however it ends.

    The lock file is never deleted: a second process could lock the old file and a third a new one. `announce` writes
    the owner into it; a process that is refused changes nothing in it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> None:
        """Locks the folder, which may be renamed afterwards.

        Raises:
            InUseError: another process has the lock; the message names it.
            FaultError: the lock file cannot be opened or locked.
        """
        path = folder / LOCK
        try:
            # For its owner only: whoever may open the file can hold the lock for ever.
            self._descriptor = without_links(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner_in(path)
            self.release()
            raise InUseError(f"{folder}: is in use by {owner}; wait for it, or give another --run.folder") from None
        except OSError as error:
            self.release()
            raise FaultError(f"{path}: cannot be locked: {error.strerror}") from error

    def announce(self) -> None:
        """Writes process, host, time and command into the lock file."""
        assert self._descriptor is not None
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        if os.fstat(self._descriptor).st_nlink > 1:  # what is written would be in a file elsewhere, too
            return
        with contextlib.suppress(OSError):  # the file of another user, or on a file system without permissions
            os.fchmod(self._descriptor, 0o600)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Releases the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def refuse_if_in_use(folder: Path) -> None:
    """Raises InUseError if another process has locked the folder; changes nothing in it."""
    try:
        is_file = stat.S_ISREG(os.lstat(folder / LOCK).st_mode)
    except OSError:  # there is none
        return
    if is_file:
        with FolderLock() as lock:
            lock.take(folder)


def _owner_in(path: Path) -> str:
    try:
        with open_regular(path) as file:
            owner = parse_object(file.read(SETTINGS.num_bytes), str(path), SETTINGS)
        text = f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
        if owner["host"] == socket.gethostname() and not is_another_process(str(owner["pid"])):
            text += ", which has ended: another process that does not say its name"
        return " ".join(text.split())[:_MAX_SHOWN_CHARACTERS]
    except (OSError, UserError, KeyError):  # it has not announced itself yet
        return "another process"
