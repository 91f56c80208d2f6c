"""Paths -> the files of a corpus, in one order on every machine, and what is passed over."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from flax_decoder.data.formats.files import format_of
from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_inside, read_content
from flax_decoder.io.strict_json import LISTING, parse_object


@dataclass
class Listing:
    """The files that paths name, in order.

    Attributes:
        files: their paths; `BUILT_IN` for the built-in text.
        named: those of them that a path names itself: they cannot be skipped.
        num_hidden: hidden files and folders that were passed over.
        endings: how many files were passed over for their ending; "" stands for none.
    """

    files: list[Path] = field(default_factory=list)
    named: set[Path] = field(default_factory=set)
    num_hidden: int = 0
    endings: Counter[str] = field(default_factory=Counter)


def list_files(paths: tuple[str, ...]) -> Listing:
    """Lists the files of a corpus.

    A folder stands for all files below it whose ending says how to read them, in natural order (2 before 10). Hidden
    ones are passed over. A link to a folder is followed, but no folder is read twice. Of a dataset that was saved by
    Hugging Face's `datasets` only the files that it lists are read.

    Args:
        paths: files, folders, globs, or `BUILT_IN`.

    Raises:
        UserError: a path names nothing, or a folder cannot be read.
    """
    if not paths or not all(paths):
        raise UserError("the path of the text is empty; give a text file, a folder of texts or a glob, or leave it out")
    listing = Listing()
    for name in paths:
        if os.path.isdir(name):
            before = len(listing.files)
            _add_folder(Path(name), listing, {_identity(name)})
            if len(listing.files) == before:
                others = ", ".join(
                    f"{ending or 'no ending'} {count}" for ending, count in listing.endings.most_common(5)
                )
                raise UserError(
                    f"{name}: there is no .txt, .md, .jsonl, .parquet or .arrow file in this folder"
                    + (f" (its endings: {others})" if others else "")
                    + "; give a folder of texts, one file, or a glob such as 'FOLDER/**/*.py'"
                )
        elif glob.has_magic(name) and not os.path.lexists(name):
            matches = [Path(match) for match in glob.glob(name, recursive=True) if not os.path.isdir(match)]
            if not matches:
                raise UserError(f"{name}: no file matches this pattern; check the folder and the extension")
            listing.files += sorted(matches, key=_natural)
        else:
            listing.files.append(Path(name))
            listing.named.add(Path(name))
    return listing


def _add_folder(folder: Path, listing: Listing, visited: set[tuple[int, int]]) -> None:
    """Adds the files of a folder and those below it; `visited` are the folders that were read."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        _refuse(error)
    if "dataset_dict.json" in names:
        splits = ", ".join(sorted(name for name in names if (folder / name).is_dir()))
        raise UserError(f"{folder}: is a dataset with several splits ({splits}); give one of them: {folder}/NAME")
    if {"state.json", "dataset_info.json"} <= {*names}:
        listing.files += [folder / name for name in _dataset_files(folder)]
        return
    for path in sorted((folder / name for name in names), key=_natural):
        if path.name.startswith("."):
            listing.num_hidden += 1
        elif path.is_dir():
            identity = _identity(path)
            if identity not in visited:  # else a link back up, or a second way to the same folder
                visited.add(identity)
                _add_folder(path, listing, visited)
        elif format_of(path) is not None:
            listing.files.append(path)
        else:
            listing.endings[path.suffix.lower()] += 1


def _dataset_files(folder: Path) -> Iterator[str]:
    """The files of a dataset that `datasets` saved: others beside them may be its caches."""
    path = folder / "state.json"
    content = read_content(open_inside(folder, path.name), LISTING.num_bytes, str(path))
    for entry in _list_in(parse_object(content, str(path), LISTING), "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{path}: names a file that is none in this folder; save the dataset again")
        yield name


def _list_in(document: dict[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    return value if isinstance(value, list) else []


def _natural(path: Path) -> tuple[Any, ...]:
    """A sort key for which 2.txt stands before 10.txt."""

    def key(part: str) -> tuple[Any, ...]:
        pieces = re.split(r"([0-9]{1,300})", part)  # texts and numbers in turn
        return tuple(int(piece) if index % 2 else piece for index, piece in enumerate(pieces))

    return (*map(key, path.parts), path.parts)


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: this folder cannot be read: {error.strerror}; chmod it, or give its files"
    ) from None
