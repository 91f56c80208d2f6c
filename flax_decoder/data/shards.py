"""The tokens of a corpus on disk: shards with their SHA-256, mapped into memory.

A corpus folder has corpus.json, and for the training and the validation split shards of token ids and of the places
where documents start, both as plain little-endian numbers. corpus.json is written last.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.errors import BrokenError, UserError
from flax_decoder.io.files import is_sha256, open_regular, sha256_of, write_text
from flax_decoder.io.strict_json import LISTING, parse_object

CORPUS = "corpus.json"
FORMAT = 2
SPLITS = ("train", "validation")
# Up to this size, the hash of each shard is checked whenever a corpus is opened; of larger ones `verify` checks them.
CHECKED_BYTES = 4_000_000_000


class Shards:
    """A long one-dimensional array in several files: indexed by slices and by arrays of indices, as NumPy's are.

    Attributes:
        dtype: of the numbers.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])
        self.dtype = arrays[0].dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._arrays).astype(dtype or self.dtype, copy=False)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return self[np.arange(*index.indices(len(self)))]
        indices = np.asarray(index)
        result = np.empty(indices.shape, self.dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            chosen = shards == shard
            result[chosen] = self._arrays[shard][indices[chosen] - self._starts[shard]]
        return result


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a corpus.

    Attributes:
        tokens: ids, one after the other; uint16 if the vocabulary has at most 65,536 tokens, else uint32.
        document_starts: where documents start in `tokens`, ascending.
        num_bytes: size of the text in UTF-8; bits per byte are computed from it.
        has_mask: tokens see their own document only.
    """

    tokens: np.ndarray | Shards
    document_starts: np.ndarray
    num_bytes: int
    has_mask: bool = False

    @property
    def masked_documents(self) -> np.ndarray | None:
        """`document_starts`, if tokens see their own document only."""
        return self.document_starts if self.has_mask else None


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents in two parts.

    Attributes:
        train: what is learned.
        validation: what is held back.
        source: the paths as they were given, joined by commas.
        sha256: of the one file, or of the hashes of several.
        what_was_read: a line on files, documents, and what was passed over.
    """

    train: Split
    validation: Split
    source: str
    sha256: str
    what_was_read: str

    @property
    def num_documents(self) -> int:
        """In both splits."""
        return len(self.train.document_starts) + len(self.validation.document_starts)

    def masked(self, has_mask: bool) -> "Corpus":
        """The same, in which tokens see their own document only, or all before them."""
        train, validation = (dataclasses.replace(split, has_mask=has_mask) for split in (self.train, self.validation))
        return dataclasses.replace(self, train=train, validation=validation)


def load_corpus(folder: str | os.PathLike[str], *, checks_all: bool = False) -> Corpus:
    """Opens a corpus; the tokens stay on disk, mapped read-only.

    Args:
        folder: of the corpus.
        checks_all: checks the hash of each shard, however large they are.

    Raises:
        BrokenError: a file is missing, or does not match corpus.json.
        UserError: it was written by an older version.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    num_bytes = sum(shard["tokens"] for split in SPLITS for shard in facts[split]["shards"]) * facts["item_bytes"]
    is_checked = checks_all or num_bytes <= CHECKED_BYTES
    train, validation = (_open_split(folder, name, facts, is_checked) for name in SPLITS)
    return Corpus(train, validation, facts["source"], facts["sha256"], facts["what_was_read"])


# What corpus.json says, of the whole, of a split, and of a shard.
_FACTS = {
    "format": int,
    "source": str,
    "sha256": str,
    "what_was_read": str,
    "item_bytes": int,
    "tokenizer_sha256": str,
    "settings": dict,
    "train": dict,
    "validation": dict,
}
_SPLIT_FACTS = {"bytes": int, "shards": list}
_SHARD_FACTS = {"name": str, "tokens": int, "documents": int, "sha256": str, "starts_sha256": str}


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of a corpus.json, with exactly the fields of a corpus.

    Raises:
        BrokenError: it is missing or damaged.
        UserError: it was written by an older version.
    """
    path = folder / CORPUS
    try:
        with open_regular(path) as file:
            facts = parse_object(file.read(LISTING.num_bytes + 1), path.name, LISTING)
    except (OSError, UserError) as error:
        raise _damaged(path, error) from None
    if "format" not in facts and "train_tokens" in facts:
        raise UserError(
            f"{folder}: was written by an older version, whose tokens are kept in another form;\n"
            "train on the text again with another --run.folder (--run.start-from begins with the weights of this run)"
        )
    _require_fields(path, facts, _FACTS)
    if facts["format"] != FORMAT or facts["item_bytes"] not in (2, 4):
        raise _damaged(path, ValueError(f"its format {facts['format']} is not known"))
    for split in SPLITS:
        _require_fields(path, facts[split], _SPLIT_FACTS)
        for index, shard in enumerate(facts[split]["shards"]):
            _require_fields(path, shard, _SHARD_FACTS)
            if shard["name"] != shard_name(split, index):
                raise _damaged(path, ValueError(f"its shard {index} is called {shard['name']!a}"))
        if facts[split]["bytes"] < 1 or not facts[split]["shards"]:  # bits per byte are computed from them
            raise _damaged(path, ValueError(f"its {split} split is empty"))
    return facts


def _require_fields(path: Path, facts: Any, wanted: dict[str, type]) -> None:
    types = {name: type(value) for name, value in facts.items()} if isinstance(facts, dict) else {}
    wrong = [name for name in {**wanted, **types} if types.get(name) is not wanted.get(name)]
    if wrong:
        raise _damaged(path, ValueError(f"{', '.join(map(ascii, wrong[:3]))}: missing, unknown or of the wrong type"))
    if not all(is_sha256(value) for name, value in facts.items() if name.endswith("sha256")):
        raise _damaged(path, ValueError("it has a SHA-256 that is none"))
    negative = [name for name, value in facts.items() if isinstance(value, int) and value < 0]
    if negative:
        raise _damaged(path, ValueError(f"{negative[0]} = {facts[negative[0]]} must be at least 0"))


def shard_name(split: str, index: int) -> str:
    """The name of a shard's file of tokens; that of its starts of documents has .starts before the ending."""
    return f"{split}-{index:05}.bin"


def starts_name(name: str) -> str:
    """The name of the file with the starts of documents in a shard."""
    return name.removesuffix(".bin") + ".starts.bin"


def _open_split(folder: Path, split: str, facts: dict[str, Any], is_checked: bool) -> Split:
    arrays, starts, first = [], [], 0
    for shard in facts[split]["shards"]:
        name, num_tokens = shard["name"], shard["tokens"]
        sha256, starts_sha256 = (shard["sha256"], shard["starts_sha256"]) if is_checked else (None, None)
        arrays.append(_map(folder / name, f"<u{facts['item_bytes']}", num_tokens, sha256))
        starts.append(_map(folder / starts_name(name), "<i8", shard["documents"], starts_sha256) + first)
        first += num_tokens
    return Split(arrays[0] if len(arrays) == 1 else Shards(arrays), np.concatenate(starts), facts[split]["bytes"])


def _map(path: Path, dtype: str, length: int, sha256: str | None) -> np.ndarray:
    """Maps the numbers of a file; raises BrokenError if it does not match corpus.json."""
    try:
        with open_regular(path, follow_links=False) as file:
            num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != length * np.dtype(dtype).itemsize:
            raise ValueError(f"it has {num_bytes:,} bytes, but {CORPUS} says {length:,} numbers")
        if sha256 is not None and (actual := sha256_of(path)) != sha256:
            raise ValueError(f"its SHA-256 is {actual}, but {CORPUS} says {sha256}")
        return np.memmap(path, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BrokenError:
    return BrokenError(
        f"{path}: is missing or damaged: {getattr(error, 'strerror', None) or error};\n"
        "put back a copy of the folder, or make it again from the text in another one"
    )


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes corpus.json, which makes a folder of shards a corpus."""
    write_text(folder / CORPUS, json.dumps({"format": FORMAT, **facts}, indent=1))


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder in which `prepare_corpus` has written a corpus."""
    return os.path.isfile(os.path.join(path, CORPUS))


def hash_of_hashes(hashes: Sequence[str]) -> str:
    """The hash of one file as it is, or one hash for those of several."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
