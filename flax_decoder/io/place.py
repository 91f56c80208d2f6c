"""Where a folder is: it may be renamed while it is in use, and another folder get its name."""

import fcntl
import os
from pathlib import Path
from typing import Self

from flax_decoder.errors import FaultError

# The longest path on macOS, in bytes.
_MAX_PATH = 1024


class Place:
    """A folder that stays known when it is renamed.

    An open descriptor holds it: a folder that is made later is never taken for it, even where the file system gives the
    number of a deleted one to the next.
    """

    def __init__(self, path: Path):
        """Holds the folder at a path. Raises OSError if there is none."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def is_here(self) -> bool:
        """Whether the folder is where it was at first."""
        return self._is_at(self._path)

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return False

    def find(self) -> Path:
        """Where the folder is now: its first path if it is there.

        Raises:
            FaultError: it has been deleted, or moved to where it cannot be found.
        """
        if self.is_here():
            return self._path
        found = self._path_of_descriptor()
        if found is None or not self._is_at(found):
            raise FaultError(f"{self._path}: has been deleted, or moved to where it cannot be found, while in use")
        return found

    def path_that_follows(self) -> Path:
        """A path that leads to the folder whatever its name is, where the system has one (Linux); else its first path.

        Only for this process, and not for messages.
        """
        path = Path(f"/proc/self/fd/{self._descriptor}")
        return path if self._is_at(path) else self._path

    def _path_of_descriptor(self) -> Path | None:
        try:
            if hasattr(fcntl, "F_GETPATH"):  # macOS
                found = fcntl.fcntl(self._descriptor, fcntl.F_GETPATH, bytes(_MAX_PATH))
                return Path(os.fsdecode(found.rstrip(b"\0")))
            return Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)
