"""The parts of a corpus, and the rows that training and evaluation read from them.

Rows of a text are windows of it; those of conversations hold whole examples; those of a mixture are drawn by weight.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from flax_decoder.config import DataConfig
from flax_decoder.data.batches import deal, dealt, quotas, row_numbers, train_windows, validation_batches
from flax_decoder.data.long_array import Shards
from flax_decoder.data.windows import Examples, Windows, example_rows, make_windows, validation_windows


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a corpus.

    Attributes:
        tokens: ids, one after the other; uint16 if the vocabulary has at most 65,536 tokens, else uint32.
        document_starts: where documents start in `tokens`, ascending.
        num_bytes: size of the text in UTF-8; bits per byte are computed from it.
        has_mask: tokens see their own document only.
        has_examples: it is made of conversations.
    """

    has_examples: ClassVar[bool] = False
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
    def num_tokens(self) -> int:
        """Their number."""
        return len(self.tokens)

    @property
    def num_learned(self) -> int:
        """Tokens that `num_bytes` bytes are made of, and that losses are about."""
        return len(self.tokens)

    def epochs(self, num_rows: int, context_length: int) -> float:
        """How often so many rows of a run read it."""
        return num_rows * context_length / len(self.tokens)

    def train_rows(
        self, numbers: np.ndarray, *, seed: int, context_length: int, source: int | None = None
    ) -> dict[str, np.ndarray]:
        """Training rows by their numbers in the run; see `batches.train_windows`."""
        return train_windows(
            self.tokens,
            numbers,
            seed=seed,
            context_length=context_length,
            document_starts=self.masked_documents,
            source=source,
        )

    def train_batch(
        self, *, seed: int, step: int, batch_size: int, context_length: int, rows: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The training batch of a step, from 0: `batch_size` rows, or those of them that `rows` names."""
        return self.train_rows(row_numbers(step, batch_size, rows), seed=seed, context_length=context_length)

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

    has_examples: ClassVar[bool] = True
    learned: np.ndarray = field(kw_only=True)
    packing: bool = True
    _windows: dict[int, Windows] = field(default_factory=dict, init=False)

    def arranged(self, data: DataConfig) -> "ExampleSplit":
        """See `Split`."""
        return dataclasses.replace(self, packing=data.packing)

    @property
    def has_segments(self) -> bool:
        """Whether its batches have "segments": a row of one example needs none."""
        return self.packing

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return int(np.count_nonzero(self.learned))

    def epochs(self, num_rows: int, context_length: int) -> float:
        """See `Split`."""
        return num_rows / len(self._arranged(context_length))

    def train_rows(
        self, numbers: np.ndarray, *, seed: int, context_length: int, source: int | None = None
    ) -> dict[str, np.ndarray]:
        """Training rows by their numbers in the run; see `windows.example_rows`. Conversations are not mixed."""
        windows = self._arranged(context_length)
        return self._needed(example_rows(self.examples, windows, numbers, seed=seed, context_length=context_length))

    def validation_batches(
        self, *, batch_size: int, context_length: int, limit: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """All of it in order; see `windows.validation_windows`."""
        windows, shape = self._arranged(context_length), {"batch_size": batch_size, "context_length": context_length}
        return map(self._needed, validation_windows(self.examples, windows, **shape, limit=limit))

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

    def _needed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array for name, array in batch.items() if name != "segments" or self.has_segments}


@dataclass(frozen=True)
class MixedSplit:
    """The training parts of several corpora, from which rows are drawn by weight.

    Attributes:
        parts: one a source.
        weights: how much of all rows is from each; they add up to 1.
        has_examples: see `Split`; conversations are not mixed.
    """

    has_examples: ClassVar[bool] = False
    parts: tuple[Split, ...]
    weights: tuple[float, ...]

    @property
    def has_segments(self) -> bool:
        """See `Split`."""
        return any(part.has_segments for part in self.parts)

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
        """See `Split`."""
        sources, windows = deal(row_numbers(step, batch_size, rows), quotas(self.weights), seed)
        batch: dict[str, np.ndarray] = {}
        for source in np.unique(sources):
            part, is_here = self.parts[source], sources == source
            found = part.train_rows(windows[is_here], seed=seed, context_length=context_length, source=int(source))
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

    def arranged(self, data: DataConfig) -> "Corpus":
        """The same, in rows as `data` says."""
        train, validation = (split.arranged(data) for split in (self.train, self.validation))
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

    def arranged(self, data: DataConfig) -> "Mixture":
        """See `Corpus`."""
        return Mixture(
            tuple(dataclasses.replace(source, corpus=source.corpus.arranged(data)) for source in self.sources)
        )
