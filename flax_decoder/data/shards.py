"""The tokens of a corpus on disk: shards with their SHA-256, mapped into memory.

A corpus folder has corpus.json, and for the training and the validation split shards of token ids and of the places
where documents start, both as plain little-endian numbers. corpus.json is written last.

That of a mixture has a corpus folder for each source, 0, 1, and so on, and a corpus.json that names and weighs them.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import MAX_SOURCES
from flax_decoder.data.batches import deal, dealt, quotas, row_numbers, train_batch, train_windows
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

    @property
    def num_tokens(self) -> int:
        """Their number."""
        return len(self.tokens)

    def epochs(self, num_rows: int, context_length: int) -> float:
        """How often so many rows of a run read it."""
        return num_rows * context_length / len(self.tokens)

    def train_batch(
        self, *, seed: int, step: int, batch_size: int, context_length: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The training batch of a step; see `batches.train_batch`."""
        return train_batch(
            self.tokens,
            seed=seed,
            step=step,
            batch_size=batch_size,
            context_length=context_length,
            rows=rows,
            document_starts=self.masked_documents,
        )


@dataclass(frozen=True)
class MixedSplit:
    """The training parts of several corpora, from which rows are drawn by weight.

    Attributes:
        parts: one a source.
        weights: how much of all rows is from each; they add up to 1.
    """

    parts: tuple[Split, ...]
    weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        """In all parts."""
        return sum(part.num_tokens for part in self.parts)

    def epochs(self, num_rows: int, context_length: int) -> float:
        """How often so many rows of a run read the part that they repeat most."""
        shares = zip(self.parts, self.weights, strict=True)
        return max(weight * part.epochs(num_rows, context_length) for part, weight in shares)

    def train_batch(
        self, *, seed: int, step: int, batch_size: int, context_length: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The training batch of a step; see `batches.train_batch`."""
        sources, windows = deal(row_numbers(step, batch_size, rows), quotas(self.weights), seed)
        batch: dict[str, np.ndarray] = {}
        for source in np.unique(sources):
            part, is_here = self.parts[source], sources == source
            found = train_windows(
                part.tokens,
                windows[is_here],
                seed=seed,
                context_length=context_length,
                document_starts=part.masked_documents,
                source=int(source),
            )
            for name, array in found.items():
                batch.setdefault(name, np.empty((len(sources), context_length), array.dtype))[is_here] = array
        return batch


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
    def sources(self) -> "tuple[Source, ...]":
        """Itself, as a mixture of one."""
        return (Source("", 1.0, self),)

    def describe(self, num_rows: int, context_length: int) -> str:
        """What was read, for a run of so many rows; nothing of a single document."""
        return self.what_was_read if self.num_documents > 1 else ""

    def tokens_read(self, num_rows: int, context_length: int, seed: int) -> dict[str, int]:
        """Log entries: how many tokens of each source of a mixture the first rows of a run have; here none."""
        return {}

    def masked(self, has_mask: bool) -> "Corpus":
        """The same, in which tokens see their own document only, or all before them."""
        train, validation = (dataclasses.replace(split, has_mask=has_mask) for split in (self.train, self.validation))
        return dataclasses.replace(self, train=train, validation=validation)


@dataclass(frozen=True)
class Source:
    """One of the corpora of a mixture.

    Attributes:
        name: at most 32 letters, digits, dots, hyphens and underscores; "" if there is no other.
        weight: its part of all rows.
        corpus: its tokens.
    """

    name: str
    weight: float
    corpus: Corpus


@dataclass(frozen=True)
class Mixture:
    """Several corpora with one tokenizer, whose rows are mixed by weight; it does what `Corpus` does.

    Attributes:
        sources: at least two; their weights add up to 1.
    """

    sources: tuple[Source, ...]

    @property
    def train(self) -> MixedSplit:
        """What is learned."""
        weights = tuple(source.weight for source in self.sources)
        return MixedSplit(tuple(source.corpus.train for source in self.sources), weights)

    @property
    def validation(self) -> Split:
        """What is held back of the first source; each has its own."""
        return self.sources[0].corpus.validation

    @property
    def source(self) -> str:
        """The paths as they were given, joined by commas."""
        return ", ".join(source.corpus.source for source in self.sources)

    def describe(self, num_rows: int, context_length: int) -> str:
        """What was read, for a run of so many rows: a line a source."""
        width = max(len(source.name) for source in self.sources)
        lines = []
        for source in self.sources:
            train, validation = source.corpus.train, source.corpus.validation
            epochs = train.epochs(round(num_rows * source.weight), context_length)
            lines.append(
                f"{source.name:{width}}  {source.weight:.1%} of the rows, {epochs:.2f} epochs of {train.num_tokens:,} "
                f"tokens, {validation.num_tokens:,} to validate; {source.corpus.what_was_read}"
            )
        return "\n".join(lines)

    def tokens_read(self, num_rows: int, context_length: int, seed: int) -> dict[str, int]:
        """Log entries: how many tokens of each source the first rows of a run have."""
        counts = dealt(num_rows, quotas(self.train.weights), seed)
        named = zip(self.sources, counts, strict=True)
        return {f"tokens/{source.name}": count * context_length for source, count in named}

    def masked(self, has_mask: bool) -> "Mixture":
        """See `Corpus`."""
        return Mixture(
            tuple(dataclasses.replace(source, corpus=source.corpus.masked(has_mask)) for source in self.sources)
        )


def load_corpus(folder: str | os.PathLike[str], *, checks_all: bool = False) -> Corpus | Mixture:
    """Opens a corpus; the tokens stay on disk, mapped read-only.

    Args:
        folder: of the corpus.
        checks_all: checks the hash of each shard, however large they are.

    Returns:
        The corpus; or a `Mixture`, whose `sources` have one each, for that of a run with `data.mixture`.

    Raises:
        BrokenError: a file is missing, or does not match corpus.json.
        UserError: it was written by an older version.
    """
    folder = Path(folder)
    sources = read_mixture(folder)
    if not sources:
        return load_one(folder, checks_all=checks_all)
    corpora = []
    for index, source in enumerate(sources):
        path = folder / str(index) / CORPUS
        try:
            actual = sha256_of(path, follow_links=False)
        except OSError as error:
            raise _damaged(path, error) from None
        if actual != source["sha256"]:
            raise _damaged(path, ValueError(f"its SHA-256 is {actual}, but {folder / CORPUS} says {source['sha256']}"))
        corpora.append(load_one(path.parent, checks_all=checks_all))
    named = zip(sources, corpora, strict=True)
    return Mixture(tuple(Source(source["name"], source["weight"], corpus) for source, corpus in named))


def load_one(folder: Path, *, checks_all: bool = False) -> Corpus:
    """`load_corpus` of a corpus that is no mixture."""
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
_MIXTURE_FACTS = {"format": int, "mixture": list}
_SOURCE_FACTS = {"name": str, "weight": float, "sha256": str}
_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            return parse_object(file.read(LISTING.num_bytes + 1), path.name, LISTING)
    except (OSError, UserError) as error:
        raise _damaged(path, error) from None


def read_mixture(folder: Path) -> list[dict[str, Any]]:
    """Name, weight, and SHA-256 of the corpus.json of each source of a mixture; an empty list for another corpus.

    Raises:
        BrokenError: corpus.json is missing or damaged.
    """
    path = folder / CORPUS
    facts = _read(path)
    if "mixture" not in facts:
        return []
    _require_fields(path, facts, _MIXTURE_FACTS)
    sources: list[dict[str, Any]] = facts["mixture"]
    for source in sources:
        _require_fields(path, source, _SOURCE_FACTS)
        if not 0 < source["weight"] < 1 or not _SOURCE_NAME.fullmatch(source["name"]):
            raise _damaged(path, ValueError("it has a source with a wrong name or weight"))
    if facts["format"] != FORMAT or not 2 <= len({source["name"] for source in sources}) == len(sources) <= MAX_SOURCES:
        raise _damaged(path, ValueError("its sources are not those of a mixture"))
    if not math.isclose(sum(source["weight"] for source in sources), 1):
        raise _damaged(path, ValueError("the weights of its sources do not add up to 1"))
    return sources


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of the corpus.json of a corpus that is no mixture, with exactly its fields.

    Raises:
        BrokenError: it is missing or damaged.
        UserError: it was written by an older version, or is of a mixture.
    """
    path = folder / CORPUS
    facts = _read(path)
    if "mixture" in facts:
        raise UserError(f"{folder}: is a mixture; give its sources, one by one, in data.mixture")
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
    """Writes corpus.json, which makes a folder of shards, or of the sources of a mixture, a corpus."""
    write_text(folder / CORPUS, json.dumps({"format": FORMAT, **facts}, indent=1))


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder in which `prepare_corpus` has written a corpus."""
    return os.path.isfile(os.path.join(path, CORPUS))


def hash_of_hashes(hashes: Sequence[str]) -> str:
    """The hash of one file as it is, or one hash for those of several."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
