"""What a checkpoint must be, to the last bit: a list of its files that is written last and believed first.

`manifest.json` holds what was saved and how (facts that the caller gives), and the size and SHA-256 of every file. It
ends with its own SHA-256, and only the one way in which it is written is read: each bit of it counts.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax_decoder.errors import BrokenError
from flax_decoder.io.files import flush, flush_names, replacing, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1
# A model of a thousand layers has one of some hundred kilobytes.
_LONGEST_BYTES = 100_000_000

Manifest = dict[str, Any]


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flushes all files of a folder to disk, and then writes the manifest of them.

    Args:
        folder: of one checkpoint, under whatever name.
        facts: what else the manifest is to say, in JSON; its "step" at least.
    """
    files = {}
    for name, path in sorted(_files(folder).items()):
        with open(path, "rb+") as file:
            flush(file)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for inner, _, _ in os.walk(folder, topdown=False):
        flush_names(Path(inner))
    content = _render({"format": FORMAT, **facts, "files": files})
    with replacing(folder / MANIFEST) as file:
        file.write(content)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whole, but without a look at the files of which it speaks.

    Args:
        folder: of one checkpoint, named by its step.

    Raises:
        BrokenError: there is none, or it is not as it was written, or is that of another step.
    """
    path = folder / MANIFEST
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LONGEST_BYTES:
            raise BrokenError(f"{path}: is not the file that a save writes")
        content = path.read_bytes()
        document = json.loads(content)
        claimed = document.pop("manifest_sha256")
        rendered = _render(document)
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenError(f"{path}: is missing, so that nothing says what this checkpoint must be") from None
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise BrokenError(f"{path}: is damaged: it is no manifest any more") from None
    if rendered != content:
        actual = json.loads(rendered)["manifest_sha256"]
        raise BrokenError(f"{path}: is damaged: its content has the SHA-256 {actual}, and not {claimed}")
    found = document.get("format")
    if found != FORMAT:
        raise BrokenError(f"{path}: is of format {found}, and this version reads {FORMAT}: use the one that wrote it")
    if str(document["step"]) != folder.name:
        raise BrokenError(f"{path}: is that of step {document['step']}, and not of {folder.name}")
    return document


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are as it says.

    Files that it does not name are passed over: what a system leaves in folders by itself harms nothing.

    Args:
        folder: of one checkpoint, named by its step.

    Raises:
        BrokenError: something is missing or has changed; the message names the file and both hashes.
    """
    manifest = read_manifest(folder)
    try:
        there = _files(folder)
    except OSError as error:
        raise BrokenError(f"{folder}: cannot be read: {error.strerror}") from error

    def check(name: str) -> None:
        path, wanted = folder / name, manifest["files"][name]
        try:
            if name not in there:
                raise BrokenError(f"{path}: is missing")
            num_bytes = path.stat().st_size
            if num_bytes != wanted["bytes"]:
                raise BrokenError(f"{path}: has {num_bytes:,} bytes, but had {wanted['bytes']:,} when it was saved")
            actual = sha256_of(path)
        except OSError as error:
            raise BrokenError(f"{path}: cannot be read: {error.strerror}") from error
        if actual != wanted["sha256"]:
            raise BrokenError(f"{path}: is damaged: it has the SHA-256 {actual}, but was saved with {wanted['sha256']}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, manifest["files"]))
    return manifest


def _files(folder: Path) -> dict[str, Path]:
    """The regular files in a folder and its folders, by their path in it; links are not followed."""
    paths = [Path(inner) / name for inner, _, names in os.walk(folder) for name in names]
    regular = [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
    return {path.relative_to(folder).as_posix(): path for path in regular if path != folder / MANIFEST}


def _render(document: Manifest) -> bytes:
    """The one way to write a manifest, its own hash at the end."""

    def text(document: Manifest) -> str:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    digest = hashlib.sha256(text(document).encode()).hexdigest()
    return text({**document, "manifest_sha256": digest}).encode()
