"""Untrusted files: opened only if they are regular files inside of their folder.

A link in a model folder may point to a file of the same folder or, in the download cache of Hugging Face, from
models--NAME/snapshots/REVISION to models--NAME/blobs. Any other link is refused, and its target never opened.
"""

import os
from pathlib import Path
from typing import BinaryIO

from flax_decoder.errors import UserError
from flax_decoder.io import files
from flax_decoder.io.strict_json import shown

_MAX_NAME_CHARACTERS = 255


def open_named(path: Path) -> BinaryIO:
    """Opens a file whose path the user gave; links are followed.

    Raises:
        UserError: it cannot be read, or is not a regular file.
    """
    return _open(path, path, follow_links=True)


def open_inside(folder: Path, name: str, source: Path | None = None) -> BinaryIO:
    """Opens a file of a model folder; neither name nor link may lead out of the folder, which may be a link itself.

    Messages about the name call it that of `source`, the file that has it in it.

    Raises:
        UserError: the name is a path, the file is a link out of the folder, or is not a regular file that can be read.
    """
    path = folder / name
    is_plain = name not in ("", ".", "..") and name.isprintable() and not any(sign in name for sign in "/\\")
    if not is_plain or len(name) > _MAX_NAME_CHARACTERS:
        raise UserError(f"{source or folder}: {shown(name)} is not the plain name of a file in the same folder")
    try:
        parent = folder.resolve()
        target = os.readlink(parent / name) if (parent / name).is_symlink() else name
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UserError(f"{path}: cannot be read: {error}; get the whole model again") from None
    start, target = os.path.split(target)
    if start == os.path.join("..", "..", "blobs") and _is_snapshot(parent):
        parent = parent.parent.parent / "blobs"
    elif start:
        raise UserError(
            f"{path}: is a link out of its folder, which is not followed.\n"
            f"If you trust where it leads, make a copy without links and use that: cp -rL {folder} NEW_FOLDER"
        )
    return _open(parent / target, path, follow_links=False)


def _is_snapshot(folder: Path) -> bool:
    """Whether this is models--NAME/snapshots/REVISION, and models--NAME/blobs is not a link itself."""
    model = folder.parent.parent
    is_cache = folder.parent.name == "snapshots" and model.name.startswith("models--")
    return is_cache and not (model / "blobs").is_symlink()


def _open(path: Path, shown_path: Path, *, follow_links: bool) -> BinaryIO:
    try:
        return files.open_regular(path, follow_links=follow_links)
    except (OSError, ValueError) as error:  # ValueError: not a valid name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown_path}: cannot be read: {reason}; put the file itself there, with permission") from None


def read_content(file: BinaryIO, max_bytes: int, source: str) -> bytes:
    """Reads and closes a file; UserError if it has more than `max_bytes`, of which none is read then."""
    with file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= max_bytes:
            try:
                content = file.read(max_bytes + 1)
            except OSError as error:
                raise UserError(f"{source}: cannot be read: {error.strerror}") from None
            num_bytes = len(content)  # it may have grown
            if num_bytes <= max_bytes:
                return content
    raise UserError(f"{source}: has {num_bytes:,} bytes, over the limit of {max_bytes:,}; it is damaged or malicious")
