"""Files from elsewhere: opened once, where they are regular files, and not past the end of their folder.

The rule for links: a link in a model folder may lead to a file of the same folder; in the download cache of Hugging
Face, where models--NAME/snapshots/REVISION is a folder of links, also to models--NAME/blobs. Any other link is refused
and its target never opened.
"""

import os
from pathlib import Path
from typing import BinaryIO

from flax_decoder.errors import UserError
from flax_decoder.io import files
from flax_decoder.io.strict_json import shown

_LONGEST_NAME = 255


def open_named(path: Path) -> BinaryIO:
    """Opens a file that the user has named; a link is followed.

    Raises:
        UserError: it cannot be read, or is no regular file.
    """
    return _open(path, path, follows=True)


def open_inside(folder: Path, name: str, source: Path | None = None) -> BinaryIO:
    """Opens a file of a model folder, which no name and no link may lead out of.

    Args:
        folder: the folder; the user has named it, so it may be a link itself.
        name: of the file.
        source: the file that has this name from elsewhere, for the message of an error.

    Raises:
        UserError: the name is no plain one, the file is a link out of the folder, or no regular file that can be read.
    """
    path = folder / name
    is_plain = name not in ("", ".", "..") and name.isprintable() and not any(sign in name for sign in "/\\")
    if not is_plain or len(name) > _LONGEST_NAME:
        raise UserError(f"{source or folder}: {shown(name)} is not the plain name of a file in the same folder")
    try:
        place = folder.resolve()
        target = os.readlink(place / name) if (place / name).is_symlink() else name
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path}: cannot be read: {error}; get the whole model again") from None
    start, target = os.path.split(target)
    if start == os.path.join("..", "..", "blobs") and _is_snapshot(place):
        place = place.parent.parent / "blobs"
    elif start:
        raise UserError(
            f"{path}: is a link out of its folder, which is not followed.\n"
            f"If you trust where it leads, make a copy without links and use that: cp -rL {folder} NEW_FOLDER"
        )
    return _open(place / target, path, follows=False)


def _is_snapshot(folder: Path) -> bool:
    """Whether this is models--NAME/snapshots/REVISION beside a folder of blobs that is no link itself."""
    model = folder.parent.parent
    is_cache = folder.parent.name == "snapshots" and model.name.startswith("models--")
    return is_cache and not (model / "blobs").is_symlink()


def _open(path: Path, name: Path, *, follows: bool) -> BinaryIO:
    """Opens a regular file; messages call it `name`."""
    try:
        return files.open_regular(path, follows=follows)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read: {reason}; put the file itself there, with permission") from None


def read_content(file: BinaryIO, most_bytes: int, source: str) -> bytes:
    """All bytes of an open file, which is closed; UserError, before any memory is taken, where it has too many."""
    with file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= most_bytes:
            try:
                content = file.read(most_bytes + 1)
            except OSError as error:
                raise UserError(f"{source}: cannot be read: {error.strerror}") from None
            num_bytes = len(content)
            if num_bytes <= most_bytes:
                return content
    raise UserError(
        f"{source}: has {num_bytes:,} bytes, over the limit of {most_bytes:,} for such a file; it is damaged or made "
        "to do harm"
    )
