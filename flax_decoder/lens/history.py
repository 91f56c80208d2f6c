"""What a run keeps of its attention while it learns: q, k and weights of one text, at moments of its training.

They lie in the run folder under lens/. Each moment is `<step>.npy`, one NumPy record with the fields q, k and weights;
history.json names the tokens and, by its step and SHA-256, each moment. It is written last: what it does not name is no
part of the history.
"""

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
from flax_decoder.io.files import open_regular, replacing
from flax_decoder.io.strict_json import SETTINGS, parse_object

FOLDER, INDEX = "lens", "history.json"
FORMAT = 1
# What a history may come to. Where it would be more, every other moment goes.
MAX_MOMENTS = 64
MAX_BYTES = 10**9
# The largest number of float16, which is exact to a thousandth: enough for a picture, in half the room.
LARGEST = 65504.0
_HEADER_BYTES = 10_000  # more than a .npy file says of itself
_OURS = re.compile(r"\d+\.npy|\..*\.tmp")


@dataclass(frozen=True, eq=False)
class History:
    """What the attention of a model did with one text at M moments of its training.

    Attributes:
        steps_M: after how many steps each moment was, ascending.
        tokens_T: the text.
        q_MLTNH: queries as they met the keys, that is rotated where positions are rotary; float16.
        k_MLTKH: keys, likewise.
        weights_MLNTS: what each head gave each source position; float16.
    """

    steps_M: np.ndarray
    tokens_T: np.ndarray
    q_MLTNH: np.ndarray
    k_MLTKH: np.ndarray
    weights_MLNTS: np.ndarray


@dataclass(frozen=True)
class Index:
    """What history.json says.

    Attributes:
        every: steps between two moments.
        tokens: the text.
        moments: by its step, the SHA-256 of each moment's file.
    """

    every: int
    tokens: list[int]
    moments: dict[int, str]


def read_history(folder: str | os.PathLike[str]) -> History | None:
    """What a run has kept of its attention while it learned.

    Args:
        folder: of the run.

    Returns:
        All moments; None where there is not one.

    Raises:
        BrokenError: a file is missing, or is not what was once written.
    """
    place = Path(folder) / FOLDER
    index = read_index(place)
    if index is None or not index.moments:
        return None
    moments = read_moments(place, index)
    return History(
        np.array(sorted(index.moments), np.int32),
        np.array(index.tokens, np.int32),
        *(np.stack([moment[name] for moment in moments]) for name in ("q", "k", "weights")),
    )


def read_index(folder: Path) -> Index | None:
    """What the history.json in a folder says; None where there is none.

    Raises:
        BrokenError: it is not what was once written.
    """
    path = folder / INDEX
    try:
        with open_regular(path, follow_links=False) as file:
            content = file.read(SETTINGS.num_bytes + 1)
        document = parse_object(content, str(path), SETTINGS)
        del document["sha256"]
        if _render(document) != content or document["format"] != FORMAT:
            raise ValueError("it has changed, or another version wrote it")
        moments = {int(step): digest for step, digest in document["moments"].items()}
        index = Index(document["every"], document["tokens"], moments)
        numbers = [index.every, *index.tokens, *index.moments]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers) or index.every == 0:
            raise ValueError("it has numbers that no history has")
        if len(index.moments) > MAX_MOMENTS:
            raise ValueError(f"it has {len(index.moments)} moments, and a history at most {MAX_MOMENTS}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    return index


def write_index(folder: Path, index: Index) -> None:
    """Says what a history is; then what else has the name of a moment can go."""
    folder.mkdir(exist_ok=True)
    moments = {str(step): digest for step, digest in index.moments.items()}
    with replacing(folder / INDEX) as file:
        file.write(_render({"format": FORMAT, "every": index.every, "tokens": index.tokens, "moments": moments}))
    names = {f"{step}.npy" for step in index.moments}
    for path in list(folder.iterdir()):
        if _OURS.fullmatch(path.name) and path.name not in names:
            path.unlink()


def read_moments(folder: Path, index: Index) -> list[np.ndarray]:
    """The records of all moments in the order of their steps.

    Raises:
        BrokenError: one is missing, or is not what was once written.
    """
    moments: list[np.ndarray] = []
    for step in sorted(index.moments):
        path = folder / f"{step}.npy"
        try:
            with open_regular(path, follow_links=False) as file:
                content = file.read(MAX_BYTES // len(index.moments) + _HEADER_BYTES)
            actual = hashlib.sha256(content).hexdigest()
            if actual != index.moments[step]:
                raise ValueError(f"its SHA-256 is {actual}, but {INDEX} says {index.moments[step]}")
            moment = from_bytes(content)
            if moment["weights"].shape[-1] != len(index.tokens):
                raise ValueError(f"it is of another text than the {len(index.tokens)} tokens of {INDEX}")
            if moment.dtype != (moments or [moment])[0].dtype:
                raise ValueError("it is of another model than the moments before it")
        except Exception as error:  # a made-up header makes NumPy raise anything
            raise _damaged(path, error) from None
        moments.append(moment)
    return moments


def to_bytes(q_LTNH: np.ndarray, k_LTKH: np.ndarray, weights_LNTS: np.ndarray) -> bytes:
    """The content of a moment's .npy file; what float16 cannot hold becomes the largest number that it can."""
    L, T, N, H = q_LTNH.shape
    record = np.zeros((), _record_type(L, T, N, k_LTKH.shape[2], H))
    for name, array in (("q", q_LTNH), ("k", k_LTKH), ("weights", weights_LNTS)):
        record[name] = np.clip(array, -LARGEST, LARGEST)
    file = io.BytesIO()
    np.lib.format.write_array(file, record, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_bytes(content: bytes) -> np.ndarray:
    """The record in a .npy file; raises anything where it is not just that."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    (L, T, N, H), (*_, K, _) = dtype["q"].shape, dtype["k"].shape
    expected = _record_type(L, T, N, K, H)
    if version != (1, 0) or shape != () or dtype != expected:
        raise ValueError(f"it holds {shape} of {dtype}, and not one moment")
    # Unlike np.load, this knows nothing of pickles and archives, and takes no memory that the file does not fill.
    record = np.frombuffer(content, dtype, offset=file.tell()).reshape(())
    if not all(np.isfinite(record[name]).all() for name in ("q", "k", "weights")):
        raise ValueError("it has numbers that are not finite")
    return record


def most_moments(model: ModelConfig, num_tokens: int) -> int:
    """How many moments of a model a history may have."""
    return min(MAX_MOMENTS, MAX_BYTES // moment_bytes(model, num_tokens))


def moment_bytes(model: ModelConfig, num_tokens: int) -> int:
    """How much room the numbers of one moment take."""
    heads, T = model.num_heads, num_tokens
    return 2 * model.num_layers * T * ((heads + model.kv_heads) * model.head_width + heads * T)


def _record_type(L: int, T: int, N: int, K: int, H: int) -> np.dtype[np.void]:
    """The one kind of record that a moment is."""
    return np.dtype([("q", "<f2", (L, T, N, H)), ("k", "<f2", (L, T, K, H)), ("weights", "<f2", (L, N, T, T))])


def _render(document: dict[str, Any]) -> bytes:
    """The one way to write a history.json, its own hash at the end."""
    digest = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    return json.dumps(document | {"sha256": digest}).encode() + b"\n"


def _damaged(path: Path, error: Exception) -> BrokenError:
    reason = getattr(error, "strerror", None) or error
    return BrokenError(f"{path}: is missing or damaged: {reason}; delete {path.parent} if you have no copy of it")
