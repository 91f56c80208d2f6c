"""The manifest of a checkpoint: facts about it, and size and SHA-256 of every file; written last, checked first.

`manifest.json` ends with its own SHA-256, and any rendering but the one that `write_manifest` makes is refused, so that
every flipped bit is detected.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax_decoder.errors import BrokenError
from flax_decoder.io.files import flush, flush_folders, is_sha256, not_plain, replacing, sha256_of
from flax_decoder.io.strict_json import shown

MANIFEST = "manifest.json"
FORMAT = 1
# The manifest of a thousand-layer model has a few hundred kilobytes.
_MAX_BYTES = 100_000_000
# What macOS and Windows leave in folders; no array has such a name.
_LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")

Manifest = dict[str, Any]
NO_ENTRIES: Mapping[str, Any] = {}


def write_manifest(folder: Path, facts: Mapping[str, Any], entries: Mapping[str, Any] = NO_ENTRIES) -> None:
    """Flushes all files of a checkpoint's folder to disk, then writes their manifest.

    `facts`, JSON values, become part of it; `_is_complete` says which are required. Files of `entries` have been
    flushed and hashed already, by the processes that wrote them; see `file_entries`.
    """
    files = {**entries, **file_entries(folder, lambda name: name not in entries)}
    flush_folders(folder)
    content = _render({"format": FORMAT, **facts, "files": dict(sorted(files.items()))})
    with replacing(folder / MANIFEST) as file:
        file.write(content)


def file_entries(folder: Path, is_meant: Callable[[str], bool]) -> dict[str, Any]:
    """Flushes those files of a checkpoint's folder whose names are meant, and returns their entries in a manifest."""
    entries = {}
    for name, path in sorted(_files(folder).items()):
        if is_meant(name):
            with open(path, "rb+") as file:
                flush(file)
            entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, whose name must be its step; the other files are not checked.

    Raises:
        BrokenError: it is missing, damaged, or that of another step.
    """
    path = folder / MANIFEST
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise BrokenError(f"{path}: is not a file that a save writes")
        content = path.read_bytes()
        document = json.loads(content)
        claimed = document.pop("manifest_sha256")
        rendered = _render(document)
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenError(f"{path}: is missing, so this checkpoint cannot be verified") from None
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BrokenError(f"{path}: is damaged: it is not a manifest") from None
    if rendered != content:
        actual = json.loads(rendered)["manifest_sha256"]
        raise BrokenError(f"{path}: is damaged: the SHA-256 of its content is {actual}, not {claimed}")
    found = document.get("format")
    if found != FORMAT:
        raise BrokenError(
            f"{path}: has format {shown(found)}, but this version reads {FORMAT}; use the version that wrote it"
        )
    if not _is_complete(document):
        raise BrokenError(f"{path}: is damaged: it lacks an entry, or has one of the wrong type")
    if str(document["step"]) != folder.name:
        raise BrokenError(f"{path}: belongs to step {document['step']}, not to {folder.name}")
    return document


def verify(folder: Path) -> Manifest:
    """Checks all files of a checkpoint folder against its manifest, which is returned.

    What a restore can open is exactly the files of the manifest: the arrays of a checkpoint say themselves which files
    hold their values, so another file, or a link to one, could get in without a changed hash.

    Raises:
        BrokenError: a file is missing or has changed; the message names it and both hashes. Or there is a link, a FIFO,
            a device, or a file that the manifest does not have.
    """
    manifest = read_manifest(folder)
    try:
        for path, kind in not_plain(folder):
            raise BrokenError(f"{path}: is {kind}, which no save writes")
        files = _files(folder)
    except OSError as error:
        raise BrokenError(f"{folder}: cannot be read: {error.strerror}") from error

    def check(name: str) -> None:
        path, wanted = folder / name, manifest["files"][name]
        try:
            if name not in files:
                raise BrokenError(f"{path}: is missing")
            num_bytes = path.stat().st_size
            if num_bytes != wanted["bytes"]:
                raise BrokenError(f"{path}: has {num_bytes:,} bytes, but was saved with {wanted['bytes']:,}")
            actual = sha256_of(path, follow_links=False)
        except OSError as error:
            raise BrokenError(f"{path}: cannot be read: {error.strerror}") from error
        if actual != wanted["sha256"]:
            raise BrokenError(f"{path}: is damaged: its SHA-256 is {actual}, but was saved with {wanted['sha256']}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, manifest["files"]))
    for name, path in files.items():
        if name not in manifest["files"] and path.name not in _LEFT_BY_SYSTEMS:
            raise BrokenError(f"{path}: is not in the manifest, so no save has written it; delete it")
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    """The regular files below a folder by relative path; links are not followed."""
    paths = [Path(inner) / name for inner, _, names in os.walk(folder) for name in names]
    regular = [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
    return {path.relative_to(folder).as_posix(): path for path in regular if path != folder / MANIFEST}


def _is_complete(document: Manifest) -> bool:
    """Whether a manifest has all entries that are read from it, and each has its type."""
    match document:
        case {
            "step": int(),
            "val_loss": None | int() | float(),
            "config": None | dict(),
            "inputs": dict(inputs),
            "arrays": dict(arrays),
            "files": dict(files),
        }:
            return (
                all(is_sha256(digest) for digest in inputs.values())
                and all(isinstance(part, dict) for part in arrays.values())
                and all(isinstance(array, list) for part in arrays.values() for array in part.values())
                and all(isinstance(file, dict) for file in files.values())
                and all(type(file.get("bytes")) is int and is_sha256(file.get("sha256")) for file in files.values())
            )
    return False


def _render(document: Manifest) -> bytes:
    """The only valid rendering of a manifest, ending with its own hash."""

    def render(document: Manifest) -> bytes:
        return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()

    return render({**document, "manifest_sha256": hashlib.sha256(render(document)).hexdigest()})
