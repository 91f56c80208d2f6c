"""Text <-> token ids.

Three kinds: one token per character, one token per byte, or subwords (byte-level BPE trained on the text, or any
tokenizer.json). Each writes a tokenizer.json with which the Hugging Face `tokenizers` library encodes and decodes the
same. The first two do not import that library, and encode a megabyte in milliseconds.
"""

import itertools
import json
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from flax_decoder.data.large_tokenizer import COMPLAINT, read_large
from flax_decoder.data.tokenizer_growth import growth_of
from flax_decoder.data.tokenizer_json import byte_characters, byte_document, char_document
from flax_decoder.errors import UserError, as_one_line, as_user_error, require_type
from flax_decoder.io.files import write_text
from flax_decoder.io.foreign_file import open_named, read_content
from flax_decoder.io.strict_json import VOCABULARY, excess_of, parse_object, shown

if TYPE_CHECKING:
    import tokenizers

# The values of `data.tokenizer`, besides the path of a tokenizer.json.
KINDS = ("char", "byte", "bpe")

_NUM_CODE_POINTS = 0x110000  # all of Unicode
_MAX_TOKENS = 10_000_000  # the largest known vocabularies have 262,000

# Start and end tokens in the tokenizer.json files of well-known models.
_START_TOKENS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_END_TOKENS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>")

# A long text is encoded in pieces: NumPy needs some 20 bytes per character for it, the library some 100 per token.
_PIECE_CHARACTERS = 1_000_000
# Of what the library holds at one time; `growth_of` admits no tokenizer that makes more of a piece.
_MAX_NORMALIZED_BYTES = 400_000_000
_CUT_CONTEXT_CHARACTERS = 200  # far longer than any token that a cut after a newline could split
_CUT_TRIES = 100
_SUBWORD_PIECE_CHARACTERS = 50_000  # of which the library encodes many at once
_PIECES_AT_ONCE = 20
_MAX_TRAINED_WORD_BYTES = 256  # training time is quadratic in the length of a word


class Tokenizer(ABC):
    """Turns text into token ids and back, so that `decode(encode(text)) == text`.

    Attributes:
        vocab_size: V; ids run from 0 to V - 1.
        start_id: the start-of-text token, or None.
        end_ids: the end-of-text tokens; may be empty.
        lone_byte_id: of a tokenizer with tokens for bytes among those for text, the token of a byte that is no
            character by itself.
        special_tokens: the texts that it turns into special tokens, wherever they are.
    """

    vocab_size: int
    start_id: int | None = None
    end_ids: tuple[int, ...] = ()
    lone_byte_id: int | None = None
    special_tokens: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises UserError if it is no text, or a character is not in the vocabulary."""
        return self.encode_array(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: the text, after what the tokenizer.json puts before it, such as a start token."""
        return self.encode(text)

    def encode_parted(self, text: str, joint: str) -> list[int]:
        """The ids of a text without the character `joint`; what it parts, such as a special token, is not one token."""
        return self.encode(text.replace(joint, ""))

    def prompt_start(self) -> list[int]:
        """The tokens that `encode_prompt` puts before a text."""
        return []

    def token_id(self, token: str) -> int | None:
        """The id of a token with a text of its own, such as "</s>"; None if there is none."""
        return None

    def encode_array(self, text: str, dtype: DTypeLike = np.int32) -> np.ndarray:
        """The token ids as an array, for whole corpora: memory is that of text and array, and of encoding one piece.

        Args:
            text: any length.
            dtype: an integer type that holds V - 1.

        Raises:
            UserError: another type, no text, or a character that is not in the vocabulary.
        """
        require_type("the text to encode", text, str)
        dtype = np.dtype(dtype)
        if dtype.kind not in "iu" or self.vocab_size - 1 > np.iinfo(dtype).max:
            raise UserError(f"dtype = {dtype} cannot hold token ids up to {self.vocab_size - 1}; take int32")
        ids = bytearray()  # grows in place; joining arrays would hold all ids twice
        for piece in self._encode_pieces(text):
            ids += piece.astype(dtype, copy=False).data
        return np.frombuffer(ids, dtype)

    def encode_many(self, texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """The token ids of many texts, each given after the text that stands before it ("" where it begins).

        Raises:
            UserError: as `encode_array`.
        """
        return [self.encode_array(text) for _, text in texts]

    @abstractmethod
    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """The ids of a text, piece by piece."""

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of token ids: integers in any iterable, such as a one-dimensional NumPy or JAX array.

        Raises:
            ValueError: they are no integers (T,), or one is not in the vocabulary.
        """
        if hasattr(ids, "__array__") and not isinstance(ids, np.ndarray):
            ids = np.asarray(ids)  # one copy from the device; iterating would make one per element
        try:
            numbers = [*map(operator.index, ids)]
        except TypeError:
            raise ValueError(f"the ids to decode must be integers (T,), not {as_one_line(ids)}") from None
        outside = next((number for number in numbers if not 0 <= number < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"token id {outside} is not in the vocabulary: 0 to {self.vocab_size - 1}")
        return self._decode(np.array(numbers, np.int64))

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """The text of ids, all of which are in the vocabulary."""

    @abstractmethod
    def to_json(self) -> str:
        """The content of the tokenizer.json."""


class CharTokenizer(Tokenizer):
    """One token per character; ids are ranks by code point."""

    def __init__(self, text: str):
        """The vocabulary is the set of characters in `text`."""
        present = np.zeros(_NUM_CODE_POINTS, bool)  # marking is linear in the text, where sorting is not
        for piece in split_into_pieces(text):
            present[_code_points(piece)] = True
        self._code_points = np.flatnonzero(present).astype("<u4")
        self.characters = self._code_points.tobytes().decode("utf-32-le", "surrogatepass")
        _utf8(self.characters)
        self.vocab_size = len(self._code_points)
        self._ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
        self._ids[self._code_points] = np.arange(self.vocab_size)

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        start = 0
        for piece in split_into_pieces(text):
            ids = self._ids[_code_points(piece)]  # one table lookup per character
            lacking = ids < 0
            if lacking.any():
                index = start + int(lacking.argmax())
                character, line = text[index], text.count("\n", 0, index) + 1
                raise UserError(
                    f"the text has {character!r} (U+{ord(character):04X}, at character {index}, line {line}), which "
                    f"this char vocabulary of {self.vocab_size} characters lacks;\nuse one of its characters, or train "
                    'with data.tokenizer = "byte"'
                )
            yield ids
            start += len(piece)

    def _decode(self, ids: np.ndarray) -> str:
        return self._code_points[ids].tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        """A WordLevel model whose words are single characters."""
        return json.dumps(char_document(self.characters), ensure_ascii=False)


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8. Invalid UTF-8 decodes to the replacement character U+FFFD."""

    vocab_size = 256

    def encode_many(self, texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """As the others; without a copy of each text's bytes."""
        return [np.frombuffer(_utf8(text), np.uint8) for _, text in texts]

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        return (np.frombuffer(_utf8(piece), np.uint8) for piece in split_into_pieces(text))

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Byte-level BPE without merges."""
        return json.dumps(byte_document(), ensure_ascii=False)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: BPE trained by `make_tokenizer`, or any tokenizer.json."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", growth: int = 1, vocab_size: int | None = None):
        """Wraps a tokenizer, and switches off its truncation and padding.

        Args:
            tokenizer: of the library.
            growth: see `growth_of`.
            vocab_size: V, where it is known: the library takes long to list the ids of a large vocabulary.
        """
        tokenizer.no_truncation()  # that of a classifier may cut each text at 512 tokens
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._max_characters = _MAX_NORMALIZED_BYTES // growth
        self.vocab_size = vocab_size or 1 + max(tokenizer.get_vocab().values())  # ids may have gaps
        self.lone_byte_id = tokenizer.token_to_id("<0xF0>")
        added_tokens = tokenizer.get_added_tokens_decoder()
        special_ids = {token.content: id for id, token in added_tokens.items() if token.special}
        self.special_tokens = tuple(special_ids)
        self.start_id = next((special_ids[name] for name in _START_TOKENS if name in special_ids), None)
        self.end_ids = tuple(special_ids[name] for name in _END_TOKENS if name in special_ids)[:1]

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """Encodes without the special tokens around a text."""
        pieces = self._split("", text)
        while group := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
            yield from self._encode_after(group)

    def encode_many(self, texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """As the others; all at once, which is faster than one by one."""
        pieces = [list(self._split(before, text)) for before, text in texts]
        arrays = iter(self._encode_after([piece for group in pieces for piece in group]))
        return [np.concatenate([next(arrays) for _ in group] or [np.zeros(0, np.int32)]) for group in pieces]

    def _split(self, before: str, text: str) -> Iterator[tuple[str, str]]:
        """Splits a text into pieces, each after the text right before it."""
        for piece in split_into_pieces(text):
            _utf8(piece)
        start = 0
        while start < len(text):
            end = self._find_cut(text, start + _SUBWORD_PIECE_CHARACTERS)
            yield text[max(start - _CUT_CONTEXT_CHARACTERS, 0) : start] if start else before, text[start:end]
            start = end

    def encode_parted(self, text: str, joint: str) -> list[int]:
        """Encodes the text with the joint, and leaves out its tokens."""
        self._require_bounded(len(text))
        with as_user_error("the tokenizer cannot encode this text"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)  # with the offsets of tokens
        starts = {index for index, character in enumerate(text) if character == joint}
        pairs = [*zip(encoding.ids, encoding.offsets, strict=True)]
        if any(end - start > 1 and starts & set(range(start, end)) for _, (start, end) in pairs):
            raise UserError("the tokenizer cannot write a special token as text; take it out of the messages")
        return [id for id, (start, end) in pairs if not (start in starts and end == start + 1)]

    def _encode_after(self, pieces: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        """The ids of pieces, each encoded after the text before it: some tokenizers begin each text with a mark."""
        befores = iter(self._encode_batch([before for before, _ in pieces if before]))
        wholes = self._encode_batch([before + piece for before, piece in pieces])
        arrays = []
        for (before, piece), ids in zip(pieces, wholes, strict=True):
            before_ids = next(befores) if before else []
            # In a word of thousands of letters, the tokens of its beginning depend on its end: it is cut all the same.
            is_separate = ids[: len(before_ids)] == before_ids
            arrays.append(np.array(ids[len(before_ids) :] if is_separate else self._encode_piece(piece), np.int32))
        return arrays

    def prompt_start(self) -> list[int]:
        """Those before one letter: without any text, what is before it cannot be told."""
        with_start = self.encode_prompt("a")
        return with_start[: len(with_start) - len(self.encode("a"))]

    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not, by its text in the vocabulary."""
        id: int | None = self._tokenizer.token_to_id(token)
        return id

    def encode_prompt(self, text: str) -> list[int]:
        """Other than `encode`, with the special tokens before the text; those after it would end it."""
        plain = self.encode(text)
        around = self._encode_piece(text, add_special_tokens=True)
        starts = range(len(around) - len(plain) + 1)
        start = next((i for i in starts if around[i : i + len(plain)] == plain), 0)
        return around[:start] + plain

    def _encode_piece(self, piece: str, add_special_tokens: bool = False) -> list[int]:
        return self._encode_batch([piece], add_special_tokens)[0]

    def _encode_batch(self, pieces: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        self._require_bounded(max(map(len, pieces), default=0))
        with as_user_error("the tokenizer cannot encode this text"):
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]

    def _require_bounded(self, longest: int) -> None:
        if longest > self._max_characters:  # the library would end the process
            raise UserError(
                f"the tokenizer may lengthen each character of a text of {longest:,} so much that it takes over "
                f"{_MAX_NORMALIZED_BYTES:,} bytes; give at most {self._max_characters:,}"
            )

    def _find_cut(self, text: str, earliest: int) -> int:
        """The first index from `earliest` on at which the text can be cut without a change to its tokens, else its end.

        What a cut does depends on the tokenizer, so each is tried on the text around it: the tokens before it must not
        depend on what follows.
        """
        for start in range(earliest, len(text), _PIECE_CHARACTERS):
            for cut in _cuts(text, start, start + _PIECE_CHARACTERS):
                before = text[max(cut - _CUT_CONTEXT_CHARACTERS, 0) : cut]
                after = text[cut : cut + _CUT_CONTEXT_CHARACTERS]
                head, whole = self._encode_batch([before, before + after])
                if whole[: len(head)] == head:
                    return cut
        return len(text)

    def _decode(self, ids: np.ndarray) -> str:
        with as_user_error("the tokenizer cannot decode its own tokens"):
            return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        """The library's own serialization."""
        return self._tokenizer.to_str()


def split_into_pieces(text: str) -> Iterator[str]:
    """Splits a text into pieces of bounded size, for work on single characters."""
    return (text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS))


def _cuts(text: str, start: int, end: int) -> Iterator[int]:
    """Candidates for a cut: after newlines; in long lines before spaces, else anywhere."""
    for separator, length in (("\n", 1), (" ", 0), ("", 0)):
        index = start
        for _ in range(_CUT_TRIES):
            index = text.find(separator, index, end)
            if index < 0:
                break
            yield index + length
            index += 1


def make_tokenizer(kind: str, text: str | Iterable[str], bpe_vocab_size: int) -> Tokenizer:
    """Makes the tokenizer that `data.tokenizer` names.

    Args:
        kind: "char", "byte", "bpe", or the path of a tokenizer.json.
        text: source of a char or bpe vocabulary; one text or many, which are read once.
        bpe_vocab_size: V of a bpe tokenizer; a short text may give fewer tokens.

    Raises:
        UserError: `kind` is none of these, or the file cannot be used.
    """
    texts = (text,) if isinstance(text, str) else text
    if kind == "char":
        return CharTokenizer("".join(texts))
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return _train_bpe(texts, bpe_vocab_size)
    if not os.path.exists(kind):
        raise UserError(
            f'data.tokenizer = "{kind}": there is no such file; choose "char", "byte", "bpe" or the path of a '
            "tokenizer.json"
        )
    return load_tokenizer(kind)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json: of this package, or any that the `tokenizers` library reads.

    Raises:
        UserError: the file is missing or is not a tokenizer.json.
    """
    content = read_content(open_named(Path(path)), VOCABULARY.num_bytes, str(path))
    return parse_tokenizer(content, str(path))


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer.json.

    Raises:
        UserError: `load_tokenizer` would refuse it, so that what is trained with it could not be used.
    """
    content = tokenizer.to_json()
    excess = excess_of(content.encode(), VOCABULARY)
    if excess is not None:
        raise UserError(
            f"a vocabulary of {tokenizer.vocab_size:,} tokens is too large: its {path.name} {excess};\n"
            "choose another tokenizer, or for bpe a smaller data.bpe_vocab_size"
        )
    write_text(path, content)


def parse_tokenizer(content: bytes, source: str) -> Tokenizer:
    """`load_tokenizer` for the content of a file.

    Args:
        content: of a tokenizer.json.
        source: start of error messages.

    Raises:
        UserError: it is not a tokenizer.json, is too large, or another reader could understand it differently.
    """
    large = read_large(content, source)
    if large is not None:
        library, document, growth, vocab_size = large
        tokenizer = SubwordTokenizer(library, growth, vocab_size)
    else:
        document = parse_object(content, source, VOCABULARY)
        fast = _fast_tokenizer(document)
        if fast is not None and fast.vocab_size > 0:
            return fast
        model = document.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise UserError(f"{source}: is not a tokenizer.json: it has no model with a vocab; get it again")
        growth = growth_of(document, source)
        model, document = None, {"added_tokens": document.get("added_tokens")}  # frees memory: the library parses again
        import tokenizers

        with as_user_error(f"{source}: {COMPLAINT}"):
            library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            tokenizer = SubwordTokenizer(library, growth)
    with as_user_error(f"{source}: {COMPLAINT}"):
        tokenizer.encode_prompt("")  # a template with unknown tokens fails only here
        # The library silently renumbers an added token whose id is not the next one.
        added = {token["content"]: token["id"] for token in document.get("added_tokens") or []}
        wrong = next((token for token, id in added.items() if library.token_to_id(token) != id), None)
    if wrong is not None:
        raise UserError(
            f"{source}: gives the added token {shown(wrong)} the id {shown(added[wrong])}, which does not fit the "
            "vocabulary; get it again"
        )
    if tokenizer.vocab_size > _MAX_TOKENS:
        raise UserError(
            f"{source}: has the token id {tokenizer.vocab_size - 1:,}, but no vocabulary has {_MAX_TOKENS:,} tokens; "
            "it is damaged or malicious"
        )
    return tokenizer


def _fast_tokenizer(document: Any) -> Tokenizer | None:
    """The char or byte tokenizer whose tokenizer.json is this document, if any."""
    if document == byte_document():
        return ByteTokenizer()
    match document:
        case {"model": {"type": "WordLevel", "vocab": dict(vocab)}}:
            characters = "".join(sorted(vocab))
            if document == char_document(characters):
                return CharTokenizer(characters)
    return None


def _train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE as in GPT-2. All 256 bytes are tokens, so it encodes any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = pre_tokenizers.Split(Regex(f".{{1,{_MAX_TRAINED_WORD_BYTES}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, parts])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(byte_characters())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(_lines, texts)), trainer)
    tokenizer.pre_tokenizer = byte_level
    return SubwordTokenizer(tokenizer)


def _lines(text: str) -> Iterator[str]:
    """Yields `text.splitlines(keepends=True)`; as a list it could be several times as large as the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1 or len(text)
        yield from text[start:end].splitlines(keepends=True)
        start = end


def _code_points(text: str) -> np.ndarray:
    # Half a surrogate pair passes here; it is refused later, as it is in no vocabulary.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text has U+{code:04X}, half a surrogate pair, which is no character; remove it") from None
