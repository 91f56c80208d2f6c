"""Exclusive use of a folder, on one machine or, if the file system supports locks, across machines."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
from pathlib import Path
from typing import Any, Self

from flax_decoder.errors import FaultError, InUseError, UserError
from flax_decoder.io.files import is_another_process, open_regular, without_links
from flax_decoder.io.strict_json import SETTINGS, parse_object
from flax_decoder.io.terminal import print_escaped

LOCK = ".lock"
# Where the file system has no locks, whoever creates this file has the folder; a process that is killed leaves it.
OWNER = ".lock.owner"
# What flock raises there, as some network file systems do.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_MAX_SHOWN_CHARACTERS = 1000  # of the owner; a command can be as long as its arguments


class FolderLock:
    """An exclusive lock on a folder, which the system releases when the process ends, however it ends.

    Where the file system has no locks, a file marks the folder instead, which is deleted at the release.

    The lock file is never deleted: a second process could lock the old file and a third a new one. `announce` writes
    the owner into it; a process that is refused changes nothing in it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._folder: int | None = None  # a descriptor: the folder may be renamed; None where the system has locks

    def take(self, folder: Path, *, only_looks: bool = False) -> None:
        """Locks the folder, which may be renamed afterwards.

        One that `only_looks` changes nothing where the file system has no locks: two that look at the same instant
        would refuse each other.

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
            owner = _owner_in(path, "which has ended: another process that does not say its name")
            self.release()
            raise InUseError(f"{folder}: is in use by {owner}; wait for it, or give another --run.folder") from None
        except OSError as error:
            if self._descriptor is not None and error.errno in _NO_LOCKS:
                self._take_without_locks(folder, only_looks)
                return
            self.release()
            raise FaultError(f"{path}: cannot be locked: {error.strerror}") from error

    def _take_without_locks(self, folder: Path, only_looks: bool) -> None:
        """As `take`, by the file `OWNER`: only one process can create it, on any file system."""
        path = folder / OWNER
        if only_looks and not os.path.lexists(path):
            return
        try:
            with contextlib.ExitStack() as undo:
                opened = os.open(folder, os.O_RDONLY)
                undo.callback(os.close, opened)
                descriptor = os.open(OWNER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=opened)
                self._folder = opened  # from here on, `release` deletes the mark
                undo.pop_all()
            with os.fdopen(descriptor, "wb") as file:
                file.write(_this_process())
        except FileExistsError:
            self.release()
            raise InUseError(
                f"{folder}: is in use by {_owner_in(path, 'which has ended')}; wait for it, or give another "
                "--run.folder;\nthis file system has no locks: if that process was killed, delete its mark: "
                f"rm {shlex.quote(str(path))}"
            ) from None
        except OSError as error:
            self.release()
            raise FaultError(f"{path}: cannot be created: {error.strerror}") from error

    def announce(self, run_id: str | None = None) -> None:
        """Writes process, host, time, command and the id of the run into the lock file."""
        assert self._descriptor is not None
        if self._folder is not None:
            message = f"warning: this file system has no locks: {OWNER} in the run folder marks it as in use;"
            print_escaped(f"{message} if this process is killed, the next start says how to delete it", file=sys.stderr)
        if os.fstat(self._descriptor).st_nlink > 1:  # what is written would be in a file elsewhere, too
            return
        with contextlib.suppress(OSError):  # the file of another user, or on a file system without permissions
            os.fchmod(self._descriptor, 0o600)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without it
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _this_process(run_id), 0)

    def release(self) -> None:
        """Releases the lock, if it is held."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # the folder may have been deleted
                os.unlink(OWNER, dir_fd=self._folder)
            os.close(self._folder)
            self._folder = None
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
            lock.take(folder, only_looks=True)


def _this_process(run_id: str | None = None) -> bytes:
    owner: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    return json.dumps(owner if run_id is None else owner | {"run_id": run_id}).encode()


def run_in_lock(folder: Path) -> str | None:
    """The id of the run that the last owner of a folder's lock has trained; None if it has not said it."""
    try:
        with open_regular(folder / LOCK, follow_links=False) as file:
            found = parse_object(file.read(SETTINGS.num_bytes), str(folder / LOCK), SETTINGS).get("run_id")
    except (OSError, UserError):
        return None
    return None if found is None else str(found)


def _owner_in(path: Path, what_if_ended: str) -> str:
    try:
        with open_regular(path) as file:
            owner = parse_object(file.read(SETTINGS.num_bytes), str(path), SETTINGS)
        text = f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
        if owner["host"] == socket.gethostname() and not is_another_process(str(owner["pid"])):
            text += f", {what_if_ended}"
        return " ".join(text.split())[:_MAX_SHOWN_CHARACTERS]
    except (OSError, UserError, KeyError):  # it has not announced itself yet
        return "another process"
