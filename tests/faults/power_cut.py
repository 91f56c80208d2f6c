"""What may be on a disk after a power cut: the states that POSIX allows, whatever the file system.

What a call has changed is certain only once it is flushed: the content of a file by an fsync of the file, a name by an
fsync of the folder in which it is. All else may have reached the disk or not, in any order. One call is one change: a
rename never loses both names.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from file_calls import Operation

# What a disk writes as a whole; of a longer write, some of these may be missing.
SECTOR = 512
# The content of files by path; None for a folder. Paths are relative.
State = dict[str, bytes | None]


class File:
    """The content of a file: what is certainly on disk, and what was written since."""

    def __init__(self) -> None:
        self.flushed = self.content = b""
        self.writes: list[tuple[int, bytes]] = []

    def write(self, offset: int, content: bytes) -> None:
        self.writes.append((offset, content))
        self.content = _with_write(self.content, offset, content)

    def truncate(self, length: int) -> None:
        """It counts as certain: what it takes away may be lost before, too."""
        self.content, self.flushed = (content[:length].ljust(length, b"\0") for content in (self.content, b""))
        self.writes.append((0, self.content))

    def flush(self) -> None:
        self.flushed, self.writes = self.content, []


class Folder:
    """The names in a folder that are certainly on disk."""

    def __init__(self) -> None:
        self.flushed: dict[str, File | Folder] = {}
        self.names: dict[str, File | Folder] = {}


class Change(NamedTuple):
    """A change of names that is not certain yet: what gets a name, or loses all that it has in these folders."""

    folders: tuple[Folder, ...]
    moved: File | Folder
    name: str | None

    def apply(self, names: Callable[[Folder], dict[str, File | Folder]]) -> None:
        for folder in self.folders:
            for name in [name for name, node in names(folder).items() if node is self.moved]:
                del names(folder)[name]
        if self.name is not None:
            names(self.folders[-1])[self.name] = self.moved


def _with_write(content: bytes, offset: int, written: bytes) -> bytes:
    return content[:offset].ljust(offset, b"\0") + written + content[offset + len(written) :]


class Disk:
    """A disk to which operations come, one after the other; it is empty at first."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._top = Folder()
        self._inodes: dict[int, File | Folder] = {}
        self._pending: list[Change] = []

    def _find(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self._root).parts
        folder = self._top
        for parent in parents:
            folder = folder.names[parent]
        return folder, name

    def _change(self, folders: tuple[Folder, ...], moved: File | Folder, name: str | None) -> None:
        change = Change(folders, moved, name)
        change.apply(lambda folder: folder.names)
        self._pending.append(change)

    def apply(self, operation: Operation) -> None:
        """Takes a recorded call."""
        kind, path, target, inode, offset, content = operation
        node = self._inodes.get(inode)
        if kind in ("create", "mkdir"):
            folder, name = self._find(path)
            self._inodes[inode] = node = File() if kind == "create" else Folder()
            self._change((folder,), node, name)
        elif kind == "write":
            node.write(offset, content)
        elif kind == "truncate":
            node.truncate(offset)
        elif kind == "rename":
            (source, name), (folder, new_name) = self._find(path), self._find(target)
            moved = source.names[name]
            self._change((source,) if source is folder else (source, folder), moved, new_name)
        elif kind in ("unlink", "rmdir"):
            folder, name = self._find(path)
            self._change((folder,), folder.names[name], None)
        elif kind == "fsync" and isinstance(node, File):
            node.flush()
        elif kind == "fsync":
            self._flush_names(self._top if path == self._root else node)
        else:
            raise ValueError(operation)

    def _flush_names(self, folder: Folder) -> None:
        flushed = [change for change in self._pending if folder in change.folders]
        self._pending = [change for change in self._pending if folder not in change.folders]
        for change in flushed:
            change.apply(lambda folder: folder.flushed)

    def state(self, names: Callable[[list[Change]], Iterable[Change]], content: Callable[[File], bytes]) -> State:
        """The files after a cut now.

        Args:
            names: chooses which of the changes that are not certain have reached the disk.
            content: what a file has that was written to since it was flushed.
        """
        entries: dict[Folder, dict[str, File | Folder]] = {}

        def names_of(folder: Folder) -> dict[str, File | Folder]:
            if folder not in entries:
                entries[folder] = dict(folder.flushed)
            return entries[folder]

        for change in names(self._pending):
            change.apply(names_of)
        state: State = {}

        def visit(folder: Folder, prefix: str) -> None:
            for name, node in names_of(folder).items():
                path = prefix + name
                if isinstance(node, Folder):
                    state[path] = None
                    visit(node, f"{path}/")
                else:
                    state[path] = content(node) if node.writes else node.content

        visit(self._top, "")
        return state

    def content(self) -> State:
        """All files as the process sees them."""
        return self.state(lambda changes: changes, lambda file: file.content)


# What may have become of data that was not flushed.


def kept(file: File) -> bytes:
    """All of it."""
    return file.content


def lost(file: File) -> bytes:
    """Nothing of it."""
    return file.flushed


def zeroed(file: File) -> bytes:
    """The length of the file without its data."""
    content = file.content
    for offset, written in file.writes:
        content = _with_write(content, offset, bytes(len(written)))
    return content


def cut_short(file: File) -> bytes:
    """The first half of it."""
    content, left = file.flushed, sum(len(written) for _, written in file.writes) // 2
    for offset, written in file.writes:
        content = _with_write(content, offset, written[:left]) if left > 0 else content
        left -= len(written)
    return content


def only_the_last(file: File) -> bytes:
    """The last write of it, zeros before."""
    offset, written = file.writes[-1]
    return _with_write(zeroed(file), offset, written)


def some_sectors(file: File, rng: random.Random) -> bytes:
    """Some sectors of it, zeros in place of the others."""
    parts = [file.content[start : start + SECTOR] for start in range(0, len(file.content), SECTOR)]
    certain = file.flushed.ljust(len(file.content), b"\0")
    blank = [certain[start : start + SECTOR] for start in range(0, len(file.content), SECTOR)]
    return b"".join(part if rng.random() < 0.5 else none for part, none in zip(parts, blank, strict=True))


def some_of(changes: list[Change], rng: random.Random) -> list[Change]:
    """Some changes of names, each as likely as not."""
    return [change for change in changes if rng.random() < 0.5]


def states(disk: Disk, rng: random.Random, num_random: int) -> Iterator[tuple[str, State]]:
    """States after a cut now, by name: each kind of loss, and some at random."""
    all_names, no_names = (lambda changes: changes), (lambda changes: [])
    yield "all is there", disk.state(all_names, kept)
    yield "nothing that was not flushed", disk.state(no_names, lost)
    yield "names without data", disk.state(all_names, lost)
    yield "names with zeros", disk.state(all_names, zeroed)
    yield "names with half of the data", disk.state(all_names, cut_short)
    yield "names with the last write", disk.state(all_names, only_the_last)
    yield "data without names", disk.state(no_names, kept)
    yield "only the last name", disk.state(lambda changes: changes[-1:], lost)
    yield "all but the last name", disk.state(lambda changes: changes[:-1], kept)
    for number in range(num_random):

        def content(file: File) -> bytes:
            kinds = (kept, lost, zeroed, cut_short, only_the_last, lambda file: some_sectors(file, rng))
            return rng.choice(kinds)(file)

        yield f"at random, {number}", disk.state(lambda changes: some_of(changes, rng), content)


class Materialized:
    """A folder that holds one state after the other; only what differs is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: State = {}
        folder.mkdir()

    def become(self, state: State) -> None:
        """Writes a state."""
        for path in sorted(self._state, reverse=True):
            if path not in state or (state[path] is None) != (self._state[path] is None):
                place = self.folder / path
                place.rmdir() if self._state[path] is None else place.unlink()
                del self._state[path]
        for path in sorted(state):
            if path not in self._state:
                os.mkdir(self.folder / path) if state[path] is None else None
            if state[path] is not None and self._state.get(path) != state[path]:
                (self.folder / path).write_bytes(state[path])
        self._state = dict(state)

    def copy_to(self, folder: Path) -> Path:
        """A copy of the state, to work on."""
        return Path(shutil.copytree(self.folder, folder))
