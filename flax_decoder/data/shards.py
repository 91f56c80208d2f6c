"""The tokens of a corpus on disk: shards with their SHA-256, mapped into memory.

A corpus folder has corpus.json, and for the training and the validation split shards of token ids and of the places
where documents start, both as plain little-endian numbers; of conversations also of what is learned, a byte a token.
corpus.json is written last.

That of a mixture has a corpus folder for each source, 0, 1, and so on, and a corpus.json that names and weighs them.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_decoder.config import MAX_SOURCES
from flax_decoder.data.long_array import Shards
from flax_decoder.data.splits import Corpus, ExampleSplit, Mixture, Source, Split
from flax_decoder.errors import BrokenError, FaultError, UserError
from flax_decoder.io.files import is_sha256, open_regular, sha256_of, write_text
from flax_decoder.io.strict_json import LISTING, parse_object

CORPUS, TOKENIZER = "corpus.json", "tokenizer.json"
FORMAT = 2
SPLITS = ("train", "validation")
# Up to this size, the hash of each shard is checked whenever a corpus is opened; of larger ones `verify` checks them.
CHECKED_BYTES = 4_000_000_000


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
_LEARNED = {"learned_sha256": str}  # of a shard of conversations
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
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise FaultError(f"{path}: the process may not map as much memory: see ulimit -v") from None
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
