"""Attention snapshots of a training run: queries, keys and weights for one text, recorded at several steps.

They are in `lens/` of the run folder:

    <step>.npy    a snapshot: one NumPy record with the float16 fields q, k and weights
    history.json  the tokens, and step and SHA-256 of every snapshot; written last: files not listed do not count
"""

import contextlib
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.errors import BrokenError
from flax_decoder.io.files import is_sha256, make_folder, open_regular, replacing
from flax_decoder.io.strict_json import SETTINGS, parse_object

FOLDER, INDEX = "lens", "history.json"
FORMAT = 1
MAX_SNAPSHOTS = 64
MAX_BYTES = 10**9  # of all snapshots
# The largest float16. Its precision, a thousandth, is enough for a picture.
MAX_FLOAT16 = 65504.0
_MAX_HEADER_BYTES = 10_000  # NumPy's own limit for the header of a .npy file
_SNAPSHOT_OR_TEMPORARY = re.compile(r"\d+\.npy|\..*\.tmp")


@dataclass(frozen=True, eq=False)
class History:
    """The attention of a model to one text at M training steps.

    Attributes:
        steps_M: steps completed at each snapshot, ascending.
        tokens_T: the text.
        q_MLTNH: queries, float16; after the rotation if positions are rotary.
        k_MLTKH: keys, likewise.
        weights_MLNTS: attention weights, float16.
    """

    steps_M: np.ndarray
    tokens_T: np.ndarray
    q_MLTNH: np.ndarray
    k_MLTKH: np.ndarray
    weights_MLNTS: np.ndarray


@dataclass(frozen=True)
class Index:
    """The content of history.json.

    Attributes:
        every: steps between two snapshots.
        tokens: the text.
        snapshots: step -> SHA-256 of the snapshot's file.
    """

    every: int
    tokens: list[int]
    snapshots: dict[int, str]


def read_history(folder: str | os.PathLike[str]) -> History | None:
    """The attention snapshots that a run recorded while training.

    Args:
        folder: the run folder.

    Returns:
        All snapshots, or None if there are none.

    Raises:
        BrokenError: a file is missing or has changed.
    """
    index, records = read_files(Path(folder) / FOLDER)
    if index is None or not records:
        return None
    return History(
        np.array(sorted(index.snapshots), np.int32),
        np.array(index.tokens, np.int32),
        *(np.stack([record[name] for record in records]) for name in ("q", "k", "weights")),
    )


def read_files(folder: Path) -> tuple[Index | None, list[np.ndarray]]:
    """history.json, or None if there is none, and the record of every snapshot, by ascending step.

    Raises:
        BrokenError: a file is missing or has changed.
    """
    records: list[np.ndarray] = []
    path, listing = folder / INDEX, b""
    try:
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link")
        listing = _read(path, SETTINGS.num_bytes)
        index = _index_of(listing, path)
        for step, digest in sorted(index.snapshots.items()):
            path = folder / f"{step}.npy"
            content = _read(path, MAX_BYTES // len(index.snapshots) + _MAX_HEADER_BYTES)
            actual = hashlib.sha256(content).hexdigest()
            if actual != digest:
                raise ValueError(f"its SHA-256 is {actual}, but {INDEX} says {digest}")
            records.append(from_bytes(content))
            if records[-1]["weights"].shape[-1] != len(index.tokens) or records[-1].dtype != records[0].dtype:
                raise ValueError("its shapes are those of another text or model")
    except Exception as error:  # NumPy raises anything for a forged header
        if isinstance(error, FileNotFoundError) and path.name == INDEX:
            return None, []
        with contextlib.suppress(OSError):
            # A running training writes a new index before it deletes every other snapshot.
            if isinstance(error, FileNotFoundError) and _read(folder / INDEX, SETTINGS.num_bytes) != listing:
                return read_files(folder)
        reason = getattr(error, "strerror", None) or error
        message = f"{path}: is missing or damaged: {reason}; delete {folder} if you have no copy of it"
        raise BrokenError(message) from None
    return index, records


def _read(path: Path, max_bytes: int) -> bytes:
    with open_regular(path, follow_links=False) as file:
        # Python reserves at once what is asked for.
        return file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)


def _index_of(content: bytes, path: Path) -> Index:
    """The index in the content of history.json; raises any exception if it is not valid."""
    document = parse_object(content, str(path), SETTINGS)
    del document["sha256"]
    if _render(document) != content or document["format"] != FORMAT:
        raise ValueError("it has changed, or another version wrote it")
    snapshots = {int(step): digest for step, digest in document["moments"].items()}
    index = Index(document["every"], document["tokens"], snapshots)
    numbers = [index.every, *index.tokens, *snapshots]
    is_valid = all(type(number) is int and 0 <= number < 2**31 for number in numbers)
    is_valid = is_valid and all(map(is_sha256, snapshots.values()))
    if not is_valid or index.every == 0 or len(snapshots) > MAX_SNAPSHOTS:
        raise ValueError(f"it has numbers out of range, a SHA-256 that is none, or more than {MAX_SNAPSHOTS} snapshots")
    return index


def write_index(folder: Path, index: Index) -> None:
    """Writes history.json, then deletes the snapshots that it does not list."""
    make_folder(folder)
    snapshots = {str(step): digest for step, digest in index.snapshots.items()}
    with replacing(folder / INDEX) as file:
        file.write(_render({"format": FORMAT, "every": index.every, "tokens": index.tokens, "moments": snapshots}))
    listed = {f"{step}.npy" for step in snapshots}
    for path in list(folder.iterdir()):
        if _SNAPSHOT_OR_TEMPORARY.fullmatch(path.name) and path.name not in listed:
            path.unlink()


def to_bytes(q_LTNH: np.ndarray, k_LTKH: np.ndarray, weights_LNTS: np.ndarray) -> bytes:
    """The content of a snapshot's .npy file; numbers beyond the range of float16 are clipped."""
    L, T, N, H = q_LTNH.shape
    record = np.zeros((), _record_type(L, T, N, k_LTKH.shape[2], H))
    for name, array in (("q", q_LTNH), ("k", k_LTKH), ("weights", weights_LNTS)):
        record[name] = np.clip(array, -MAX_FLOAT16, MAX_FLOAT16)
    file = io.BytesIO()
    np.lib.format.write_array(file, record, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_bytes(content: bytes) -> np.ndarray:
    """The record in a .npy file; raises any exception if it is not a snapshot."""
    # Unlike np.load, this opens no archives, which can hold far more than their size.
    record = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    (L, T, N, H), K = record["q"].shape, record["k"].shape[2]
    if record.shape != () or record.dtype != _record_type(L, T, N, K, H):
        raise ValueError(f"it holds {record.shape} of {record.dtype}, which is not a snapshot")
    if not all(np.isfinite(record[name]).all() for name in ("q", "k", "weights")):
        raise ValueError("it has numbers that are not finite")
    return record


def max_snapshots(model: ModelConfig, num_tokens: int) -> int:
    """How many snapshots of a model may be kept."""
    return min(MAX_SNAPSHOTS, MAX_BYTES // snapshot_bytes(model, num_tokens))


def snapshot_bytes(model: ModelConfig, num_tokens: int) -> int:
    """The size of one snapshot, without its header."""
    N, T = model.num_heads, num_tokens
    return 2 * model.num_layers * T * ((N + model.kv_heads) * model.head_width + N * T)


def _record_type(L: int, T: int, N: int, K: int, H: int) -> np.dtype[np.void]:
    return np.dtype([("q", "<f2", (L, T, N, H)), ("k", "<f2", (L, T, K, H)), ("weights", "<f2", (L, N, T, T))])


def _render(document: dict[str, Any]) -> bytes:
    """The only valid way to write a history.json; it ends with its own hash."""
    digest = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    return json.dumps(document | {"sha256": digest}).encode() + b"\n"
