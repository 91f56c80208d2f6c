"""The tokens of a corpus on disk: shards with their SHA-256, mapped into memory.

A corpus folder has corpus.json, and for the training and the validation split shards of token ids and of the places
where documents start, both as plain little-endian numbers; of conversations also of what is learned, a byte a token.
corpus.json is written last.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.batches import train_batch, validation_batches
from flax_decoder.data.windows import Examples, Windows, make_windows, train_windows, validation_windows
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

    def arranged(self, data: DataConfig) -> "Split":
        """The same, in rows as `data` says."""
        return dataclasses.replace(self, has_mask=data.document_mask)

    @property
    def masked_documents(self) -> np.ndarray | None:
        """`document_starts`, if tokens see their own document only."""
        return self.document_starts if self.has_mask else None

    @property
    def has_segments(self) -> bool:
        """Whether its batches have "segments"."""
        return self.has_mask

    @property
    def num_learned(self) -> int:
        """Tokens that `num_bytes` bytes are made of, and that losses are about."""
        return len(self.tokens)

    def rows_per_epoch(self, context_length: int) -> float:
        """Rows of T tokens after which all has been learned once."""
        return len(self.tokens) / context_length

    def train_batch(
        self, *, seed: int, step: int, batch_size: int, context_length: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The training batch of a step; see `batches.train_batch`."""
        order = {"seed": seed, "step": step, "batch_size": batch_size, "context_length": context_length}
        return train_batch(self.tokens, **order, rows=rows, document_starts=self.masked_documents)

    def validation_batches(
        self, *, batch_size: int, context_length: int, limit: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """All of it in order; see `batches.validation_batches`."""
        return validation_batches(
            self.tokens,
            batch_size=batch_size,
            context_length=min(context_length, len(self.tokens) - 1),
            limit=limit,
            document_starts=self.masked_documents,
        )


@dataclass(frozen=True, eq=False)
class ExampleSplit(Split):
    """A part of a corpus of conversations: each document is an example, of which some tokens are learned.

    Attributes:
        learned: for each token 1 if it is learned, else 0; `num_bytes` is the size of the text that these make.
        packing: several examples go to a row, where they do not see each other.
    """

    learned: np.ndarray = field(kw_only=True)
    packing: bool = True
    _windows: dict[int, Windows] = field(default_factory=dict, init=False)

    def arranged(self, data: DataConfig) -> "ExampleSplit":
        """The same, in rows as `data` says."""
        return dataclasses.replace(self, packing=data.packing)

    @property
    def has_segments(self) -> bool:
        """Whether its batches have "segments": a row of one example needs none."""
        return self.packing

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return int(np.count_nonzero(self.learned))

    def rows_per_epoch(self, context_length: int) -> float:
        """Rows after which all has been learned once."""
        return len(self._arranged(context_length))

    def train_batch(
        self, *, seed: int, step: int, batch_size: int, context_length: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The training batch of a step; see `train_windows`."""
        windows, order = self._arranged(context_length), {"seed": seed, "step": step, "batch_size": batch_size}
        batch = train_windows(self.examples, windows, **order, context_length=context_length, rows=rows)
        return self._without_needless(batch)

    def validation_batches(
        self, *, batch_size: int, context_length: int, limit: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """All of it in order; see `validation_windows`."""
        windows, shape = self._arranged(context_length), {"batch_size": batch_size, "context_length": context_length}
        return map(self._without_needless, validation_windows(self.examples, windows, **shape, limit=limit))

    @functools.cached_property
    def examples(self) -> Examples:
        """The same as examples."""
        tokens = np.asarray(self.tokens)  # one shard: without a copy
        return Examples(tokens, self.learned.view(np.bool_), np.append(self.document_starts[1:], len(tokens)))

    def _arranged(self, context_length: int) -> Windows:
        if context_length not in self._windows:
            windows = make_windows(self.examples, context_length=context_length, packing=self.packing)
            self._windows[context_length] = windows
        return self._windows[context_length]

    def _without_needless(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array for name, array in batch.items() if name != "segments" or self.has_segments}


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

    @property
    def has_examples(self) -> bool:
        """Whether it is made of conversations."""
        return isinstance(self.train, ExampleSplit)

    def arranged(self, data: DataConfig) -> "Corpus":
        """The same, in rows as `data` says."""
        train, validation = (split.arranged(data) for split in (self.train, self.validation))
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
_LEARNED = {"learned_sha256": str}  # of a shard of conversations


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
            has_learned = isinstance(shard, dict) and bool(shard.keys() & _LEARNED.keys())
            _require_fields(path, shard, _SHARD_FACTS | (_LEARNED if has_learned else {}))
            if shard["name"] != shard_name(split, index):
                raise _damaged(path, ValueError(f"its shard {index} is called {shard['name']!a}"))
        if facts[split]["bytes"] < 1 or not facts[split]["shards"]:  # bits per byte are computed from them
            raise _damaged(path, ValueError(f"its {split} split is empty"))
    if len({shard.keys() & _LEARNED.keys() == set() for split in SPLITS for shard in facts[split]["shards"]}) > 1:
        raise _damaged(path, ValueError("only a part of it is of conversations"))
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


def learned_name(name: str) -> str:
    """The name of the file that says which tokens of a shard are learned."""
    return name.removesuffix(".bin") + ".learned.bin"


def _open_split(folder: Path, split: str, facts: dict[str, Any], is_checked: bool) -> Split:
    arrays, starts, learned, first = [], [], [], 0
    for shard in facts[split]["shards"]:
        name, num_tokens = shard["name"], shard["tokens"]
        hashes = shard if is_checked else {}
        arrays.append(_map(folder / name, f"<u{facts['item_bytes']}", num_tokens, hashes.get("sha256")))
        path = folder / starts_name(name)
        starts.append(_map(path, "<i8", shard["documents"], hashes.get("starts_sha256")) + first)
        if "learned_sha256" in shard:
            lengths = np.diff(starts[-1], append=first + num_tokens)
            if not len(lengths) or starts[-1][0] != first or lengths.min() < 1:
                raise _damaged(path, ValueError("it does not say where examples start"))
            learned.append(_map(folder / learned_name(name), "u1", num_tokens, hashes.get("learned_sha256")))
        first += num_tokens
    found = arrays[0] if len(arrays) == 1 else Shards(arrays), np.concatenate(starts), facts[split]["bytes"]
    if not learned:
        return Split(*found)
    return ExampleSplit(*found, learned=learned[0] if len(learned) == 1 else np.concatenate(learned))


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
